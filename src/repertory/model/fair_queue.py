"""Who gets the next place in the batch: of those who wait, the organisation that has been given the fewest tokens.

This is the virtual token counter of "Fairness in Serving Large Language Models" (https://arxiv.org/abs/2401.00588).
Each organisation has a counter of the tokens computed for it, weighted by what they cost. One that begins to wait is
lifted to the smallest counter of those who wait already, so nobody saves up turns by staying away. Of two that both
have sequences waiting, neither is given more than the other by over 2 (w_p L + w_q R O), whatever they send: w_p and
w_q are the weights below, L and O the longest prompt and reply in tokens, R the rows of the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repertory.model.scheduler import Sequence

PROMPT_WEIGHT = 1  # of a token that is read
OUTPUT_WEIGHT = 2  # of one that is written: as in the paper, and about what vendors charge for


class FairQueue:
    """The sequences that wait, in the order in which each organisation sent its own."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Sequence]] = {}  # no queue in it is empty
        self._served: dict[str, int] = {}  # weighted tokens; of everybody who waits, and of others who are ahead
        self._floor = 0  # the counter of whoever left the queue empty

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for queue in self._waiting.values() for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        org_id = sequence.org_id
        if org_id not in self._waiting:
            self._served[org_id] = max(self._served.get(org_id, 0), self._level)
        self._waiting.setdefault(org_id, deque()).append(sequence)

    @property
    def heads(self) -> Iterator[Sequence]:
        """The sequence whose turn it is, and then of every other organisation the one whose turn it would be.

        Of several organisations that are level, the one that has waited longest comes first.
        """
        for org_id in sorted(self._waiting, key=self._served.__getitem__):
            yield self._waiting[org_id][0]

    def remove(self, sequence: Sequence) -> None:
        """Take it out, wherever it stands; nothing happens if it does not wait."""
        queue = self._waiting.get(sequence.org_id)
        if queue is None or sequence not in queue:
            return
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.org_id]
            if not self._waiting:
                self._floor = self._served[sequence.org_id]

    def charge(self, org_id: str, *, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """These are being computed for it."""
        cost = PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens
        self._served[org_id] = self._served.get(org_id, 0) + cost

    def forget(self, running: Collection[str]) -> None:
        """Drop the counters that nobody would miss: of who neither waits nor is `running`, and would be lifted."""
        level = self._level
        self._served = {
            org_id: served
            for org_id, served in self._served.items()
            if org_id in self._waiting or org_id in running or served > level
        }

    def clear(self) -> list[Sequence]:
        """Everyone who waits, who no longer does."""
        waiting = list(self)
        for sequence in waiting:
            self.remove(sequence)
        return waiting

    @property
    def _level(self) -> int:
        """Where somebody starts who begins to wait."""
        return min((self._served[org_id] for org_id in self._waiting), default=self._floor)
