"""Cross entropy that never holds the logits of all positions.

The output embeddings are frozen, so all that the backward pass needs is the gradient for the hidden states, which is
computed with the loss and is smaller than the logits by vocabulary over hidden size.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from repertory.model.base import Base, padded_length
from repertory.model.kernel import FAST, FP32, INT64, LANES, Kernel, argument, compiled, exp, get, is_for, put, row

# Positions whose logits exist at one time: 128 x 49,152 in fp32 are 24 MiB, and torch's loss needs some copies of them.
# The compiled one needs none, and takes twice as many.
CHUNK = 128


class ChunkedNLL(torch.autograd.Function):
    """Negative log-likelihoods (M,) of `targets` (M,) after the hidden states (M, hidden_size)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, base: Base) -> Tensor:
        losses, gradients = [], []
        weight = base.plain_head if is_for(hidden) else None
        chunk = CHUNK if weight is None else 2 * CHUNK
        for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            if weight is None:
                nll, gradient = _loss(part, wanted, base, ctx.needs_input_grad[0])
            else:
                nll, gradient = _compiled_loss(part, wanted, weight, ctx.needs_input_grad[0])
            losses.append(nll)
            gradients.append(gradient)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_nll[:, None].to(gradient.dtype), None, None


def _loss(hidden: Tensor, targets: Tensor, base: Base, has_gradient: bool) -> tuple[Tensor, Any]:
    """The losses (M,), and of each the gradient for its hidden state; None without `has_gradient`."""
    if not has_gradient:
        return F.cross_entropy(base.logits(hidden), targets, reduction="none"), None
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        nll = F.cross_entropy(base.logits(leaf), targets, reduction="none")
        # Each position's loss depends on its own hidden state alone, so one sum gives every gradient.
        (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    return nll.detach(), gradient


def _compiled_loss(hidden: Tensor, targets: Tensor, weight: Tensor, has_gradient: bool) -> tuple[Tensor, Any]:
    """The same, with the gradient for the logits written over them."""
    count = len(hidden)
    logits = F.linear(F.pad(hidden, (0, 0, 0, padded_length(count) - count)), weight)
    nll = torch.empty(count)
    logits[count:] = 0
    _cross_entropy.run(count, logits, targets, nll, logits.shape[1], int(has_gradient))
    return nll, (logits @ weight)[:count] if has_gradient else None


@compiled(fastmath=FAST)
def _largest(logits):
    """Lane by lane: as one number, of which some may be none, it would be looked for one after another."""
    lanes = np.full(LANES, -np.inf, np.float32)
    whole = len(logits) // LANES * LANES
    for first in range(0, whole, LANES):
        for i in range(LANES):
            logit = get(logits, first + i)
            lanes[i] = logit if logit > lanes[i] else lanes[i]
    largest = lanes[0]
    for i in range(1, LANES):
        largest = max(largest, lanes[i])
    for i in range(whole, len(logits)):
        largest = max(largest, get(logits, i))
    return largest


@Kernel
def _cross_entropy(asked, n, like):
    """Of one position; its logits become exp(logit) / sum(exp(logits)), less 1 for the target."""
    width = argument(asked, 3)
    logits, target = row(argument(asked, 0), n, width, like), row(argument(asked, 1), n, 1, INT64)[0]
    most, total = _largest(logits), np.float32(0)
    for i in range(width):
        total += exp(get(logits, i) - most)
    wanted = get(logits, target) - most
    row(argument(asked, 2), n, 1, FP32)[0] = np.log(total) - wanted
    if argument(asked, 4):
        for i in range(width):
            put(logits, i, exp(get(logits, i) - most) / total)
        put(logits, target, exp(wanted) / total - np.float32(1))
