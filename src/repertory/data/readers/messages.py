"""Rows of `messages` with role and content: OpenAI chat JSONL, Hugging Face datasets as JSON lines or Parquet.

Also `prompt` with `completion`, as texts or as messages. `weight: 0` on an assistant turn makes it context only.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.dialogue import conversations, parts_text, record_shape, records, seconds, turn
from repertory.data.readers.reading import Reading

NAME = "messages"
TITLE = "OpenAI chat JSONL, Hugging Face messages (JSONL, Parquet)"

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


def recognises(export: Export) -> bool:
    return any(_is_dataset(file) for file in export.with_suffix(*_SUFFIXES))


def _is_dataset(file: ExportFile) -> bool:
    if file.suffix == ".parquet":
        return file.head[:4] == b"PAR1"
    paths = record_shape(file)
    return {"messages.item.role", "messages.item.content"} <= paths or {"prompt", "completion"} <= paths


def read(reading: Reading) -> Iterator[Entry]:
    for file in reading.export.with_suffix(*_SUFFIXES):
        if not _is_dataset(file):
            continue
        yield from conversations(reading, file, records(reading, file), partial(conversation, reading, file))


def conversation(reading: Reading, file: ExportFile, record: dict[str, Any]) -> Iterator[Entry]:
    """The turns of one row. A row of the native request is one too, with a platform and a timestamp."""
    time = seconds(reading, file, record.get("timestamp"))
    for place, message in enumerate(_messages(record)):
        is_trained = message.get("weight") != 0
        role = "tool" if message.get("tool_calls") and not message.get("content") else message["role"]
        yield turn(place, role, parts_text(message.get("content")), time, is_trained=is_trained)


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    if record.get("messages") is not None:
        return list(record["messages"])
    prompt, completion = record["prompt"], record["completion"]
    return [
        *(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]),
        *(completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]),
    ]
