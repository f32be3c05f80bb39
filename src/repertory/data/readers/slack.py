"""Slack export: users.json and, per channel, a folder with one file of messages per day.

Text is Slack's own markup: `&amp;`, `<@U123>`, `<#C1|general>`, `<url|label>`, `:emoji:`; here it becomes what people
saw. Custom emoji stay `:custom:`. A message is in a thread when `thread_ts` is not its own `ts`; it hangs from the
message of that time. `ts` is a text and the id of a message in its channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import Any

import emoji

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry, Kind
from repertory.data.readers.reading import Reading, identifier, shape, string

NAME = "slack"
TITLE = "Slack export"

SAID = {None, "", "thread_broadcast", "me_message", "file_share", "file_comment", "bot_message"}
SERVICE = {
    "channel_join", "channel_leave", "channel_topic", "channel_purpose", "channel_name", "channel_archive",
    "channel_unarchive", "group_join", "group_leave", "group_topic", "group_purpose", "group_name", "group_archive",
    "bot_add", "bot_remove", "bot_enable", "bot_disable", "reminder_add", "huddle_thread", "pinned_item",
    "unpinned_item", "channel_convert_to_private", "channel_posting_permissions", "sh_room_created",
    "app_conversation_join",
}  # fmt: skip
_DAY = re.compile(r"\d{4}-\d\d-\d\d\.json")
_MARKUP = re.compile(r"<([^<>\n]*)>|:([a-z0-9_+'-]+):(?::skin-tone-([2-6]):)?")
_ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))
_SKIN_TONES = {str(tone): chr(0x1F3F9 + tone) for tone in range(2, 7)}  # U+1F3FB to U+1F3FF


def recognises(export: Export) -> bool:
    return any(_DAY.fullmatch(file.base) and "item.ts" in shape(file) for file in export.files)


def read(reading: Reading) -> Iterator[Entry]:
    export = reading.export
    users = _users(reading, export.find("users.json") or export.find("org_users.json"))
    channels: dict[str, list[ExportFile]] = {}
    for file in export.files:
        if _DAY.fullmatch(file.base):
            channels.setdefault(file.folder, []).append(file)
    for folder, days in channels.items():
        channel = PurePosixPath(folder).name
        for day in days:
            yield from reading.entries(
                day,
                reading.items(day),
                partial(_entry, reading, day, channel, users),
            )


def _users(reading: Reading, file: ExportFile | None) -> dict[str, tuple[str, bool]]:
    """Name and whether it is a bot, by id."""
    users = {}
    for user in reading.items(file) if file else ():
        if isinstance(user, dict) and isinstance(user.get("id"), str):
            profile = user["profile"] if isinstance(user.get("profile"), dict) else {}
            named = (profile.get("display_name"), profile.get("real_name"), user.get("real_name"), user.get("name"))
            name = next((name for name in named if isinstance(name, str) and name), user["id"])
            users[user["id"]] = (name, bool(user.get("is_bot")))
    return users


def _entry(
    reading: Reading, file: ExportFile, channel: str, users: dict[str, tuple[str, bool]], record: dict[str, Any]
) -> Entry | None:
    subtype = record.get("subtype")
    if subtype == "message_replied":
        return None  # says that there is a reply, which comes by itself
    kind: Kind = "said"
    if subtype == "tombstone":
        kind = "deleted"
    elif subtype not in SAID:
        kind = "service"
        if subtype not in SERVICE:
            reading.unknown_kind(file, subtype)
    author_id = identifier(record.get("user") or record.get("bot_id") or record.get("username") or "unknown")
    known = users.get(author_id)
    profile = record.get("user_profile") or {}
    name = (
        (known and known[0])
        or string(profile.get("display_name"))
        or string(profile.get("real_name"))
        or string(record.get("username"))
        or author_id
    )
    if known is None and users and kind == "said" and name == author_id:
        reading.report.findings.add_once("author_unknown", file.name, f"{author_id[:40]!r} is not in users.json.")
    ts = string(record["ts"])
    thread = string(record.get("thread_ts")) or None
    is_reply = thread is not None and thread != ts
    text = string(record.get("text"))
    mentions: list[str] = []
    if "<" in text or "&" in text or ":" in text:
        text = _seen(text, users, mentions)
    if subtype == "me_message":
        text = f"/me {text}"
    files = record.get("files") or ([record["file"]] if record.get("file") else [])
    edited = record.get("edited")
    return Entry(
        channel=channel,
        id=ts,
        author_id=author_id,
        author=name,
        text=text,
        time=float(ts),
        kind=kind,
        thread=thread,
        reply_to=thread if is_reply else None,
        edited=float(edited["ts"]) if edited else None,
        is_bot="bot_id" in record or subtype == "bot_message" or bool(known and known[1]),
        attachments=tuple(string(item.get("name")) or "file" for item in files),
        reactions=tuple((_emoji(string(r["name"])), int(r["count"])) for r in record.get("reactions") or ()),
        mentions=tuple(mentions),
    )


def _seen(text: str, users: dict[str, tuple[str, bool]], mentions: list[str]) -> str:
    """What people saw. Entities are resolved last, so that a typed `&lt;@U1&gt;` is no mention."""

    def resolve(found: re.Match[str]) -> str:
        inner, alias, tone = found.groups()
        if alias is not None:
            return _emoji(alias) + _SKIN_TONES.get(tone or "", "")
        target, bar, label = inner.partition("|")
        if target.startswith("@"):
            mentions.append(target[1:])
            return "@" + (users[target[1:]][0] if target[1:] in users else label or target[1:])
        if target.startswith("#"):
            return "#" + (label or target[1:])
        if target.startswith("!"):
            return label if bar and target.startswith(("!date", "!subteam")) else "@" + target[1:].split("^")[0]
        return label or target.removeprefix("mailto:")

    text = _MARKUP.sub(resolve, text)
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    return text


@lru_cache(maxsize=4096)
def _emoji(alias: str) -> str:
    """The emoji of that name, or the name between colons where it is the workspace's own."""
    return emoji.emojize(f":{alias}:", language="alias")
