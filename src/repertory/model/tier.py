"""A bounded place in which things stay after use, in case they are wanted again. No torch here.

What is in use stays; of the rest the least recently used leaves first. A host has two for its voices: its memory, whose
room is bytes, and the slots of its batch, whose room is a number of voices.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(eq=False)
class Place(Generic[K, V]):
    """Something in a tier. It counts against the tier's room until it has left and nobody uses it any more."""

    key: K
    value: V
    size: int
    users: int = 1
    has_left: bool = False


class Tier(Generic[K, V]):
    def __init__(self, capacity: int, on_gone: Callable[[Place[K, V]], None] = lambda place: None) -> None:
        """`on_gone` hears of everything that has left and is no longer used."""
        self.capacity = capacity
        self.used = 0  # the sizes of all that is here, and of what has left and is still in use
        self.evictions = 0
        self._on_gone = on_gone
        self._places: OrderedDict[K, Place[K, V]] = OrderedDict()  # the least recently used comes first

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: K) -> bool:
        return key in self._places

    @property
    def places(self) -> list[Place[K, V]]:
        return list(self._places.values())

    def take(self, key: K) -> Place[K, V] | None:
        """To use it until `release`, if it is here."""
        place = self._places.get(key)
        if place is not None:
            self._places.move_to_end(key)
            place.users += 1
        return place

    def put(self, key: K, value: V, size: int = 0) -> Place[K, V]:
        """Something that is not here yet, in use until `release`. It is taken in even where there is no room."""
        assert key not in self._places
        place = self._places[key] = Place(key, value, size)
        self.used += size
        return place

    def resize(self, place: Place[K, V], size: int) -> None:
        self.used += size - place.size
        place.size = size

    def release(self, place: Place[K, V]) -> None:
        place.users -= 1
        if not place.has_left:
            self._places.move_to_end(place.key)
        elif not place.users:
            self._end(place)

    def make_room(self, size: int) -> bool:
        """Put out what nobody uses until `size` more fits. False, and nothing is put out, if it cannot fit now."""
        idle = [place for place in self._places.values() if not place.users]
        if self.used - sum(place.size for place in idle) + size > self.capacity:
            return False
        for place in idle:
            if self.used + size <= self.capacity:
                break
            self.evictions += place.size > 0
            self._leave(place)
        return True

    def forget(self, key: K) -> None:
        """Those who use it keep it until they release it; the next one finds nothing."""
        if key in self._places:
            self._leave(self._places[key])

    def _leave(self, place: Place[K, V]) -> None:
        del self._places[place.key]
        place.has_left = True
        if not place.users:
            self._end(place)

    def _end(self, place: Place[K, V]) -> None:
        self.used -= place.size
        self._on_gone(place)
