"""Telegram Desktop, result.json: one chat, or all of them under chats.list and left_chats.list.

https://github.com/telegramdesktop/tdesktop, export_output_json.cpp. It writes control characters as `\\xHH`, which is
no JSON, so that is mended while reading. `date` names no zone; `date_unixtime` is exact where it is there. The text is
a string or a list of strings and of pieces with a `text`, joined as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry, Kind
from repertory.data.jsonstream import Mark
from repertory.data.readers.reading import MALFORMED, Reading, files_shaped, identifier, shapes, string

NAME = "telegram"
TITLE = "Telegram Desktop result.json"

_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|.)", re.DOTALL)
_LISTS = ("chats.list.item", "left_chats.list.item")
_THROUGH = frozenset(
    (
        "",
        "messages",
        "chats",
        "chats.list",
        "left_chats",
        "left_chats.list",
        *_LISTS,
        *(f"{at}.messages" for at in _LISTS),
    )
)
_MEDIA = ("media_type", "photo", "file", "location_information", "poll", "contact_information", "game_title")
_TOPIC_CREATED = "topic_created"


def recognises(export: Export) -> bool:
    return any(
        "messages.item.from_id" in paths
        or "messages.item.date_unixtime" in paths
        or "messages.item.text_entities" in paths
        or "chats.list.item.messages" in paths
        for _, paths in shapes(export)
    )


def read(reading: Reading) -> Iterator[Entry]:
    files = files_shaped(reading.export, "messages.item.type") + files_shaped(reading.export, "chats.list")
    for file in files:
        yield from _read_file(reading, file)


def _read_file(reading: Reading, file: ExportFile) -> Iterator[Entry]:
    chat: dict[str, Any] = {}
    topics: set[str] = set()  # ids of the notices that topics of a group hang from
    number = 0
    for path, value in reading.walk(file, _THROUGH, repair=_Repair):
        if value is Mark.BEGIN:
            if path in _LISTS:
                chat, topics = {}, set()
            continue
        if not path.endswith("messages.item"):
            chat[path.rsplit(".", 1)[-1]] = value
            continue
        number += 1
        try:
            entry = _entry(reading, file, str(chat.get("id", file.name)), topics, value)
        except MALFORMED as error:
            reading.malformed(file, number, error)
            continue
        entry.file, entry.line = file.name, number
        yield entry


class _Repair:
    """`\\xHH` to `\\u00HH`; an escape that a chunk cuts waits for the rest."""

    def __init__(self) -> None:
        self._waiting = ""

    def __call__(self, text: str, is_last: bool) -> str:
        text = self._waiting + text
        self._waiting = ""
        if not is_last:
            end = len(text)
            last = text.rfind("\\", max(0, end - 3))
            start = last
            while start > 0 and text[start - 1] == "\\":
                start -= 1
            # Of a run of backslashes before the cut the last one begins an escape if the run is odd.
            if last >= 0 and (last - start) % 2 == 0:
                text, self._waiting = text[:last], text[last:]
        if "\\x" not in text:
            return text
        return _ESCAPE.sub(lambda found: f"\\u00{found[1]}" if found[1] else found[0], text)


def _entry(reading: Reading, file: ExportFile, channel: str, topics: set[str], record: dict[str, Any]) -> Entry:
    kind: Kind = "said"
    if record["type"] != "message":
        kind = "service"
        if record["type"] not in ("service", "unsupported"):
            reading.unknown_kind(file, record["type"])
    ident = identifier(record["id"])
    if record.get("action") == _TOPIC_CREATED:
        topics.add(ident)
    reply_to = str(record["reply_to_message_id"]) if record.get("reply_to_message_id") is not None else None
    if record.get("reply_to_peer_id") is not None:
        reply_to = None  # a message of another chat
    thread = reply_to if reply_to in topics else None
    author_id = (
        record.get("from_id") or record.get("actor_id") or record.get("from") or record.get("actor") or "deleted"
    )
    name = string(record.get("from")) or string(record.get("actor")) or str(author_id)
    edited = record.get("edited_unixtime")
    media = tuple(string(record[key]) if key == "media_type" else key for key in _MEDIA if record.get(key))
    return Entry(
        channel=channel,
        id=ident,
        author_id=identifier(author_id),
        author=name,
        text=_text(record.get("text")),
        time=_seconds(reading, file, record),
        kind=kind,
        thread=thread,
        reply_to=None if thread else reply_to,
        edited=float(edited) if edited else None,
        is_bot=bool(record.get("via_bot")),
        is_forwarded=bool(record.get("forwarded_from") or record.get("saved_from")),
        attachments=media,
        reactions=tuple(
            (string(r.get("emoji")) or string(r.get("type")), int(r["count"])) for r in record.get("reactions") or ()
        ),
        mentions=tuple(
            f"user{piece['user_id']}"
            for piece in record.get("text_entities") or ()
            if isinstance(piece, dict) and piece.get("user_id")
        ),
    )


def _seconds(reading: Reading, file: ExportFile, record: dict[str, Any]) -> float:
    if unixtime := record.get("date_unixtime"):
        return float(unixtime)
    return reading.seconds(datetime.fromisoformat(record["date"]), file.name)


def _text(text: object) -> str:
    if isinstance(text, list):
        return "".join(piece if isinstance(piece, str) else string(piece["text"]) for piece in text)
    return string(text)
