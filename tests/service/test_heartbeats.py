from __future__ import annotations

import pytest

from repertory.service.heartbeats import HEARTBEAT_SECONDS, LEASE_SECONDS, LONGEST_PAUSE_SECONDS, Heartbeats
from repertory.service.jobs import Pulse


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def pulse(heartbeat: int = 1, epoch: int = 1) -> Pulse:
    return Pulse(job_id="train_1", lease_owner="them", lease_epoch=epoch, heartbeat=heartbeat)


def looked(pulses: list[Pulse], every_seconds: float = HEARTBEAT_SECONDS) -> list[float]:
    """The seconds after the first look at which the lease was found lapsed, one look for each pulse."""
    clock = Clock()
    heartbeats = Heartbeats(clock)
    found = []
    for number, one in enumerate(pulses):
        if heartbeats.lapsed([one]):
            found.append(number * every_seconds)
        clock.seconds += every_seconds
    return found


def test_a_heart_that_stands_still_has_stopped_after_the_time_of_a_lease() -> None:
    assert looked([pulse()] * 8) == [LEASE_SECONDS, LEASE_SECONDS + 2, LEASE_SECONDS + 4]


def test_a_heart_that_beats_however_slowly_lives() -> None:
    slowly = [pulse(heartbeat=number // 4) for number in range(40)]
    assert looked(slowly) == []


def test_a_new_claim_is_a_new_life() -> None:
    assert looked([pulse(epoch=1)] * 4 + [pulse(epoch=2)] * 4) == []


@pytest.mark.fault("F20")
def test_time_in_which_nobody_looked_does_not_count() -> None:
    """The process was stopped, the machine slept, or the database was away: then others could not beat either."""
    assert looked([pulse()] * 40, every_seconds=LONGEST_PAUSE_SECONDS + 0.1) == []


@pytest.mark.fault("F20")
def test_no_time_of_day_is_asked_for() -> None:
    """Two processes see the same beats at other times of day, and come to the same end."""
    early, late = Clock(), Clock()
    late.seconds -= 7200.0
    for clock in (early, late):
        heartbeats = Heartbeats(clock)
        found = []
        for _ in range(6):
            found = heartbeats.lapsed([pulse()])
            clock.seconds += HEARTBEAT_SECONDS
        assert found == [pulse()]
