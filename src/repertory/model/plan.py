"""What a run will do, fixed before it begins; and how much of it is done."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

from repertory.data.render import Row
from repertory.model.hyperparameters import TrainConfig
from repertory.model.microbatch import common_prefix, grouped

RECENT_STEPS = 20  # over which speed is averaged


class Plan:
    """Which rows go through which optimizer step, in which micro-batches: a pure function of rows, config and seed."""

    def __init__(self, rows: Sequence[Row], config: TrainConfig) -> None:
        self.rows = rows
        self.config = config
        self.prefix = common_prefix(rows)
        self.steps_per_epoch = math.ceil(len(rows) / config.effective_batch_rows)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def rows_of(self, step: int) -> list[int]:
        """Indices of the rows of optimizer step 1..total_steps."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        size = self.config.effective_batch_rows
        return self._order(epoch)[within * size : (within + 1) * size]

    def microbatches(self, step: int) -> list[list[int]]:
        return grouped(self.rows, self.rows_of(step), self.config.suffix_tokens, self.prefix)

    def tokens_of(self, step: int) -> int:
        """Tokens of the step's rows as they were sent, a shared prefix counted for each of them."""
        return sum(len(self.rows[at].input_ids) for at in self.rows_of(step))

    def computed_tokens(self, step: int) -> int:
        """Tokens that really go through the model."""
        suffixes = self.tokens_of(step) - self.prefix * len(self.rows_of(step))
        return suffixes + self.prefix * len(self.microbatches(step))

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
        return order


class Work:
    """How far a run is, in tokens through the model; forward and backward count three times a forward alone."""

    def __init__(self) -> None:
        self._total = 0
        self._done = 0
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=RECENT_STEPS + 1)  # (time, done, tokens of rows)
        self._tokens = 0

    def expect(self, plan: Plan, steps_done: int, scored_tokens: int) -> None:
        """Count the work ahead: a pass over the scored rows before and after, and the steps in between."""
        steps = [3 * plan.computed_tokens(step) for step in range(1, plan.config.total_steps + 1)]
        self._total = 2 * scored_tokens + sum(steps)
        self._done = sum(steps[:steps_done]) + (scored_tokens if steps_done else 0)

    def advance(self, tokens: int) -> None:
        self._done += tokens

    def step_done(self, row_tokens: int) -> None:
        self._tokens += row_tokens
        self._recent.append((time.monotonic(), self._done, self._tokens))

    @property
    def progress(self) -> float:
        """0 to 0.99; what is left at the end are the replies and the files."""
        return min(self._done / self._total, 1.0) * 0.99 if self._total else 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of rows over the last steps; None before the second."""
        if len(self._recent) < 2:
            return None
        (begin, _, before), (end, _, after) = self._recent[0], self._recent[-1]
        return (after - before) / max(end - begin, 1e-9)

    @property
    def eta_seconds(self) -> float | None:
        if len(self._recent) < 2:
            return None
        (begin, before, _), (end, after, _) = self._recent[0], self._recent[-1]
        return (self._total - self._done) * (end - begin) / max(after - before, 1)
