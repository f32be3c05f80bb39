"""Who is let in, on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repertory.errors import InvalidInput, TooManyRequests, Unavailable
from repertory.service.admission import MANY, Admission
from repertory.service.organisations import Limits

FREE = Limits(concurrent_generations=1000)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limits(**changes: int) -> Limits:
    return FREE.model_copy(update=changes)


def test_requests_beyond_a_minutes_worth_are_refused_until_the_bucket_has_one_again(clock: Clock) -> None:
    admission, six = Admission(100, clock), limits(requests_per_minute=6)
    for _ in range(6):
        with admission.admit("a", six):
            pass
    with pytest.raises(TooManyRequests) as refused, admission.admit("a", six):
        pass
    assert refused.value.retry_after_seconds == pytest.approx(10.0)
    with admission.admit("b", six):  # nobody else is concerned
        pass
    clock.now += 9.9
    with pytest.raises(TooManyRequests), admission.admit("a", six):
        pass
    clock.now += 0.1
    with admission.admit("a", six):
        pass
    assert admission.refusals["requests_per_minute"] == 2


def test_a_reply_is_not_cut_off_but_what_it_took_too_much_is_made_up(clock: Clock) -> None:
    admission, sixty = Admission(100, clock), limits(tokens_per_minute=60)
    with admission.admit("a", sixty) as admitted:
        admitted.charge(50)
        admitted.charge(49)
    with pytest.raises(TooManyRequests) as refused, admission.admit("a", sixty):
        pass
    assert refused.value.retry_after_seconds == pytest.approx(40.0)  # 99 - 60 owed, and one to take


@settings(deadline=None)
@given(
    per_minute=st.integers(1, 600),
    moves=st.lists(st.tuples(st.floats(0, 90), st.integers(0, 900)), min_size=1, max_size=30),
    of_tokens=st.booleans(),
)
def test_who_comes_again_when_told_is_let_in(per_minute: int, moves: list[tuple[float, int]], of_tokens: bool) -> None:
    """And nobody a moment earlier: the time is neither too short nor too long."""
    clock = Clock()
    name = "tokens_per_minute" if of_tokens else "requests_per_minute"
    admission, limited = Admission(100, clock), limits(**{name: per_minute})
    for seconds, tokens in moves:
        clock.now += seconds
        wait = refusal(admission, limited, tokens)
        if wait is not None:
            clock.now += wait - min(0.01, wait / 2)
            assert refusal(admission, limited, tokens) is not None
            clock.now += min(0.01, wait / 2) + 1e-6
            assert refusal(admission, limited, tokens) is None


def refusal(admission: Admission, limited: Limits, tokens: int) -> float | None:
    """Seconds after which to come again; None: it was let in."""
    try:
        with admission.admit("a", limited) as admitted:
            admitted.charge(tokens)
    except TooManyRequests as refused:
        return refused.retry_after_seconds
    return None


def test_places_of_an_organisation_are_limited_and_free_again_when_it_leaves(clock: Clock) -> None:
    admission, two = Admission(100, clock), limits(concurrent_generations=2)
    with admission.admit("a", two):
        clock.now += 4.0
    with admission.admit("a", two), admission.admit("a", two):
        with pytest.raises(TooManyRequests) as refused, admission.admit("a", two):
            pass
        assert refused.value.retry_after_seconds == pytest.approx(2.0)  # two places, each held for 4 seconds
        with admission.admit("b", two, generations=2):
            pass
    with admission.admit("a", two, generations=2), pytest.raises(TooManyRequests), admission.admit("a", two):
        pass
    with pytest.raises(InvalidInput) as never, admission.admit("a", two, generations=3):
        pass
    assert never.value.param == "n"


def test_without_a_limit_of_its_own_an_organisation_leaves_places_to_others(clock: Clock) -> None:
    admission = Admission(4, clock)
    with admission.admit("a", Limits(), generations=2):
        with pytest.raises(TooManyRequests), admission.admit("a", Limits()):
            pass
        with admission.admit("b", Limits(), generations=2):
            pass


def test_a_place_is_free_again_whatever_ended_the_reply(clock: Clock) -> None:
    admission, one = Admission(100, clock), limits(concurrent_generations=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.admit("a", one):
            raise ZeroDivisionError


def test_all_together_are_bounded_and_that_is_nobodys_fault(clock: Clock) -> None:
    admission = Admission(3, clock)
    with admission.admit("a", FREE), admission.admit("b", FREE), admission.admit("c", FREE):
        clock.now += 6.0
        with pytest.raises(Unavailable) as refused, admission.admit("d", FREE):
            pass
    assert refused.value.code == "overloaded"
    assert refused.value.retry_after_seconds == pytest.approx(2.0)  # three for six seconds, and none has ended yet
    assert admission.refusals == {
        "concurrent_generations": 0,
        "requests_per_minute": 0,
        "tokens_per_minute": 0,
        "overload": 1,
    }


def test_where_nobody_is_let_in_that_is_known_before_anything_else_is(clock: Clock) -> None:
    admission = Admission(1, clock)
    admission.check_room()
    with admission.admit("a", FREE):
        clock.now += 6.0
        with pytest.raises(Unavailable) as refused:
            admission.check_room()
        assert refused.value.retry_after_seconds == pytest.approx(6.0)
    admission.check_room()
    assert admission.refusals["overload"] == 1


def test_a_refused_request_takes_nothing(clock: Clock) -> None:
    admission, limited = Admission(1, clock), limits(requests_per_minute=2)
    with admission.admit("a", limited):
        for _ in range(5):
            with pytest.raises(Unavailable), admission.admit("a", limited):
                pass
    with admission.admit("a", limited):
        pass


def test_organisations_without_anything_to_remember_are_forgotten(clock: Clock) -> None:
    admission, limited = Admission(100, clock), limits(requests_per_minute=1)
    with admission.admit("spent", limited), admission.admit("stays", FREE):
        for number in range(3 * MANY):
            with admission.admit(f"org{number}", FREE):
                pass
        assert len(admission._uses) <= MANY
    with pytest.raises(TooManyRequests), admission.admit("spent", limited):
        pass
