"""Claude export, conversations.json: chat_messages with a sender. Thoughts and tools are nobody's words."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.dialogue import conversations, record_shape, records, seconds, turn
from repertory.data.readers.reading import Reading, string

NAME = "claude"
TITLE = "Claude export"


def recognises(export: Export) -> bool:
    return any("chat_messages" in record_shape(file) for file in export.with_suffix(".json"))


def read(reading: Reading) -> Iterator[Entry]:
    for file in reading.export.with_suffix(".json"):
        if "chat_messages" not in record_shape(file):
            continue
        reading.report.findings.add_once("provider_voice", file.name)
        yield from conversations(reading, file, records(reading, file), partial(_conversation, reading, file))


def _conversation(reading: Reading, file: ExportFile, conversation: dict[str, Any]) -> Iterator[Entry]:
    time = conversation.get("created_at")
    for place, message in enumerate(_branch(conversation["chat_messages"])):
        time = message.get("created_at") or time
        entry = turn(place, message["sender"], _text(message), seconds(reading, file, time))
        entry.id = string(message.get("uuid")) or str(place)
        attached = [*(message.get("attachments") or ()), *(message.get("files") or ())]
        entry.attachments = tuple(string(item.get("file_name")) or "file" for item in attached)
        yield entry


def _branch(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where messages name their parents, the branch that ends in the last message; else all."""
    by_id = {message["uuid"]: message for message in messages if message.get("uuid")}
    if not messages or not any(message.get("parent_message_uuid") in by_id for message in messages):
        return messages
    branch = []
    visited: set[str] = set()
    message: dict[str, Any] | None = messages[-1]
    while message is not None and message.get("uuid") not in visited:
        visited.add(string(message.get("uuid")))
        branch.append(message)
        message = by_id.get(message.get("parent_message_uuid"))
    return branch[::-1]


def _text(message: dict[str, Any]) -> str:
    texts = [part["text"] for part in message.get("content") or () if part.get("type") == "text" and part.get("text")]
    return "\n".join(texts) if texts else string(message.get("text"))
