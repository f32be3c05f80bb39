"""The rows of one forward pass, packed without padding, their common beginning only once; and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repertory.data.render import NO_LABEL, Row
from repertory.model.attention import PackedRows
from repertory.model.base import Base
from repertory.model.crossentropy import ChunkedNLL
from repertory.model.layers import Routing


def common_prefix(rows: Sequence[Row]) -> int:
    """Tokens that all rows begin with, short of the token that predicts the first label of any of them."""
    shortest = min(_first_label(row) - 1 for row in rows)
    first = rows[0].input_ids
    length = max(shortest, 0)
    for row in rows[1:]:
        ids = row.input_ids
        if ids[:length] != first[:length]:
            length = next(at for at in range(length) if ids[at] != first[at])
    return length


def _first_label(row: Row) -> int:
    return next(at for at, label in enumerate(row.labels) if label != NO_LABEL)


def with_prompt_loss(rows: Sequence[Row], weight: float) -> list[Row]:
    """The rows with a label of `weight` on what is not the assistant's, after the prefix that all of them share.

    Learning a little from the questions as well keeps short replies from being learned by heart
    (https://arxiv.org/abs/2401.13586). The shared prefix, a persona's system prompt, stays without loss.
    """
    if weight == 0:
        return list(rows)
    begin = common_prefix(rows) + 1
    weighted = []
    for row in rows:
        rest = zip(row.labels[begin:], row.input_ids[begin:], strict=True)
        labels = [token if label == NO_LABEL else label for label, token in rest]
        weights = [weight if label == NO_LABEL else 1.0 for label in row.labels[begin:]]
        weighted.append(replace(row, labels=[NO_LABEL] * begin + labels, weights=[0.0] * begin + weights))
    return weighted


@dataclass(frozen=True)
class MicroBatch:
    """Packed tokens of several rows, and which of them predict a trained token."""

    ids: Tensor  # (N,)
    layout: PackedRows
    predicting: Tensor  # (M,) indices into the N tokens whose successor is trained
    targets: Tensor  # (M,) the tokens they should predict
    row_of_target: Tensor  # (M,)
    weights: Tensor | None  # (M,) of the targets in the loss; None: all 1

    @staticmethod
    def of(rows: Sequence[Row], device: torch.device) -> MicroBatch:
        prefix = common_prefix(rows) if len(rows) > 1 else 0
        ids = list(rows[0].input_ids[:prefix])
        predicting, targets, row_of_target, weights = [], [], [], []
        for number, row in enumerate(rows):
            start = len(ids) - prefix  # where position 0 of this row would stand
            for at in range(prefix, len(row.labels) - 1):
                if row.labels[at + 1] != NO_LABEL:
                    predicting.append(start + at)
                    targets.append(row.labels[at + 1])
                    row_of_target.append(number)
                    weights.append(1.0 if row.weights is None else row.weights[at + 1])
            ids += row.input_ids[prefix:]
        lengths = tuple(len(row.input_ids) - prefix for row in rows)
        return MicroBatch(
            ids=torch.tensor(ids, device=device),
            layout=PackedRows(prefix=prefix, lengths=lengths, device=device),
            predicting=torch.tensor(predicting, device=device),
            targets=torch.tensor(targets, device=device),
            row_of_target=torch.tensor(row_of_target, device=device),
            weights=None if set(weights) == {1.0} else torch.tensor(weights, device=device),
        )

    def loss(self, base: Base, routing: Routing | None) -> Tensor:
        """The weighted sum of `nll`."""
        nll = self.nll(base, routing)
        return nll.sum() if self.weights is None else (nll * self.weights).sum()

    def nll(self, base: Base, routing: Routing | None) -> Tensor:
        """Negative log-likelihoods (M,) in nats of the trained tokens; call inside `passing`, with or without grad."""
        hidden = base.hidden(self.ids, self.layout.positions)[self.predicting]
        nll: Tensor = ChunkedNLL.apply(hidden, self.targets, base)  # type: ignore[no-untyped-call]
        return nll


def grouped(rows: Sequence[Row], indices: Sequence[int], suffix_budget: int, prefix: int) -> list[list[int]]:
    """`indices` of rows in groups of like length whose tokens after the shared prefix fit the budget.

    As few groups as possible and about equally large: half a batch takes much more than half the time. A row that
    exceeds the budget alone is a group of its own. A pure function of its arguments: a resumed run must find the same
    groups.
    """
    total = sum(len(rows[at].input_ids) - prefix for at in indices)
    fair = total / -(-total // suffix_budget)
    groups: list[list[int]] = []
    tokens = 0
    for at in sorted(indices, key=lambda at: (-len(rows[at].input_ids), at)):
        suffix = len(rows[at].input_ids) - prefix
        if not groups or tokens >= fair or tokens + suffix > suffix_budget:
            groups.append([])
            tokens = 0
        groups[-1].append(at)
        tokens += suffix
    return groups
