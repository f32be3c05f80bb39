"""Where one conversation ends and the next begins: threads first, then pauses; and bursts as one turn."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from repertory.data.history import Entry

BURST_SECONDS = 120  # catches 98.2% of the pauses within bursts of chitchat-dataset; 420 s would 99.5%
TWO_PEOPLE_GAP_SECONDS = 30 * 60  # 0.09 needless cuts per conversation of chitchat-dataset
GROUP_GAP_SECONDS = 15 * 60  # 99.3% of the replies on Ubuntu's IRC come within it
KNEE_RANGE_SECONDS = (5 * 60, 6 * 3600)
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


def streams(entries: Iterable[Entry]) -> list[tuple[list[Entry], Entry | None]]:
    """Per channel, in order of time, what was said in it; and per thread, with the entry it hangs from.

    Seconds decide the order and entries of one second keep theirs, so that two exports of one chat agree. A channel in
    which any entry lacks a time keeps the order of the export.
    """
    main: dict[str, list[Entry]] = defaultdict(list)
    threads: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    by_id: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        if entry.thread is not None and entry.thread != entry.id:
            threads[entry.channel, entry.thread].append(entry)
        else:
            main[entry.channel].append(entry)
            by_id[entry.channel, entry.id] = entry
    found: list[tuple[list[Entry], Entry | None]] = [(said, None) for said in main.values()]
    found += [(said, by_id.get(thread)) for thread, said in threads.items()]
    for said, _ in found:
        if all(entry.time is not None for entry in said):
            said.sort(key=lambda entry: math.floor(entry.time or 0))
    return found


def turns(entries: Sequence[Entry], gap_seconds: int) -> list[Turn]:
    """Bursts as one turn: an author's messages within BURST_SECONDS of each other that answer nothing else."""
    found: list[Turn] = []
    for entry in entries:
        time = math.floor(entry.time or 0)
        last = found[-1] if found else None
        if (
            last is not None
            and last.author_id == entry.author_id
            and time - last.end <= min(BURST_SECONDS, gap_seconds)
            and entry.reply_to in (None, last.reply_to)
            and last.is_trained == entry.is_trained
        ):
            last.texts.append(entry.text)
            last.ids.append(entry.id)
            last.end = time
            last.mentions += entry.mentions
        else:
            found.append(
                Turn(
                    entry.author_id,
                    [entry.text],
                    time,
                    time,
                    [entry.id],
                    entry.reply_to,
                    entry.mentions,
                    entry.is_trained,
                )
            )
    return found


def sessions(channel: str, said: Sequence[Turn], gap_seconds: int, parent: Turn | None = None) -> Iterator[Session]:
    """The turns between pauses longer than `gap_seconds`. A reply stays with what it answers if that is in the session
    before, and a thread is one session, whatever its pauses, after the entry it hangs from."""
    if parent is not None:
        whole = [parent, *said]
        yield Session(channel, whole, 1)
        return
    current: list[Turn] = []
    ids: set[str] = set()
    for turn in said:
        if current and turn.begin - current[-1].end > gap_seconds and turn.reply_to not in ids:
            yield Session(channel, current)
            current, ids = [], set()
        current.append(turn)
        ids.update(turn.ids)
    if current:
        yield Session(channel, current)


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


def gap_for(said: Sequence[Sequence[Entry]]) -> tuple[int, str]:
    """(seconds, how it was found) of the pause that parts conversations in these channels."""
    gaps = [
        math.floor(after.time) - math.floor(before.time)
        for entries in said
        for before, after in pairwise(entries)
        if before.time is not None and after.time is not None
    ]
    found = knee(gaps)
    if found is not None:
        return found, "knee of the pauses"
    if all(len({entry.author_id for entry in entries}) <= 2 for entries in said):
        return TWO_PEOPLE_GAP_SECONDS, "two people"
    return GROUP_GAP_SECONDS, "a group"


def _bin(gap: int) -> int:
    return math.floor(math.log10(gap) * _BINS_PER_DECADE)
