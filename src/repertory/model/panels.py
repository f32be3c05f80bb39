"""The weights that correct a group of sibling layers, packed for the compiled products of LoRA (`lora_kernel`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repertory.model.kernel import HAS_BF16_PRODUCTS, as_bits, is_for
from repertory.model.layers import Siblings
from repertory.model.lora_kernel import (
    BLOCK_TOKENS,
    GRAD_A,
    correct,
    correct_backward,
    gradients,
    pack,
)
from repertory.model.products import PANEL, STRIP

Packing = tuple[int, int, int, int, int, int, int, int]  # what `pack` wants to know of a weight


class Panels:
    """Holds copies of the weights as they were when it was made or renewed.

    Shapes: N tokens, R ranks of all siblings together, each one's filled up to a multiple of 16.
    """

    @staticmethod
    def fit(siblings: Siblings, weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Whether the compiled products can take these weights, and activations of this type."""
        return (
            HAS_BF16_PRODUCTS
            and dtype == torch.bfloat16
            and all(size % STRIP == 0 for layer in siblings.layers for size in layer.shape)
            and (is_for(*weights) and all(weight.is_contiguous() for weight in weights))
        )

    def __init__(
        self, siblings: Siblings, names: Sequence[str], weights: Sequence[Tensor], *, for_training: bool
    ) -> None:
        """`weights`: first A (r, in_features) of the siblings named, then B (out_features, r) of each."""
        As, Bs = weights[: len(names)], weights[len(names) :]
        self.inputs, self.outputs = siblings.layers[0].shape[0], sum(siblings.widths)
        slices = {layer.name: rows for layer, rows in zip(siblings.layers, siblings.slices, strict=True)}
        facts: list[list[int]] = []
        self.ranks = B_size = 0
        for name, A in zip(names, As, strict=True):
            ranks, rows = -(-len(A) // PANEL) * PANEL, slices[name]
            width = rows.stop - rows.start
            facts.append([rows.start, width, self.ranks, ranks, len(A), B_size, 0, 0])
            self.ranks, B_size = self.ranks + ranks, B_size + width * ranks
        self._facts = torch.tensor(facts)
        self._weights = weights  # held: they are read at their addresses
        A_size = self.ranks * self.inputs
        self._A_by_rank, self._B_by_output = _room(A_size), _room(B_size)  # what the forward pass reads
        self._B_by_rank, self._A_by_input = (_room(size if for_training else 0) for size in (B_size, A_size))
        packings: list[Packing] = []
        for (_, width, first, ranks, real, panels, _, _), A, B in zip(facts, As, Bs, strict=True):
            A_at, B_at, K, R = A.data_ptr(), B.data_ptr(), self.inputs, self.ranks
            packings.append((A_at, 1, K, K, real, K // 2, self._A_by_rank.data_ptr() + 2 * first * K, K * PANEL))
            to = self._B_by_output.data_ptr() + 2 * panels
            packings.append((B_at, 1, real, real, width, ranks // 2, to, ranks * PANEL))
            if for_training:
                to = self._B_by_rank.data_ptr() + 2 * panels
                packings.append((B_at, real, 1, width, real, width // 2, to, width * PANEL))
                to = self._A_by_input.data_ptr() + 2 * first * PANEL
                packings.append((A_at, K, 1, real, K, ranks // 2, to, R * PANEL))
        self._packings = torch.tensor(packings)
        self.renew()

    def renew(self) -> None:
        """Pack the weights as they are now."""
        pack.run(len(self._packings), self._packings, self._weights[0].itemsize)

    def correct(self, x: Tensor, y: Tensor, scaling: float, *, for_backward: bool) -> Tensor | None:
        """y (N, out_features) += scaling * x A' B', x (N, in_features). The low ranks, for `gradients`."""
        low = torch.empty(len(x) * self.ranks, dtype=x.dtype) if for_backward else None
        correct_stretches([(self, scaling, 0, len(x))], x, y, low)
        return low

    def correct_backward(self, grad_y: Tensor, grad_x: Tensor | None, mask: Tensor | None, scaling: float) -> Tensor:
        """grad_x += scaling * grad_y B A where the mask is set. The gradients of the low ranks, for `gradients`."""
        assert grad_y.is_contiguous()
        low = torch.empty(len(grad_y) * self.ranks, dtype=grad_y.dtype)
        packed = self._B_by_rank, self._A_by_input, self._facts
        sizes = len(grad_y), self.inputs, self.outputs, self.ranks, len(self._facts)
        optional = [0 if each is None else each for each in (grad_x, mask)]
        blocks = -(-len(grad_y) // BLOCK_TOKENS)
        correct_backward.run(blocks, grad_y, optional[0], *packed, low, optional[1], *sizes, float(scaling))
        return low

    def gradients(self, x: Tensor, grad_y: Tensor, low: Tensor, grad_low: Tensor) -> list[Tensor]:
        """Of the weights, in their order."""
        grads = [torch.empty(weight.shape) for weight in self._weights]
        facts, count = self._facts.clone(), len(self._facts)
        facts[:, GRAD_A:] = torch.tensor([grad.data_ptr() for grad in grads]).view(2, count).t()
        blocks = (self.inputs + self.outputs) // STRIP
        gradients.run(blocks, x, grad_y, low, grad_low, facts, len(x), self.inputs, self.outputs, self.ranks, count)
        return grads


def correct_stretches(
    stretches: Sequence[tuple[Panels, float, int, int]], x: Tensor, y: Tensor, low: Tensor | None = None
) -> None:
    """y (N, out_features) += scaling * x A' B', x (N, in_features), for stretches of the tokens.

    Of each: whose panels, the scaling, its first token, and how many.
    """
    assert y.is_contiguous()
    x, first, about = x.contiguous(), 0, []
    inputs, outputs = x.shape[-1], y.shape[-1]
    for panels, scaling, begin, count in stretches:
        reads, writes = x.data_ptr() + 2 * begin * inputs, y.data_ptr() + 2 * begin * outputs
        packed = panels._A_by_rank.data_ptr(), panels._B_by_output.data_ptr(), panels._facts.data_ptr()
        pairs = 0 if low is None else low.data_ptr()
        sizes = count, panels.ranks, len(panels._facts), as_bits(scaling)
        about.append((first, reads, writes, *packed, pairs, *sizes))
        first += -(-count // BLOCK_TOKENS)
    correct.run(first, torch.tensor(about), len(about), inputs, outputs)


def _room(numbers: int) -> Tensor:
    return torch.empty(numbers, dtype=torch.bfloat16)
