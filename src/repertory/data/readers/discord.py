"""DiscordChatExporter, JSON: one file per channel or per part of one.

https://github.com/Tyrrrz/DiscordChatExporter, JsonMessageWriter. Kinds other than words carry invented English
content ("Pinned a message."), so they are told by their type. Names are those at the time of the export; the id is who
someone is. Where the exporter was told to leave markdown as it is, mentions and emoji are `<@123>` and `<:kek:1>`;
here they become what people saw.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry, Kind
from repertory.data.readers.reading import Reading, files_shaped, identifier, shapes, string

NAME = "discord"
TITLE = "DiscordChatExporter JSON"

SAID = {"Default", "Reply", "20", "23"}  # 20 and 23: answers to slash and context menu commands
SERVICE = {
    "RecipientAdd", "RecipientRemove", "Call", "ChannelNameChange", "ChannelIconChange", "ChannelPinnedMessage",
    "GuildMemberJoin", "ThreadCreated", "ThreadStarterMessage",
}  # fmt: skip
_MARKUP = re.compile(r"<@!?(\d+)>|<a?(:\w+:)\d+>")
_SHAPE = ("messages.item.author.isBot", "messages.item.content")


def recognises(export: Export) -> bool:
    return any(set(_SHAPE) <= paths and "channel.id" in paths for _, paths in shapes(export))


def read(reading: Reading) -> Iterator[Entry]:
    for file in files_shaped(reading.export, *_SHAPE):
        channel = _channel(reading, file)
        yield from reading.entries(
            file,
            reading.items(file, "messages"),
            partial(_entry, reading, file, channel),
        )


def _channel(reading: Reading, file: ExportFile) -> dict[str, str]:
    """id and kind of the channel, which stand before the messages."""
    found: dict[str, str] = {}
    for path, value in reading.walk(file, frozenset(("", "channel", "messages"))):
        if path == "messages":
            break
        if path.startswith("channel.") and isinstance(value, str | int):
            found[path.removeprefix("channel.")] = str(value)
    return found


def _entry(reading: Reading, file: ExportFile, channel: dict[str, str], record: dict[str, Any]) -> Entry:
    author = record["author"]
    kind: Kind = "said"
    if str(record["type"]) not in SAID:
        kind = "service"
        if record["type"] not in SERVICE:
            reading.unknown_kind(file, record["type"])
    reference = record.get("reference") or {}
    forwarded = record.get("forwardedMessage")
    is_forwarded = forwarded is not None or reference.get("type") == "Forward"
    text = string(record["content"])
    if is_forwarded and not text and forwarded:
        text = string(forwarded.get("content"))
    names = {identifier(user["id"]): _name(user) for user in record.get("mentions") or ()}
    is_reply = not is_forwarded and reference.get("channelId") in (None, channel.get("id"))
    edited = record.get("timestampEdited")
    return Entry(
        channel=channel.get("id", file.name),
        id=identifier(record["id"]),
        author_id=identifier(author["id"]),
        author=_name(author),
        text=_seen(text, names) if "<" in text else text,
        time=_seconds(reading, file, record["timestamp"]),
        kind=kind,
        thread=channel["id"] if "Thread" in channel.get("type", "") else None,
        reply_to=identifier(reference["messageId"]) if is_reply and reference.get("messageId") else None,
        edited=_seconds(reading, file, edited) if edited else None,
        is_bot=bool(author.get("isBot")),
        is_forwarded=is_forwarded,
        attachments=tuple(string(a.get("fileName")) for a in record.get("attachments") or ())
        + tuple("sticker" for _ in record.get("stickers") or ()),
        reactions=tuple((string(r["emoji"].get("name")), int(r["count"])) for r in record.get("reactions") or ()),
        mentions=tuple(names),
    )


def _name(user: dict[str, Any]) -> str:
    return string(user.get("nickname")) or string(user["name"])


def _seen(text: str, names: dict[str, str]) -> str:
    def resolve(found: re.Match[str]) -> str:
        user, emoji = found.groups()
        return emoji or (f"@{names[user]}" if user in names else found[0])

    return _MARKUP.sub(resolve, text)


def _seconds(reading: Reading, file: ExportFile, time: str) -> float:
    return reading.seconds(datetime.fromisoformat(time), file.name)
