from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from repertory.model.tier import Place, Tier

CAPACITY = 10
KEYS = st.sampled_from("abcdef")


def test_the_least_recently_used_leaves_first_and_no_more_than_must() -> None:
    gone: list[str] = []
    tier: Tier[str, int] = Tier(CAPACITY, lambda place: gone.append(place.key))
    for key in "abcd":
        tier.release(tier.put(key, 0, size=2))
    used = tier.take("a")
    assert used is not None
    tier.release(used)
    assert tier.make_room(4)
    assert gone == ["b"]
    assert tier.evictions == 1


def test_what_is_in_use_stays_and_nothing_is_put_out_in_vain() -> None:
    gone: list[str] = []
    tier: Tier[str, int] = Tier(CAPACITY, lambda place: gone.append(place.key))
    tier.put("in use", 0, size=6)
    tier.release(tier.put("idle", 0, size=4))
    assert not tier.make_room(5)
    assert gone == []
    assert tier.make_room(4)
    assert gone == ["idle"]


def test_what_is_forgotten_in_use_is_gone_at_its_last_release_and_counts_until_then() -> None:
    gone: list[Place[str, int]] = []
    tier: Tier[str, int] = Tier(CAPACITY, gone.append)
    first = tier.put("a", 1, size=6)
    assert tier.take("a") is first
    tier.forget("a")
    tier.forget("a")
    assert tier.take("a") is None
    again = tier.put("a", 2, size=3)  # the same key anew, beside it
    tier.release(first)
    assert (gone, tier.used) == ([], 9)
    tier.release(first)
    assert (gone, tier.used) == ([first], 3)
    tier.release(again)
    assert tier.take("a") is again


class TierMachine(RuleBasedStateMachine):
    """Whatever is done in whatever order: nothing in use is lost, and what is counted is what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: list[Place[str, object]] = []
        self.tier: Tier[str, object] = Tier(CAPACITY, self.gone.append)
        self.held: list[Place[str, object]] = []  # once for each use
        self.seen: set[Place[str, object]] = set()

    @rule(key=KEYS, size=st.integers(0, 4))
    def want(self, key: str, size: int) -> None:
        place = self.tier.take(key)
        if place is None and self.tier.make_room(size):
            place = self.tier.put(key, object(), size)
        if place is not None:
            self.held.append(place)
            self.seen.add(place)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.tier.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        self.tier.forget(key)
        assert key not in self.tier

    @invariant()
    def it_keeps_within_its_room(self) -> None:
        assert self.tier.used <= CAPACITY

    @invariant()
    def it_counts_what_is_there_and_what_is_still_in_use(self) -> None:
        alive = set(self.tier.places) | set(self.held)
        assert self.tier.used == sum(place.size for place in alive)
        assert all(place.users == self.held.count(place) for place in alive)

    @invariant()
    def each_is_gone_once_and_never_while_in_use(self) -> None:
        assert len(self.gone) == len(set(self.gone))
        assert set(self.gone) == self.seen - set(self.tier.places) - set(self.held)


TestTier = TierMachine.TestCase
TestTier.settings = settings(deadline=None)
