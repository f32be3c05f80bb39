"""What preparation keeps on disk while it works, so that a long history needs no more memory than a short one.

A SQLite database without a name: it grows in the folder for temporary files (SQLITE_TMPDIR, TMPDIR), nobody else can
open it, and it is gone with the process however that ends.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any, overload

from repertory.data.conversations import Conversation
from repertory.data.history import Entry
from repertory.data.preparation.sessions import Session, Turn
from repertory.errors import StorageFailed

CACHE_KIB = 16 << 10
CHUNK = 1000  # rows that are read before any of them is changed

_SCHEMA = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE entries (number INTEGER PRIMARY KEY, channel TEXT, thread TEXT, id TEXT, author TEXT, text TEXT,
    time REAL, second INTEGER, reply_to TEXT, mentions TEXT, bot INTEGER, forwarded INTEGER, trained INTEGER);
CREATE TABLE prompts (channel TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID;
CREATE TABLE sessions (number INTEGER PRIMARY KEY, begin INTEGER, key INTEGER, texts TEXT, about TEXT);
CREATE TABLE conversations (number INTEGER PRIMARY KEY, body TEXT, authors TEXT);
CREATE TABLE keys (key INTEGER PRIMARY KEY, times INTEGER);
"""
_ENTRY = "number, channel, thread, id, author, text, time, reply_to, mentions, bot, forwarded, trained"


@dataclass(frozen=True, slots=True)
class Stream:
    """What was said in a channel outside of threads, or in one thread."""

    channel: str
    thread: str | None
    has_times: bool  # all its entries have one


