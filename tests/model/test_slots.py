from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repertory.model.slots import Slots


@dataclass(eq=False)
class Voice:
    """As an adapter, to slots."""

    name: str
    size_bytes: int = 1


@dataclass(eq=False)
class Waiting:
    """As a sequence, to slots."""

    adapter: Any
    slot: Any = None
    voice: Any = field(init=False)

    def __post_init__(self) -> None:
        self.voice = self.adapter


def join(slots: Slots, *waiting: Waiting) -> Waiting | None:
    chosen = slots.first(waiting)  # type: ignore[arg-type]
    if chosen is not None:
        slots.enter(chosen)
    return chosen  # type: ignore[return-value]


def test_as_many_voices_as_slots_take_part_and_the_bare_base_always() -> None:
    slots = Slots(2)
    a, b, c = (Voice(name) for name in "abc")
    first, second = Waiting(a), Waiting(b)
    assert join(slots, first) is first
    assert join(slots, second) is second
    assert join(slots, Waiting(c)) is None
    assert join(slots, Waiting(None)) is not None
    assert slots.voice_count == 2
    slots.leave(first)
    assert join(slots, Waiting(c)) is not None


def test_a_voice_that_has_a_slot_is_let_in_before_one_that_waits_for_one() -> None:
    slots = Slots(2)
    a, b, c = (Voice(name) for name in "abc")
    join(slots, Waiting(a))
    join(slots, Waiting(b))
    of_b = Waiting(b)
    assert join(slots, Waiting(c), of_b) is of_b


def test_the_voice_that_was_there_first_takes_no_newcomers_while_another_waits() -> None:
    """Else one voice with enough requests would keep its slot for ever."""
    slots = Slots(2)
    a, b, c = (Voice(name) for name in "abc")
    of_a = Waiting(a)
    join(slots, of_a)
    join(slots, Waiting(b))
    waits = Waiting(c)
    assert join(slots, waits, Waiting(a)) is None
    another_of_a = Waiting(a)
    assert join(slots, another_of_a) is another_of_a  # nobody waits
    slots.leave(of_a)
    assert join(slots, waits, Waiting(a)) is None
    slots.leave(another_of_a)
    assert join(slots, waits, Waiting(a)) is waits


def test_who_waits_for_a_slot_is_not_overtaken_by_a_smaller_voice() -> None:
    slots = Slots(4, limit_bytes=10, copy=lambda voice: voice)
    small, large, other = Voice("small", 4), Voice("large", 9), Voice("other", 4)
    of_small = Waiting(small)
    join(slots, of_small)
    waits = Waiting(large)
    assert join(slots, waits, Waiting(other)) is None
    slots.leave(of_small)
    assert join(slots, waits, Waiting(other)) is waits


def test_a_copy_stays_until_its_room_is_needed_or_it_is_forgotten() -> None:
    copied: list[str] = []

    def copy(voice: Voice) -> Voice:
        copied.append(voice.name)
        return Voice(voice.name.upper())

    slots = Slots(4, limit_bytes=2, copy=copy)
    a, b, c = (Voice(name) for name in "abc")
    for voice in (a, b, a):
        sequence = Waiting(voice)
        assert join(slots, sequence) is sequence
        assert sequence.adapter.name == voice.name.upper()
        slots.leave(sequence)
    assert copied == ["a", "b"]
    for voice in (c, a, b):  # c takes the room of b, then b that of c
        sequence = Waiting(voice)
        join(slots, sequence)
        slots.leave(sequence)
    assert copied == ["a", "b", "c", "b"]
    slots.forget(a)
    join(slots, Waiting(a))
    assert copied[-1] == "a"


def test_a_voice_larger_than_all_the_room_takes_part_alone() -> None:
    slots = Slots(4, limit_bytes=2, copy=lambda voice: voice)
    huge, small = Voice("huge", 5), Waiting(Voice("small"))
    join(slots, small)
    waits = Waiting(huge)
    assert join(slots, waits) is None
    slots.leave(small)
    assert join(slots, waits) is waits
    assert join(slots, Waiting(Voice("other"))) is None


def test_who_never_entered_leaves_nothing() -> None:
    slots = Slots(1)
    slots.leave(Waiting(Voice("a")))  # type: ignore[arg-type]
    assert slots.voice_count == 0


@pytest.mark.parametrize("copies", [True, False])
@settings(deadline=None)
@given(count=st.integers(1, 3), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=6), seed=st.integers())
def test_nobody_waits_for_longer_than_for_the_replies_before(
    copies: bool, count: int, sizes: list[int], seed: int
) -> None:
    """Voices that always have another request, taking turns: each is answered again and again, whatever the lengths."""
    chance = random.Random(seed)
    voices = [Voice(str(at), size) for at, size in enumerate(sizes)]
    slots = Slots(count, 4, (lambda voice: voice) if copies else None)
    line = deque(voices)
    running: list[tuple[int, Waiting]] = []  # with the step in which each ends
    last_answer = dict.fromkeys(voices, 0)
    longest, rows = 5, 4
    for step in range(200):
        for ends, sequence in [one for one in running if one[0] <= step]:
            slots.leave(sequence)  # type: ignore[arg-type]
            running.remove((ends, sequence))
        while len(running) < rows and (sequence := join(slots, *(Waiting(voice) for voice in line))):
            line.remove(sequence.voice)
            line.append(sequence.voice)
            last_answer[sequence.voice] = step
            running.append((step + chance.randint(1, longest), sequence))
        assert slots.voice_count <= count
        assert len({sequence.voice for _, sequence in running}) == slots.voice_count
        # Whoever stands before it in the line is served at most once more, each time for as long as the longest reply.
        assert all(step - last <= (len(voices) + rows) * longest for last in last_answer.values())
