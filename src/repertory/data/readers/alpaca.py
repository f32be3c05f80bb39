"""Alpaca: instruction, input, output, and system and history where they are there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.dialogue import conversations, record_shape, records, turn
from repertory.data.readers.reading import Reading, string

NAME = "alpaca"
TITLE = "Alpaca"

_SUFFIXES = (".json", ".jsonl", ".ndjson")


def recognises(export: Export) -> bool:
    return any(_is_alpaca(file) for file in export.with_suffix(*_SUFFIXES))


def _is_alpaca(file: ExportFile) -> bool:
    return {"instruction", "output"} <= record_shape(file)


def read(reading: Reading) -> Iterator[Entry]:
    for file in reading.export.with_suffix(*_SUFFIXES):
        if not _is_alpaca(file):
            continue
        yield from conversations(reading, file, records(reading, file), _conversation)


def _conversation(record: dict[str, Any]) -> Iterator[Entry]:
    if record.get("system"):
        yield turn(0, "system", string(record["system"]))
    place = 0
    for question, answer in record.get("history") or ():
        yield turn(place + 1, "user", string(question))
        yield turn(place + 2, "assistant", string(answer))
        place += 2
    instruction, given = string(record["instruction"]), string(record.get("input"))
    yield turn(place + 1, "user", f"{instruction}\n{given}" if given else instruction)
    yield turn(place + 2, "assistant", string(record["output"]))
