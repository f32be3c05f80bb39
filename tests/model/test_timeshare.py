"""Who has the device, on a clock that is only counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pytest

from repertory.model.timeshare import TimeShare, Turn

STEP = 0.1  # seconds


def timeline(
    timeshare: TimeShare, quanta: Iterable[float], requests: Iterable[bool], step: float = STEP
) -> list[tuple[Turn, float]]:
    """What happens while training always has work: turns and their seconds, one for each of `requests`."""
    lengths: Iterator[float] = iter(quanta)
    happened: list[tuple[Turn, float]] = []
    for waiting in requests:
        turn = timeshare.next(requests=waiting, training=True)
        assert turn is not None
        seconds = step if turn == "serving" else next(lengths)
        timeshare.took(seconds)
        happened.append((turn, seconds))
    return happened


def seconds_of(turn: Turn, happened: list[tuple[Turn, float]]) -> float:
    return sum(seconds for whose, seconds in happened if whose == turn)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.2, 0.3, 0.6])
@pytest.mark.parametrize("quanta", [[1.0], [0.4, 0.9], [0.001], [3.0, 0.01, 0.02]])
def test_training_has_its_share_while_requests_run(share: float, quanta: list[float]) -> None:
    happened = timeline(TimeShare(share), itertools.cycle(quanta), [True] * 20_000)
    trained, served = seconds_of("training", happened), seconds_of("serving", happened)
    owed = share * (trained + served)
    # Behind by no more than what is being earned; never far ahead. Tiny quanta are bound by the step between two.
    assert trained <= owed + max(quanta)
    assert trained >= min(owed - max(quanta) - STEP, 0.9 * served * min(quanta) / STEP)


def test_no_gap_is_longer_than_a_quantum_and_a_step() -> None:
    happened = timeline(TimeShare(0.5), itertools.cycle([0.5, 1.0, 0.1]), [True] * 5_000)
    assert ("training", 1.0) in happened
    assert all("serving" in (one, other) for (one, _), (other, _) in itertools.pairwise(happened))


def test_all_of_the_device_is_training_s_where_nobody_waits() -> None:
    assert {turn for turn, _ in timeline(TimeShare(0.2), itertools.repeat(1.0), [False] * 100)} == {"training"}


def test_a_request_meets_no_quantum_that_is_not_earned_yet() -> None:
    """At a share of 0.2 a quantum of a second takes four of serving."""
    timeshare = TimeShare(0.2)
    timeline(timeshare, itertools.repeat(1.0), [False] * 10)
    happened = timeline(timeshare, itertools.repeat(1.0), [True] * 60)
    assert [turn for turn, _ in happened[:39]] == ["serving"] * 39
    assert [turn for turn, _ in happened].index("training") in (40, 41)  # sums of tenths are not exact


def test_short_requests_cannot_keep_training_from_its_share() -> None:
    """What a request has earned counts when the next one comes."""
    timeshare = TimeShare(0.2)
    requests = ([True] * 5 + [False]) * 2_000  # half a second each, and a moment's pause in which training may go on
    happened = timeline(timeshare, itertools.repeat(1.0), requests)
    contended = [one for one, waiting in zip(happened, requests, strict=True) if waiting]
    share = seconds_of("training", contended) / sum(seconds for _, seconds in contended)
    assert share == pytest.approx(0.2, abs=0.01)


def test_what_took_longer_than_expected_is_served_off() -> None:
    timeshare = TimeShare(0.2)
    happened = timeline(timeshare, itertools.chain([0.1] * 5, [8.0], itertools.repeat(0.1)), [True] * 1_000)
    long = happened.index(("training", 8.0))
    after = [turn for turn, _ in happened[long + 1 :]]
    assert after.index("training") * STEP == pytest.approx(8.0 * 4, abs=1)


def test_a_share_of_nothing_waits_until_nobody_waits() -> None:
    timeshare = TimeShare(0.0)
    assert {turn for turn, _ in timeline(timeshare, [], [True] * 1_000)} == {"serving"}
    assert timeshare.next(requests=False, training=True) == "training"


def test_nobody_s_turn() -> None:
    timeshare = TimeShare(0.2)
    assert timeshare.next(requests=False, training=False) is None
    assert timeshare.next(requests=True, training=False) == "serving"
