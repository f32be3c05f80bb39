"""The body of POST /api/v1/training/start as a file: {"conversations": [{"messages": […], "timestamp"?}]}."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.dialogue import conversations
from repertory.data.readers.messages import conversation
from repertory.data.readers.reading import Reading, shape

NAME = "native"
TITLE = "the body of a training request"


def recognises(export: Export) -> bool:
    return any(_is_request(file) for file in export.with_suffix(".json"))


def _is_request(file: ExportFile) -> bool:
    return "conversations.item.messages.item.role" in shape(file)


def read(reading: Reading) -> Iterator[Entry]:
    for file in reading.export.with_suffix(".json"):
        if not _is_request(file):
            continue
        yield from conversations(
            reading, file, enumerate(reading.items(file, "conversations"), 1), partial(conversation, reading, file)
        )
