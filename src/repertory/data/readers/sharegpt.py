"""ShareGPT: {"conversations": [{"from": "human", "value": …}, …], "system"?}, as an array or as JSON lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.dialogue import conversations, record_shape, records, turn
from repertory.data.readers.reading import Reading, string

NAME = "sharegpt"
TITLE = "ShareGPT"

_SUFFIXES = (".json", ".jsonl", ".ndjson")


def recognises(export: Export) -> bool:
    return any(_is_sharegpt(file) for file in export.with_suffix(*_SUFFIXES))


def _is_sharegpt(file: ExportFile) -> bool:
    return {"conversations.item.from", "conversations.item.value"} <= record_shape(file)


def read(reading: Reading) -> Iterator[Entry]:
    for file in reading.export.with_suffix(*_SUFFIXES):
        if not _is_sharegpt(file):
            continue
        yield from conversations(reading, file, records(reading, file), _conversation)


def _conversation(record: dict[str, Any]) -> Iterator[Entry]:
    if record.get("system"):
        yield turn(0, "system", string(record["system"]))
    for place, message in enumerate(record["conversations"], 1):
        yield turn(place, message["from"], string(message["value"]))
