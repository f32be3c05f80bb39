"""Gradient checkpointing: of each block only its input is kept for the backward pass, which computes the rest again.

https://arxiv.org/abs/1604.06174. About a third more arithmetic, and a fraction of the memory. What is computed again is
what was computed first, dropout masks included, so loss and gradients are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Surroundings = Callable[[], AbstractContextManager[None]]


class Recomputation:
    """Stands in front of the blocks of one model, and does nothing by itself."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._surroundings: Surroundings | None = None
        for block in blocks:
            # Not transformers' own switch: it asks for train mode, which would reach those who serve from this model.
            block.forward = partial(self._through, block.forward)

    @contextmanager
    def with_surroundings(self, surroundings: Surroundings) -> Iterator[None]:
        """Passes with gradient in here keep the blocks' inputs alone.

        A block is computed again inside `surroundings()`: by then another pass may be in force, or none.
        """
        before, self._surroundings = self._surroundings, surroundings
        try:
            yield
        finally:
            self._surroundings = before

    def _through(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        surroundings = self._surroundings
        if surroundings is None or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(  # it keeps the random state too, and goes back to it
            partial(forward, **kwargs), *args, use_reentrant=False, context_fn=lambda: (nullcontext(), surroundings())
        )
