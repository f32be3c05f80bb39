"""Facebook Messenger and Instagram: messages/inbox/<thread>/message_<n>.json, newest first; and the end-to-end export.

In the first shape every string is UTF-8 whose bytes were escaped as if they were Latin-1; in the second it is clean.
There are no author ids and no replies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry, Kind
from repertory.data.readers.reading import Reading, files_shaped, shapes, string

NAME = "messenger"
TITLE = "Messenger and Instagram JSON"

_PLAIN = ("messages.item.sender_name", "messages.item.timestamp_ms")
_SEALED = ("messages.item.senderName", "messages.item.timestamp")
_MEDIA = ("photos", "videos", "audio_files", "gifs", "files", "sticker", "share", "media")
# What the apps write as somebody's words, in their languages as far as they are known.
_NOTICE = re.compile(
    r"Reacted .{1,12} to your message ?|.{0,60}reacted .{1,12} to (?:your|a) message\.? ?|Liked a message|"
    r".{1,60} (?:liked a message|sent an attachment\.|sent a (?:photo|video|link|sticker|GIF|voice message)\.|"
    r"a envoyé une pièce jointe\.|ha enviado un archivo adjunto\.|hat einen Anhang gesendet\.)|"
    r"Hat mit .{1,12} auf deine Nachricht reagiert ?|A réagi .{1,12} à votre message ?|"
    r"Reaccionó con .{1,12} a tu mensaje ?"
)


def recognises(export: Export) -> bool:
    return any(paths >= set(shape) for _, paths in shapes(export) for shape in (_PLAIN, _SEALED))


def read(reading: Reading) -> Iterator[Entry]:
    reading.report.findings.add_once("authors_by_name", reading.export.name)
    for file in files_shaped(reading.export, *_PLAIN):
        records = reading.items(file, "messages")
        yield from _oldest_first(reading.entries(file, records, partial(_plain, _channel(file))))
    for file in files_shaped(reading.export, *_SEALED):
        records = reading.items(file, "messages")
        yield from _oldest_first(reading.entries(file, records, partial(_sealed, file.name)))


def _channel(file: ExportFile) -> str:
    """Parts of a thread lie in one folder."""
    return file.folder if file.folder != "." else re.sub(r"_\d+\.json$", "", file.name)


def _oldest_first(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Entries of one moment in the order in which they were sent; sorting by time, which is stable, does the rest."""
    for _, moment in groupby(entries, key=lambda entry: entry.time):
        yield from reversed(list(moment))


def _plain(channel: str, record: dict[str, Any]) -> Entry:
    name = _mend(string(record["sender_name"]))
    text = _mend(string(record.get("content")))
    kind: Kind = "said"
    if record.get("is_unsent"):
        kind = "deleted"
    elif "call_duration" in record or record.get("type") in ("Subscribe", "Unsubscribe", "Call") or _is_notice(text):
        kind = "service"
    return _entry(channel, name, text, float(record["timestamp_ms"]), kind, record, _mend)


def _sealed(channel: str, record: dict[str, Any]) -> Entry:
    kind: Kind = "said"
    text = string(record.get("text"))
    if record.get("isUnsent"):
        kind = "deleted"
    elif record.get("type") not in (None, "text", "media", "link", "gif", "sticker", "Generic") or _is_notice(text):
        kind = "service"
    return _entry(channel, string(record["senderName"]), text, float(record["timestamp"]), kind, record, str)


def _entry(
    channel: str, name: str, text: str, milliseconds: float, kind: Kind, record: dict[str, Any], mend: Any
) -> Entry:
    if not name:
        raise ValueError("the sender's name is empty")
    counts: dict[str, int] = {}
    for reaction in record.get("reactions") or ():
        given = mend(string(reaction["reaction"]))
        counts[given] = counts.get(given, 0) + 1
    return Entry(
        channel=channel,
        id=f"{int(milliseconds)}:{name}",
        author_id=name,
        author=name,
        text=text,
        time=milliseconds / 1000,
        kind=kind,
        attachments=tuple(media for media in _MEDIA if record.get(media)),
        reactions=tuple(counts.items()),
    )


def _is_notice(text: str) -> bool:
    return len(text) < 120 and _NOTICE.fullmatch(text) is not None


def _mend(text: str) -> str:
    if text.isascii():
        return text
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text  # it is right already
