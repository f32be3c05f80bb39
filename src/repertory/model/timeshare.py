"""Who has the device next, those who wait for replies or training. Plain Python: it is told what took how long."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

REMEMBERED = 9  # quanta: a few micro-batches, each forward, backward and some of them a step of the optimizer

Turn = Literal["serving", "training"]


class TimeShare:
    """Serving goes first. While both have work, training has `share` of the device's time; else all of it.

    Training goes in quanta that nobody can cut short, so one begins only when serving has gone on long enough to have
    earned it, if it is as long as they usually are: a request that is answered before then meets none. After a quantum
    comes a step of serving, whatever was earned: no gap between two tokens is longer than a quantum and a step.
    """

    def __init__(self, share: float) -> None:
        """`share` in [0, 1). At 0 training waits until nobody waits for a reply."""
        self.share = share
        self._turn: Turn | None = None
        self._is_contended = False
        self._earned = 0.0  # seconds of training; below 0 where a quantum took longer than usual
        self._quanta: deque[float] = deque(maxlen=REMEMBERED)  # seconds that they took

    def next(self, *, requests: bool, training: bool) -> Turn | None:
        """Whose turn it is, of those who have work; None: nobody's. Tell with `took` when it is over."""
        self._is_contended = requests and training
        if self._is_contended:
            is_due = self._turn == "serving" and self._earned > 0 and self._earned >= self._usual_quantum
            self._turn = "training" if is_due else "serving"
        elif requests or training:
            self._turn = "serving" if requests else "training"
        else:
            self._turn = None
        return self._turn

    def took(self, seconds: float) -> None:
        """The turn that `next` gave is over."""
        if self._turn == "training":
            self._quanta.append(seconds)
        if not self._is_contended:
            return
        if self._turn == "training":
            self._earned -= seconds
        else:  # so that training / (training + serving) becomes the share
            self._earned += seconds * self.share / (1 - self.share)

    @property
    def _usual_quantum(self) -> float:
        return statistics.median(self._quanta) if self._quanta else 0.0
