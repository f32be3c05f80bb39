"""Which leases have lapsed, judged by what is seen and by nobody's clock.

Whoever holds a lease makes the job's heartbeat grow. Clocks of two machines differ, and each may jump, so no time of
day is compared: a lease has lapsed once its heartbeat has not grown for LEASE_SECONDS of our own uninterrupted looking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic

from repertory.service.jobs import Pulse

HEARTBEAT_SECONDS = 2.0
LEASE_SECONDS = 10.0  # five heartbeats missed
LONGEST_PAUSE_SECONDS = 5.0  # between two looks


class Heartbeats:
    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._since: dict[Pulse, float] = {}  # when each pulse was first seen, by our clock
        self._looked_at = clock()

    def lapsed(self, pulses: Iterable[Pulse]) -> list[Pulse]:
        """Of the pulses as they are now, those of leases that have lapsed."""
        now = self._clock()
        if now - self._looked_at > LONGEST_PAUSE_SECONDS:
            self._since.clear()  # we slept, or the database was away: then others could not beat either
        self._looked_at = now
        self._since = {pulse: self._since.get(pulse, now) for pulse in pulses}
        return [pulse for pulse, since in self._since.items() if now - since >= LEASE_SECONDS]
