"""A history as everything here knows it: entries in channels, by authors, from whatever export they came.

Readers turn an export into a stream of entries (one flat stream, never a whole file in memory); `History` passes the
stream on and counts what goes by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from repertory.data.findings import Findings

LAST_SECOND = 253_402_300_800  # the year 10000
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"

Kind = Literal["said", "service", "prompt", "deleted"]


@dataclass(slots=True)
class Entry:
    """One entry of a history. Text is exactly what the author wrote, line breaks included.

    `kind` is "said" for words of an author, "service" for what a platform says (joins, pins, calls), "prompt" for the
    system prompt of an assistant's conversation, "deleted" for words that were taken back.
    """

    channel: str
    id: str  # unique within the channel
    author_id: str
    author: str  # the name as the export shows it
    text: str
    time: float | None = None  # seconds since 1970 in UTC
    kind: Kind = "said"
    thread: str | None = None  # the id of the entry that the thread hangs from, or the thread's own id
    reply_to: str | None = None  # an id in the same channel
    edited: float | None = None
    is_bot: bool = False
    is_forwarded: bool = False  # somebody else's words
    is_trained: bool = True  # False where a training file says that this turn is only context
    attachments: tuple[str, ...] = ()  # kinds or names: photo, sticker, report.pdf
    reactions: tuple[tuple[str, int], ...] = ()  # (emoji, how many)
    mentions: tuple[str, ...] = ()  # author ids
    file: str = ""
    line: int = 0  # of the file where it has lines, else the number of the record in it, from 1


@dataclass(slots=True)
class Author:
    """Who speaks in a history, and how much."""

    id: str
    names: Counter[str] = field(default_factory=Counter)
    messages: int = 0  # with words
    characters: int = 0
    is_bot: bool = False
    first: float | None = None  # seconds since 1970 in UTC
    last: float | None = None

    @property
    def name(self) -> str:
        return self.names.most_common(1)[0][0] if self.names else self.id


@dataclass(slots=True)
class ImportReport:
    """What reading an export came to. Complete when the entries have been read to their end."""

    format: str
    entries: int = 0
    messages: int = 0  # entries with words of an author
    other: Counter[str] = field(default_factory=Counter)  # service, deleted, prompt, media without words
    channels: set[str] = field(default_factory=set)
    authors: dict[str, Author] = field(default_factory=dict)
    timezone_assumed: str | None = None
    findings: Findings = field(default_factory=Findings)


class History:
    """The entries of one export in the order of the export, to be read once, and the report about them."""

    def __init__(self, entries: Iterable[Entry], report: ImportReport) -> None:
        self.report = report
        self._entries = entries

    def __iter__(self) -> Iterator[Entry]:
        report = self.report
        for entry in self._entries:
            report.entries += 1
            said = "".join(
                (entry.text, entry.author, entry.author_id, entry.channel, entry.id, entry.thread or "",
                 entry.reply_to or "", *entry.mentions, *entry.attachments, *(emoji for emoji, _ in entry.reactions))
            )  # fmt: skip
            if (not said.isascii() or "\0" in said) and _storable(said) != said:
                self._mend(entry)
            if entry.time is not None and not 0 <= entry.time < LAST_SECOND:  # NaN is not either
                entry.time = None
                report.findings.add("time_missing", entry.file, entry.line)
            report.channels.add(entry.channel)
            if entry.kind != "said":
                report.other[entry.kind] += 1
            elif not entry.text:
                report.other["media"] += 1
            else:
                report.messages += 1
                self._count(entry)
            yield entry

    def _count(self, entry: Entry) -> None:
        authors = self.report.authors
        author = authors.get(entry.author_id)
        if author is None:
            author = authors[entry.author_id] = Author(entry.author_id)
        author.names[entry.author] += 1
        author.messages += 1
        author.characters += len(entry.text)
        author.is_bot = author.is_bot or entry.is_bot
        if entry.time is not None:
            if author.first is None or entry.time < author.first:
                author.first = entry.time
            if author.last is None or entry.time > author.last:
                author.last = entry.time

    def _mend(self, entry: Entry) -> None:
        """Half surrogates (bytes that were no UTF-8 are read as such) and NUL can be neither stored nor tokenized."""
        entry.text, entry.author = _storable(entry.text), _storable(entry.author)
        entry.author_id, entry.channel, entry.id = map(_storable, (entry.author_id, entry.channel, entry.id))
        entry.thread = None if entry.thread is None else _storable(entry.thread)
        entry.reply_to = None if entry.reply_to is None else _storable(entry.reply_to)
        entry.mentions, entry.attachments = (
            tuple(map(_storable, said)) for said in (entry.mentions, entry.attachments)
        )
        entry.reactions = tuple((_storable(emoji), count) for emoji, count in entry.reactions)
        self.report.findings.add("text_repaired", entry.file, entry.line)


def _storable(text: str) -> str:
    try:
        text.encode()
        if "\0" not in text:
            return text
    except UnicodeEncodeError:
        pass
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")