class Scratch:
    """One preparation's, as a context."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(f"PRAGMA cache_size = -{CACHE_KIB};{_SCHEMA}BEGIN;")

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Raises StorageFailed in place of the database's error where the disk is full."""
        self._database.close()
        if isinstance(error, sqlite3.OperationalError):
            raise StorageFailed(f"the disk refused a temporary file: {error}") from error

    # What was said

    def keep(self, history: Iterable[Entry]) -> int:
        """Take the words and system prompts of a history. Returns how many words there are, in messages."""
        insert = f"INSERT INTO entries VALUES ({', '.join('?' * 13)})"
        self._database.executemany(insert, self._rows(history))
        return int(self._database.execute("SELECT COUNT(*) FROM entries").fetchone()[0])

    def _rows(self, history: Iterable[Entry]) -> Iterator[tuple[object, ...]]:
        for entry in history:
            if entry.kind == "said":
                yield _row(entry)
            elif entry.kind == "prompt":
                self._database.execute("INSERT OR REPLACE INTO prompts VALUES (?, ?)", (entry.channel, entry.text))

    def prompt(self, channel: str) -> str | None:
        """The system prompt of a channel; the last one where there are several."""
        found = self._database.execute("SELECT text FROM prompts WHERE channel = ?", (channel,)).fetchone()
        return None if found is None else str(found[0])

    def sift(self, why: Callable[[Entry], str | None]) -> Counter[str]:
        """Drop every entry that `why` has a reason against; it may change the text of one that stays.

        Returns how many were dropped, by reason.
        """
        dropped: Counter[str] = Counter()
        last = -1
        while rows := self._database.execute(
            f"SELECT {_ENTRY} FROM entries WHERE number > ? ORDER BY number LIMIT {CHUNK}", (last,)
        ).fetchall():
            gone, changed = [], []
            for row in rows:
                entry = _entry(row)
                if (reason := why(entry)) is not None:
                    dropped[reason] += 1
                    gone.append((row[0],))
                elif entry.text != row[5]:
                    changed.append((entry.text, row[0]))
            self._database.executemany("DELETE FROM entries WHERE number = ?", gone)
            self._database.executemany("UPDATE entries SET text = ? WHERE number = ?", changed)
            last = rows[-1][0]
        return dropped

    def one_author(self, accounts: Collection[str]) -> None:
        """Several accounts of one person are one author from here on: the first in the alphabet."""
        first, *others = sorted(accounts)
        self._database.executemany("UPDATE entries SET author = ? WHERE author = ?", [(first, one) for one in others])

    def texts_of(self, author: str, at_most: int, characters: int) -> list[str]:
        """Of an author's messages so many, evenly spread over time, and of each so much."""
        total = self._database.execute("SELECT COUNT(*) FROM entries WHERE author = ?", (author,)).fetchone()[0]
        in_order = self._database.execute(
            "SELECT substr(text, 1, ?) FROM entries WHERE author = ? ORDER BY second, text", (characters, author)
        )
        return [text for (text,) in islice(in_order, 0, None, max(1, -(-total // at_most)))]

    def count_of(self, author: str) -> int:
        return int(self._database.execute("SELECT COUNT(*) FROM entries WHERE author = ?", (author,)).fetchone()[0])

    # In streams

    def streams(self) -> Iterator[Stream]:
        """Channels first, then threads, each in the order of the export."""
        self._database.execute("CREATE INDEX in_order ON entries (channel, thread, second, number)")
        if self._database.execute("SELECT 1 FROM entries WHERE thread IS NOT NULL").fetchone() is not None:
            self._database.execute("CREATE INDEX by_id ON entries (channel, id)")
        found = self._database.execute(
            "SELECT channel, thread, COUNT(*) = COUNT(second), MIN(number) AS first FROM entries"
            " GROUP BY channel, thread ORDER BY thread IS NOT NULL, first"
        )
        for channel, thread, has_times, _ in found:
            yield Stream(channel, thread, bool(has_times))

    def entries(self, stream: Stream) -> Iterator[Entry]:
        """In order of time. Seconds decide it and entries of one second keep theirs, so that two exports of one chat
        agree; a stream in which any entry lacks a time keeps the order of the export."""
        order = "second, number" if stream.has_times else "number"
        about = (stream.channel, stream.thread)
        wanted = f"SELECT {_ENTRY} FROM entries WHERE channel = ? AND thread IS ? ORDER BY {order}"
        return map(_entry, self._database.execute(wanted, about))

    def parent(self, stream: Stream) -> Entry | None:
        """What a thread hangs from, where that is in its channel."""
        if stream.thread is None:
            return None
        wanted = f"SELECT {_ENTRY} FROM entries WHERE channel = ? AND id = ? AND thread IS NULL ORDER BY number DESC"
        found = self._database.execute(wanted, (stream.channel, stream.thread)).fetchone()
        return None if found is None else _entry(found)

    def pauses(self) -> Iterator[int]:
        """Between one message of a channel and the next, in seconds; threads aside."""
        of, last = None, 0
        times = "SELECT channel, second FROM entries WHERE thread IS NULL ORDER BY channel, second"
        for channel, second in self._database.execute(times):
            if channel == of:
                yield second - last
            of, last = channel, second

    def has_group(self) -> bool:
        """Whether more than two speak in any channel, threads aside."""
        found = "SELECT 1 FROM entries WHERE thread IS NULL GROUP BY channel HAVING COUNT(DISTINCT author) > 2"
        return self._database.execute(found).fetchone() is not None

    # In sessions

    def add_session(self, session: Session) -> None:
        texts = json.dumps([turn.texts for turn in session.turns], ensure_ascii=False)
        turns = [[t.author_id, t.begin, t.end, t.ids, t.reply_to, t.mentions, t.is_trained] for t in session.turns]
        about = json.dumps([session.channel, session.context, turns])
        begin = session.turns[session.context].begin
        row = (begin, _key([texts]), texts, about)
        self._database.execute("INSERT INTO sessions VALUES (NULL, ?, ?, ?, ?)", row)

    def sessions(self, *, by_time: bool) -> Iterator[Session]:
        """By time in an order that the export does not decide, or as they were added."""
        # Numbers are sorted, not texts: SQLite's sorter holds a row of each of its runs, and rows have megabytes.
        order = "begin, key" if by_time else "number"
        for (number,) in self._database.execute(f"SELECT number FROM sessions ORDER BY {order}"):
            row = self._database.execute("SELECT texts, about FROM sessions WHERE number = ?", (number,))
            texts, about = row.fetchone()
            channel, context, turns = json.loads(about)
            of_turns = zip(turns, json.loads(texts), strict=True)
            yield Session(
                channel,
                [
                    Turn(author, said, begin, end, ids, reply_to, tuple(mentions), is_trained)
                    for (author, begin, end, ids, reply_to, mentions, is_trained), said in of_turns
                ],
                context,
            )

    # In conversations

    def add_conversation(self, conversation: Conversation, authors: Iterable[str]) -> None:
        row = (line_of(conversation), json.dumps(sorted(authors)))
        self._database.execute("INSERT INTO conversations VALUES (NULL, ?, ?)", row)

    def revise(self, revised: Callable[[Conversation], Conversation | None]) -> None:
        """Put what `revised` makes of it in place of each conversation, in their order; None drops it."""
        last = -1
        while rows := self._database.execute(
            f"SELECT number, body FROM conversations WHERE number > ? ORDER BY number LIMIT {CHUNK}", (last,)
        ).fetchall():
            for number, body in rows:
                before = Conversation.model_validate_json(body)
                after = revised(before)
                if after is None:
                    self._database.execute("DELETE FROM conversations WHERE number = ?", (number,))
                elif after is not before:
                    self._database.execute(
                        "UPDATE conversations SET body = ? WHERE number = ?", (line_of(after), number)
                    )
            last = rows[-1][0]

    @property
    def conversations(self) -> Conversations:
        return Conversations(self._database)

    # Seen before

    def times(self, *about: str) -> int:
        """How often this was asked before."""
        found = self._database.execute("SELECT times FROM keys WHERE key = ?", (_key(about),)).fetchone()
        return 0 if found is None else int(found[0])

    def count(self, *about: str) -> int:
        """How often this was counted, this time included."""
        counted = "INSERT INTO keys VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times"
        return int(self._database.execute(counted, (_key(about),)).fetchone()[0])


class Conversations(Sequence[Conversation]):
    """Those of a scratch, as long as it is open."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __len__(self) -> int:
        return int(self._database.execute("SELECT COUNT(*) FROM conversations").fetchone()[0])

    def __iter__(self) -> Iterator[Conversation]:
        return map(Conversation.model_validate_json, self.lines())

    @overload
    def __getitem__(self, at: int) -> Conversation: ...
    @overload
    def __getitem__(self, at: slice) -> list[Conversation]: ...
    def __getitem__(self, at: int | slice) -> Conversation | list[Conversation]:
        if isinstance(at, int):
            return self[at : at + 1 or None][0]
        lines = islice(self.lines(), *at.indices(len(self)))
        return [Conversation.model_validate_json(line) for line in lines]

    def lines(self) -> Iterator[str]:
        """Each as a line of JSON."""
        for (body,) in self._database.execute("SELECT body FROM conversations ORDER BY number"):
            yield body

    def authors(self) -> Iterator[list[str]]:
        """Of each, the ids of those whose words are in it, sorted."""
        for (authors,) in self._database.execute("SELECT authors FROM conversations ORDER BY number"):
            yield json.loads(authors)


def line_of(conversation: Conversation) -> str:
    return conversation.model_dump_json(exclude_defaults=True)


def _row(entry: Entry) -> tuple[object, ...]:
    thread = None if entry.thread == entry.id else entry.thread
    second = None if entry.time is None else math.floor(entry.time)
    mentions = json.dumps(entry.mentions) if entry.mentions else None
    flags = (entry.is_bot, entry.is_forwarded, entry.is_trained)
    said = (entry.channel, thread, entry.id, entry.author_id, entry.text, entry.time, second)
    return (None, *said, entry.reply_to, mentions, *flags)


def _entry(row: Sequence[Any]) -> Entry:
    _, channel, thread, ident, author, text, time, reply_to, mentions, bot, forwarded, trained = row
    return Entry(
        channel,
        ident,
        author,
        author,
        text,
        time,
        thread=thread,
        reply_to=reply_to,
        mentions=tuple(json.loads(mentions)) if mentions else (),
        is_bot=bool(bot),
        is_forwarded=bool(forwarded),
        is_trained=bool(trained),
    )


def _key(about: Sequence[str]) -> int:
    """64 bits of a text: among a million texts two share them with a chance of 3 in 100 million."""
    return int.from_bytes(blake2b("\0".join(about).encode(), digest_size=8).digest(), "big", signed=True)
