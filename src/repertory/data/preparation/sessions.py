"""Where one conversation ends and the next begins: threads first, then pauses; and bursts as one turn."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from repertory.data.history import Entry

BURST_SECONDS = 120  # catches 98.2% of the pauses within bursts of chitchat-dataset; 420 s would 99.5%
TWO_PEOPLE_GAP_SECONDS = 30 * 60  # 0.09 needless cuts per conversation of chitchat-dataset
GROUP_GAP_SECONDS = 15 * 60  # 99.3% of the replies on Ubuntu's IRC come within it
KNEE_RANGE_SECONDS = (5 * 60, 6 * 3600)
MAX_SESSION_TURNS = 2000  # no conversation is; a history without times would be one session however long it is
MIN_GAPS = 200  # fewer make no histogram
_BINS_PER_DECADE = 8


@dataclass(slots=True)
class Turn:
    """What one author said without a longer pause and without anyone between."""

    author_id: str
    texts: list[str]
    begin: int  # seconds since 1970; 0 where the history has no times
    end: int
    ids: list[str]
    reply_to: str | None = None
    mentions: tuple[str, ...] = ()
    is_trained: bool = True

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


@dataclass(slots=True)
class Session:
    """A conversation between pauses. The first `context` turns are there to be read: a thread's first message."""

    channel: str
    turns: list[Turn]
    context: int = 0

    @property
    def speakers(self) -> set[str]:
        return {turn.author_id for turn in self.turns}


def turns(entries: Iterable[Entry], gap_seconds: int) -> Iterator[Turn]:
    """Bursts as one turn: an author's messages within BURST_SECONDS of each other that answer nothing else."""
    last: Turn | None = None
    for entry in entries:
        time = math.floor(entry.time or 0)
        if last is not None and _goes_on(last, entry, time, min(BURST_SECONDS, gap_seconds)):
            last.texts.append(entry.text)
            last.ids.append(entry.id)
            last.end = time
            last.mentions = tuple(dict.fromkeys((*last.mentions, *entry.mentions)))
            continue
        if last is not None:
            yield last
        last = Turn(
            entry.author_id,
            [entry.text],
            time,
            time,
            [entry.id],
            entry.reply_to,
            entry.mentions,
            entry.is_trained,
        )
    if last is not None:
        yield last


def _goes_on(turn: Turn, entry: Entry, time: int, burst_seconds: int) -> bool:
    return (
        turn.author_id == entry.author_id
        and time - turn.end <= burst_seconds
        and entry.reply_to in (None, turn.reply_to)
        and turn.is_trained == entry.is_trained
        and len(turn.ids) < MAX_SESSION_TURNS
    )


def sessions(channel: str, said: Iterable[Turn], gap_seconds: int, parent: Turn | None = None) -> Iterator[Session]:
    """The turns between pauses longer than `gap_seconds`. A reply stays with what it answers if that is in the session
    before, and a thread is one session, whatever its pauses, after the entry it hangs from. None is longer than
    MAX_SESSION_TURNS."""
    current: list[Turn] = [] if parent is None else [parent]
    context = len(current)
    ids: set[str] = set()
    for turn in said:
        is_pause = parent is None and current and turn.begin - current[-1].end > gap_seconds
        if (is_pause and turn.reply_to not in ids) or len(current) >= MAX_SESSION_TURNS:
            yield Session(channel, current, context)
            current, context, ids = [], 0, set()
        current.append(turn)
        ids.update(turn.ids)
    if len(current) > context:
        yield Session(channel, current, context)


def knee(gaps: Iterable[int]) -> int | None:
    """The pause, in seconds, that parts conversations: where the histogram of pauses is lowest between the pauses
    within a conversation and those between conversations. None where the pauses are too few or show no such place.

    Pauses are counted on a logarithmic scale and smoothed; the place must be well below what is on both its sides.
    """
    counts: dict[int, int] = defaultdict(int)
    total = 0
    for gap in gaps:
        if gap > 0:
            counts[_bin(gap)] += 1
            total += 1
    if total < MIN_GAPS:
        return None
    low, high = (_bin(seconds) for seconds in KNEE_RANGE_SECONDS)
    smooth = {at: sum(counts.get(at + d, 0) for d in (-1, 0, 1)) / 3 for at in range(min(counts), max(counts) + 1)}
    place = min(range(low, high + 1), key=lambda at: (smooth.get(at, 0.0), at))
    before = max((smooth[at] for at in smooth if at < place), default=0.0)
    after = max((smooth[at] for at in smooth if at > place), default=0.0)
    if smooth.get(place, 0.0) > min(before, after) / 2 or after < total / 1000:
        return None
    return round(10 ** ((place + 0.5) / _BINS_PER_DECADE) / 60) * 60


def gap_for(pauses: Iterable[int], *, in_groups: bool) -> tuple[int, str]:
    """(seconds, how it was found) of the pause that parts conversations, from those between messages, in seconds."""
    found = knee(pauses)
    if found is not None:
        return found, "knee of the pauses"
    if in_groups:
        return GROUP_GAP_SECONDS, "a group"
    return TWO_PEOPLE_GAP_SECONDS, "two people"


def _bin(gap: int) -> int:
    return math.floor(math.log10(gap) * _BINS_PER_DECADE)
