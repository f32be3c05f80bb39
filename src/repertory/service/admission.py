"""Which requests for replies are let in: within the limits of their organisation, and within a bound on them all.

Whoever is refused is told when to come again: when a bucket has refilled, or when a place should be free if places are
held for as long as of late. Nothing here waits or locks: everything runs on the event loop. Each service process counts
for itself, so two processes on one database let in twice as much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from time import monotonic

from repertory.errors import InvalidInput, TooManyRequests, Unavailable
from repertory.service.organisations import Limits

MANY = 1000  # organisations; beyond, those that have nothing to remember are forgotten
PACE_SAMPLES = 32
REFUSED = ("concurrent_generations", "requests_per_minute", "tokens_per_minute", "overload")  # why a request can be

Clock = Callable[[], float]


class Bucket:
    """A minute's worth that refills steadily. More than is in it may be taken, and has to be made up first."""

    def __init__(self) -> None:
        self._taken = 0.0  # and not refilled yet
        self._at = 0.0  # then

    def wait_seconds(self, per_minute: int, now: float) -> float:
        """Until there is one to take; 0.0: now."""
        self._refill(per_minute, now)
        return max(0.0, (self._taken + 1 - per_minute) / (per_minute / 60))

    def take(self, count: int, per_minute: int, now: float) -> None:
        self._refill(per_minute, now)
        self._taken += count

    def is_full(self, per_minute: int, now: float) -> bool:
        self._refill(per_minute, now)
        return self._taken == 0

    def _refill(self, per_minute: int, now: float) -> None:
        self._taken = max(0.0, self._taken - (now - self._at) * per_minute / 60)
        self._at = now


class Places:
    """How many are taken, and for how long."""

    def __init__(self) -> None:
        self.taken = 0
        self._held: deque[float] = deque(maxlen=PACE_SAMPLES)  # seconds, each of the last that became free
        self._busy_since = 0.0

    def take(self, count: int, now: float) -> None:
        if not self.taken:
            self._busy_since = now
        self.taken += count

    def free(self, count: int, held_seconds: float) -> None:
        self.taken -= count
        self._held.extend([held_seconds] * count)

    def wait_seconds(self, count: int, now: float) -> float:
        """Until so many more are free, if they are held as long as of late; before one was free, as long as so far."""
        usual = fmean(self._held) if self._held else now - self._busy_since
        return count * usual / max(1, self.taken)


@dataclass(eq=False)
class _Use:
    """What one organisation has taken."""

    places: Places = field(default_factory=Places)
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    limits: Limits | None = None  # as they were when it last asked

    def is_forgettable(self, now: float) -> bool:
        """Whether a new one would allow the same."""
        limits = self.limits
        return not self.places.taken and (
            limits is None
            or (
                (limits.requests_per_minute is None or self.requests.is_full(limits.requests_per_minute, now))
                and (limits.tokens_per_minute is None or self.tokens.is_full(limits.tokens_per_minute, now))
            )
        )


@dataclass(frozen=True, eq=False)
class Admitted:
    """A request that was let in."""

    _use: _Use
    _tokens_per_minute: int | None
    _clock: Clock

    def charge(self, tokens: int) -> None:
        """So many more have been read or written for it."""
        if self._tokens_per_minute is not None:
            self._use.tokens.take(tokens, self._tokens_per_minute, self._clock())


class Admission:
    def __init__(self, max_generations: int, clock: Clock = monotonic) -> None:
        """`max_generations`: replies in the making and waiting for it, of all organisations together."""
        self._max = max_generations
        self._clock = clock
        self._all = Places()
        self._uses: dict[str, _Use] = {}
        self.refusals = dict.fromkeys(REFUSED, 0)

    @property
    def taken(self) -> int:
        return self._all.taken

    def check_room(self) -> None:
        """Raises Unavailable if nobody is let in now, whoever asks for what."""
        self._check_all(1, self._clock())

    @contextmanager
    def admit(self, org_id: str, limits: Limits, generations: int = 1) -> Iterator[Admitted]:
        """Let a request for so many replies in, which holds their places until it leaves.

        Raises TooManyRequests or Unavailable with the time to come again, and InvalidInput if there never are as many.
        """
        now = self._clock()
        use = self._use_of(org_id, now)
        use.limits = limits
        self._check(use, limits, generations, now)
        if limits.requests_per_minute is not None:
            use.requests.take(1, limits.requests_per_minute, now)
        use.places.take(generations, now)
        self._all.take(generations, now)
        try:
            yield Admitted(use, limits.tokens_per_minute, self._clock)
        finally:
            held_seconds = self._clock() - now
            use.places.free(generations, held_seconds)
            self._all.free(generations, held_seconds)

    def _check(self, use: _Use, limits: Limits, generations: int, now: float) -> None:
        # Where nobody has set a limit, one organisation alone leaves places to the others.
        own = limits.concurrent_generations or max(1, self._max // 2)
        if generations > min(own, self._max):
            raise InvalidInput(
                f"The request asks for {generations} replies at once, and {min(own, self._max)} are allowed.",
                code="too_many_replies",
                cure="Ask for fewer replies, in several requests.",
                param="n",
            )
        if limits.requests_per_minute is not None:
            wait = use.requests.wait_seconds(limits.requests_per_minute, now)
            if wait > 0:
                self._refuse(wait, "requests_per_minute", f"{limits.requests_per_minute} requests a minute")
        if limits.tokens_per_minute is not None:
            wait = use.tokens.wait_seconds(limits.tokens_per_minute, now)
            if wait > 0:
                self._refuse(wait, "tokens_per_minute", f"{limits.tokens_per_minute} tokens a minute")
        missing = use.places.taken + generations - own
        if missing > 0:
            wait = use.places.wait_seconds(missing, now)
            self._refuse(wait, "concurrent_generations", f"{own} replies at once")
        self._check_all(generations, now)

    def _check_all(self, generations: int, now: float) -> None:
        missing = self._all.taken + generations - self._max
        if missing > 0:
            self.refusals["overload"] += 1
            raise Unavailable(
                f"The service is overloaded: {self._all.taken} replies are in the making or wait for it.",
                code="overloaded",
                retry_after_seconds=self._all.wait_seconds(missing, now),
            )

    def _refuse(self, wait_seconds: float, reason: str, limit: str) -> None:
        self.refusals[reason] += 1
        raise TooManyRequests(f"This organisation has reached its limit of {limit}.", retry_after_seconds=wait_seconds)

    def _use_of(self, org_id: str, now: float) -> _Use:
        use = self._uses.get(org_id)
        if use is None:
            if len(self._uses) >= MANY:
                self._uses = {one: had for one, had in self._uses.items() if not had.is_forgettable(now)}
            use = self._uses[org_id] = _Use()
        return use
