"""ChatGPT export, conversations.json: each conversation a tree of messages, of which the user saw one branch.

The branch is walked from `current_node` to the root; the rest are regenerated and edited messages. Thoughts, tool calls
and hidden messages are nobody's words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.dialogue import conversations, parts_text, record_shape, records, turn
from repertory.data.readers.reading import Reading

NAME = "chatgpt"
TITLE = "ChatGPT export"

_CITATION = re.compile("\ue200[^\ue200\ue201]*\ue201")


def recognises(export: Export) -> bool:
    return any(_is_export(file) for file in export.with_suffix(".json"))


def _is_export(file: ExportFile) -> bool:
    paths = record_shape(file)
    is_tree = any(path.startswith("mapping.") and path.endswith(".parent") for path in paths)
    return "mapping" in paths and (is_tree or "current_node" in paths or "create_time" in paths)


def read(reading: Reading) -> Iterator[Entry]:
    for file in reading.export.with_suffix(".json"):
        if not _is_export(file):
            continue
        reading.report.findings.add_once("provider_voice", file.name)
        yield from conversations(reading, file, records(reading, file), _conversation)


def _conversation(conversation: dict[str, Any]) -> Iterator[Entry]:
    time: float | None = conversation.get("create_time")
    for place, message in enumerate(_branch(conversation)):
        time = message.get("create_time") or time
        content = message.get("content") or {}
        metadata = message.get("metadata") or {}
        if (
            content.get("content_type") not in ("text", "multimodal_text")
            or message.get("recipient", "all") != "all"
            or message.get("weight") == 0
            or metadata.get("is_visually_hidden_from_conversation")
        ):
            continue
        text = _CITATION.sub("", parts_text(content.get("parts") or []))
        parts = content.get("parts") or []
        entry = turn(place, message["author"]["role"], text, float(time) if time is not None else None)
        entry.id = str(message.get("id") or place)
        entry.attachments = tuple("image" for part in parts if isinstance(part, dict))
        yield entry


def _branch(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages from the root to the current node."""
    mapping = conversation["mapping"]
    node = conversation.get("current_node")
    if node not in mapping:
        node = _last_leaf(mapping)
    branch = []
    visited: set[str] = set()
    while node is not None and node in mapping and node not in visited:
        visited.add(node)
        if message := mapping[node].get("message"):
            branch.append(message)
        node = mapping[node].get("parent")
    return branch[::-1]


def _last_leaf(mapping: dict[str, Any]) -> str | None:
    """The youngest node that nothing hangs from, of equals the last."""
    parents = {node.get("parent") for node in mapping.values()}
    leaves = [name for name in mapping if name not in parents]
    return max(
        reversed(leaves), key=lambda name: (mapping[name].get("message") or {}).get("create_time") or 0, default=None
    )
