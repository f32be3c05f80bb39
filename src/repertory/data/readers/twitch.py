"""Chat of a Twitch video as TwitchDownloader saves it, JSON.

https://github.com/lay295/TwitchDownloader, ChatRoot. Emotes are words of the text. Subscriptions and raids carry
`user_notice_params`. The streamer mostly speaks by voice, so the persona is often somebody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.reading import Reading, files_shaped, identifier, shapes, string

NAME = "twitch"
TITLE = "TwitchDownloader JSON"

_SHAPE = ("comments.item.message.body", "comments.item.content_offset_seconds")


def recognises(export: Export) -> bool:
    return any(paths >= set(_SHAPE) for _, paths in shapes(export))


def read(reading: Reading) -> Iterator[Entry]:
    for file in files_shaped(reading.export, *_SHAPE):
        yield from reading.entries(file, reading.items(file, "comments"), partial(_entry, reading, file))


def _entry(reading: Reading, file: ExportFile, record: dict[str, Any]) -> Entry:
    commenter = record.get("commenter") or {"_id": "deleted", "display_name": "deleted"}
    message = record["message"]
    notice = (message.get("user_notice_params") or {}).get("msg_id")
    badges = {badge.get("_id") for badge in message.get("user_badges") or ()}
    return Entry(
        channel=file.name,
        id=identifier(record["_id"]),
        author_id=identifier(commenter["_id"]),
        author=string(commenter.get("display_name")) or string(commenter.get("name")),
        text=string(message["body"]),
        time=reading.seconds(datetime.fromisoformat(record["created_at"]), file.name),
        kind="service" if notice else "said",
        is_bot="bot-badge" in badges,
    )
