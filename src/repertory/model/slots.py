"""The slots of the batch: which voices take part in its steps. No torch here.

Every voice in a step costs time and memory of its own there, so their number is bounded. On a card a slot is a copy of
the voice in the card's memory, which stays until another needs the room; on a CPU it is the right to take part, and
nothing stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

from repertory.contracts import AdapterTier, Durations
from repertory.model.tier import Place, Tier

if TYPE_CHECKING:
    from repertory.model.scheduler import Sequence


class Slots:
    """For `count` voices at a time.

    Where more want to take part, the voice that has been in its slot for longest takes no newcomers until its replies
    are done and the slot is free. So a voice waits for the replies that others have in progress, and never for how many
    more requests they have.
    """

    def __init__(self, count: int, limit_bytes: int = 0, copy: Callable[[Any], Any] | None = None) -> None:
        """`copy` brings an adapter to where steps read it, if that is not where it is: `limit_bytes` of such copies."""
        self.count = count
        self._copy = copy
        self._tier: Tier[Any, Any] = Tier(limit_bytes)
        self._hits = self._misses = 0
        self._copying = Durations()
        self._in_use: dict[Any, int] = {}  # sequences of each; the adapter that has been there for longest comes first

    @property
    def voice_count(self) -> int:
        """Of those that take part now."""
        return len(self._in_use)

    @property
    def stats(self) -> AdapterTier:
        return AdapterTier(
            resident=len(self._tier),
            in_use=len(self._in_use),
            bytes=self._tier.used,
            hits=self._hits,
            misses=self._misses,
            evictions=self._tier.evictions,
            loads=self._copying,
        )

    def first(self, waiting: Iterable[Sequence]) -> Sequence | None:
        """Of those who may join, in the order of their turns, the first whose voice has a slot or gets one."""
        refused: set[Any] = set()
        for sequence in waiting:
            adapter = sequence.adapter
            if adapter is None:
                return sequence
            if adapter in self._in_use:
                if adapter not in islice(self._in_use, len(refused)):
                    return sequence
            elif not refused and self._has_room(adapter):  # the first who waits for a slot gets the next one
                return sequence
            else:
                refused.add(adapter)
        return None

    def enter(self, sequence: Sequence) -> None:
        """Into the slot of its voice, where `first` has said that it may. It has that slot's adapter from then on."""
        adapter = sequence.adapter
        if adapter is None:
            return
        place = self._tier.take(adapter)
        if place is None:
            self._misses += 1
            place = self._put(adapter)
        else:
            self._hits += 1
        self._in_use[adapter] = self._in_use.get(adapter, 0) + 1
        sequence.slot, sequence.adapter = place, place.value

    def leave(self, sequence: Sequence) -> None:
        """Out of the slot, if it has entered one."""
        place: Place[Any, Any] | None = sequence.slot
        if place is None:
            return
        sequence.slot = None
        self._tier.release(place)
        self._in_use[place.key] -= 1
        if not self._in_use[place.key]:
            del self._in_use[place.key]
            if self._copy is None:  # there is nothing to keep
                self._tier.forget(place.key)

    def forget(self, adapter: Any) -> None:
        """Give up its copy, now or as soon as its last reply is done."""
        self._tier.forget(adapter)

    def _put(self, adapter: Any) -> Place[Any, Any]:
        if self._copy is None:
            return self._tier.put(adapter, adapter)
        begin = monotonic()
        place = self._tier.put(adapter, self._copy(adapter), adapter.size_bytes)
        self._copying = self._copying.and_one(monotonic() - begin)
        return place

    def _has_room(self, adapter: Any) -> bool:
        if len(self._in_use) >= self.count:
            return False
        if self._copy is None or adapter in self._tier:
            return True
        # One that is larger than all the room there is may take part alone.
        return self._tier.make_room(min(adapter.size_bytes, self._tier.capacity))
