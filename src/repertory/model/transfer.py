"""How one transfer over HTTP goes: what is waited for, what is tried again, what is kept, and how far it has come."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from repertory.contracts import Download
from repertory.errors import RepertoryError

ATTEMPTS = 5  # in a row that bring nothing to speak of
FIRST_BACKOFF_SECONDS = 0.5  # doubles with each of them
LONGEST_RETRY_AFTER_SECONDS = 60.0  # a server that asks for more is told of, not waited for
FRUITFUL_BYTES = 1 << 16  # an attempt that brings this much is no failure, however it ends
SLOWEST_BYTES_PER_SECOND = 1024  # over the time-out; below, a connection counts as stalled
TELL_SECONDS = 0.5
PASSING = {408, 429, 500, 502, 503, 504}  # statuses that may be others in a while

Tell = Callable[[Download], None]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a server is waited for."""

    timeout_seconds: float  # in which it must bring something
    attempts: int = ATTEMPTS  # in a row that bring nothing to speak of
    until: float = math.inf  # time.monotonic() at which everything must be over


class Refused(Exception):
    """A status that may be another one in a while."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(str(response.status_code))
        self.status = response.status_code
        told = response.headers.get("retry-after", "")
        self.retry_after = float(told) if told.isdigit() and len(told) < 10 else 0.0


class Stalled(Exception):
    """A connection that brings a byte now and then, or whose time is over."""


@dataclass
class Attempts:
    """Repeats what the network breaks. Only attempts that bring nothing are counted against it."""

    patience: Patience
    exhausted: Callable[[Exception], RepertoryError]  # what is raised after the last of them
    fruitless: int = 0
    is_done: bool = False
    bytes_brought: int = 0
    wait_seconds: float = 0.0

    def go_on(self) -> bool:
        if not self.is_done and self.wait_seconds:
            time.sleep(self.wait_seconds)
        return not self.is_done

    def brought(self, count: int) -> None:
        self.bytes_brought += count

    @contextmanager
    def tried(self) -> Iterator[None]:
        """One attempt. Raises what `exhausted` returns after the last one."""
        self.bytes_brought = 0
        try:
            yield
        except (httpx.RequestError, Refused, Stalled) as error:
            self.fruitless = 0 if self.bytes_brought >= FRUITFUL_BYTES else self.fruitless + 1
            asked = error.retry_after if isinstance(error, Refused) else 0.0
            self.wait_seconds = max(asked, FIRST_BACKOFF_SECONDS * 2 ** max(self.fruitless - 1, 0))
            is_over = time.monotonic() + self.wait_seconds > self.patience.until
            if is_over or self.fruitless >= self.patience.attempts or asked > LONGEST_RETRY_AFTER_SECONDS:
                raise self.exhausted(error) from error
        else:
            self.is_done = True


@dataclass
class Progress:
    """Tells of a download twice a second at the most."""

    commit: str
    total: int
    tell: Tell = lambda download: None
    done: int = 0
    began: float = field(default_factory=time.monotonic)
    fresh: int = 0  # bytes since it began
    told: float = 0.0

    def add(self, count: int) -> None:
        self.done += count
        self.fresh = max(self.fresh + count, 0)
        now = time.monotonic()
        if now - self.told >= TELL_SECONDS or self.done == self.total:
            self.told = now
            rate = self.fresh / max(now - self.began, 0.1)
            left = (self.total - self.done) / rate if rate else None
            self.tell(
                Download(
                    revision=self.commit,
                    bytes_done=self.done,
                    bytes_total=self.total,
                    bytes_per_second=rate,
                    eta_seconds=left,
                )
            )


def body(response: httpx.Response, patience: Patience) -> Iterator[bytes]:
    """Its bytes as they come. Raises Stalled where they come too slowly to be worth the connection, or too late."""
    since, count = time.monotonic(), 0
    for chunk in response.iter_bytes():
        yield chunk
        count += len(chunk)
        now = time.monotonic()
        if now > patience.until:
            raise Stalled
        if now - since >= patience.timeout_seconds:
            if count < SLOWEST_BYTES_PER_SECOND * (now - since):
                raise Stalled
            since, count = now, 0


def append(
    response: httpx.Response, part: Path, begun: int, size: int, patience: Patience, came: Callable[[int], None]
) -> None:
    """Write what comes into `part`, from byte `begun` on, to `size` bytes in all; they are on disk when it returns.

    `came` hears how many bytes each piece has. Raises RemoteProtocolError where the connection ends before the file is
    whole, and OSError.
    """
    with part.open("r+b" if begun else "wb") as out:
        out.seek(begun)
        for chunk in body(response, patience):
            begun += len(chunk)
            if begun > size:
                break  # who checks the file sees to it
            out.write(chunk)
            came(len(chunk))
        out.flush()
        os.fsync(out.fileno())
    if begun < size:
        raise httpx.RemoteProtocolError("the connection was closed before the file was whole")
