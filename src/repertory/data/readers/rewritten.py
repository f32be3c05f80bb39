"""A history as Repertory itself writes it, an entry a line: an export from which somebody's words were deleted."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import TypeAdapter

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.reading import Reading

NAME = "history"
TITLE = "Repertory's own, after somebody's words were deleted"

MARK = "repertory_history"  # the one key of the first line; its value is the format that was exported
_HEAD = re.compile(rb'\{"%b": "([a-z-]*)"\}\n' % MARK.encode())
_entries = TypeAdapter(Entry)


def recognises(export: Export) -> bool:
    return any(_format(file) for file in export.files)


def format_of(export: Export) -> str:
    """That of the export which was written anew."""
    return next((format for file in export.files if (format := _format(file))), NAME)


def read(reading: Reading) -> Iterator[Entry]:
    for file in reading.export.files:
        if _format(file) is None:
            continue
        lines = reading.records(file)
        next(lines)
        yield from reading.entries(file, lines, _entries.validate_json)


def write(path: Path, format: str, entries: Iterable[Entry]) -> None:
    """Durably, and in place of what is there once it is whole."""
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        file.write(json.dumps({MARK: format}).encode() + b"\n")
        for entry in entries:
            file.write(_entries.dump_json(entry, exclude_defaults=True) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _format(file: ExportFile) -> str | None:
    found = _HEAD.match(file.head)
    return None if found is None else found[1].decode()
