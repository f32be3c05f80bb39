"""What a run will do, fixed before it begins; and how much of it is done."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from repertory.data.render import Row
from repertory.model.hyperparameters import TrainConfig
from repertory.model.memory import BatchShape
from repertory.model.microbatch import common_prefix, grouped

RECENT_STEPS = 20  # over which speed is averaged


@dataclass(frozen=True)
class Cut:
    """Memory ran out, so the micro-batches are smaller than configured from a step on. The step's rows stay."""

    from_step: int
    suffix_tokens: int  # after the shared prefix, of one forward; a longer row goes alone

    @property
    def warning(self) -> str:
        return (
            f"Memory ran out, so from step {self.from_step} on a forward pass has at most {self.suffix_tokens} tokens"
            " beside the shared prefix. The effective batch is the same; training is slower."
        )


class Plan:
    """Which rows go through which optimizer step, in which micro-batches: a pure function of rows, config and cuts.

    The cuts are all that a run adds to its plan as it goes; they are stored with its checkpoints, and given back here
    when it resumes.
    """

    def __init__(self, rows: Sequence[Row], config: TrainConfig, cuts: Sequence[Cut] = ()) -> None:
        self.rows = rows
        self.config = config
        self.cuts = list(cuts)
        self.prefix = common_prefix(rows)
        self.steps_per_epoch = math.ceil(len(rows) / config.effective_batch_rows)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def rows_of(self, step: int) -> list[int]:
        """Indices of the rows of optimizer step 1..total_steps."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        size = self.config.effective_batch_rows
        return self._order(epoch)[within * size : (within + 1) * size]

    def microbatches(self, step: int) -> list[list[int]]:
        return grouped(self.rows, self.rows_of(step), self.suffix_tokens(step), self.prefix)

    def suffix_tokens(self, step: int) -> int:
        """Tokens after the shared prefix that one forward of this step may have."""
        return min([self.config.suffix_tokens, *(cut.suffix_tokens for cut in self.cuts if cut.from_step <= step)])

    def shape_of(self, microbatch: Sequence[int]) -> BatchShape:
        prefix = self.prefix if len(microbatch) > 1 else 0
        return BatchShape(prefix, tuple(len(self.rows[at].input_ids) - prefix for at in microbatch))

    def largest(self, first: int, last: int, size: Callable[[BatchShape], int]) -> list[int]:
        """The micro-batch of steps `first` to `last` whose shape has the greatest `size`."""
        candidates = {
            self.shape_of(microbatch): microbatch
            for step in range(first, last + 1)
            for microbatch in self.microbatches(step)
        }
        return candidates[max(candidates, key=size)]

    def cut(self, from_step: int, microbatch: Sequence[int]) -> bool:
        """Halve the micro-batches from a step on, so that `microbatch` comes apart. False: it is a single row."""
        if len(microbatch) == 1:
            return False
        tokens = sum(len(self.rows[at].input_ids) - self.prefix for at in microbatch)
        self.cuts.append(Cut(from_step, tokens // 2))
        return True

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
        self._progress = 0.0
        self._assumed_rate: float | None = None
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=RECENT_STEPS + 1)  # (time, done, tokens of rows)
        self._tokens = 0

    def expect(self, plan: Plan, steps_done: int, scored_tokens: int) -> None:
        """Count the work ahead: the steps, and a pass over the scored rows before them and at each evaluation.

        Count it again when the plan was cut: a shared prefix is computed more often then.
        """
        self._assumed_rate = self.rate
        self._recent.clear()
        steps = [
            3 * plan.computed_tokens(step) + scored_tokens * plan.config.is_evaluated_after(step)
            for step in range(1, plan.config.total_steps + 1)
        ]
        self._total = scored_tokens + sum(steps)
        self._done = sum(steps[:steps_done]) + (scored_tokens if steps_done else 0)

    def advance(self, tokens: int) -> None:
        self._done += tokens

    def step_done(self, row_tokens: int) -> None:
        self._tokens += row_tokens
        self._recent.append((time.monotonic(), self._done, self._tokens))

    @property
    def progress(self) -> float:
        """0 to 0.99, never falling; what is left at the end are the replies and the files."""
        if self._total:
            self._progress = max(self._progress, min(self._done / self._total, 1.0) * 0.99)
        return self._progress

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of rows over the last steps; None before the second."""
        if len(self._recent) < 2:
            return None
        (begin, _, before), (end, _, after) = self._recent[0], self._recent[-1]
        return (after - before) / max(end - begin, 1e-9)

    def assume(self, rate: float | None) -> None:
        """Work per second, for as long as no two steps have told a better one."""
        self._assumed_rate = rate

    @property
    def rate(self) -> float | None:
        """Work per second over the last steps, or the assumed one. Unit: tokens through a forward pass alone."""
        if len(self._recent) < 2:
            return self._assumed_rate
        (begin, before, _), (end, after, _) = self._recent[0], self._recent[-1]
        return max(after - before, 1) / max(end - begin, 1e-9)

    @property
    def total(self) -> int:
        """All of the work, in the unit of `rate`."""
        return self._total

    @property
    def eta_seconds(self) -> float | None:
        return None if self.rate is None else (self._total - self._done) / self.rate
