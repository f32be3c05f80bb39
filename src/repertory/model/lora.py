"""LoRA: low-rank corrections of the base model's linear layers (https://arxiv.org/abs/2106.09685).

Two routings say which correction applies to which token of a forward pass:

    Training    one adapter for all tokens, with gradient and dropout
    Serving     spans of tokens, each with the adapter of its voice, or with none

Shapes: N tokens, r rank, in_features and out_features of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from numpy.random import SFC64
from torch import Tensor

from repertory.model.adapter import Adapter
from repertory.model.layers import Siblings
from repertory.model.panels import Panels, correct_stretches

MOST_ALONE = 32  # voices that read prompts whose weights are kept side by side: as many as there are rows
TOKEN_MULTIPLE = 16  # oneDNN plans each new shape of a product, for about a millisecond


@dataclass
class Training:
    """One adapter for all tokens. Products run in the base's precision, the weights stay in their own (fp32)."""

    adapter: Adapter
    dropout: float = 0.0
    _panels: dict[str, Panels] = field(default_factory=dict)  # the weights, packed when they were first used

    def renew(self) -> None:
        """The weights have changed: pack them again."""
        for panels in self._panels.values():
            panels.renew()

    def through(self, siblings: Siblings, x: Tensor) -> Tensor:
        corrected = [layer.name for layer in siblings.layers if layer.name in self.adapter.A]
        y: Tensor
        if not corrected:
            y = _Frozen.apply(x, siblings)  # type: ignore[no-untyped-call]
        else:
            weights = [half[name] for half in (self.adapter.A, self.adapter.B) for name in corrected]
            scaling = self.adapter.config.scaling
            if x.numel() // x.shape[-1] % 2 == 0 and Panels.fit(siblings, weights, x.dtype):
                if corrected[0] not in self._panels:
                    self._panels[corrected[0]] = Panels(siblings, corrected, weights, for_training=True)
                panels = self._panels[corrected[0]]
                return _CompiledLora.apply(x, siblings, panels, scaling, self.dropout, *weights)  # type: ignore
            y = _FusedLora.apply(x, siblings, corrected, scaling, self.dropout, *weights)  # type: ignore[no-untyped-call]
        return y


def dropout_mask(shape: torch.Size, share: float, device: torch.device) -> Tensor:
    """Bytes of ones where kept, 0 with probability `share` (to 1/65,536), from torch's default generator.

    On a CPU torch's generator gives a seed only: numpy's draws twice as fast (`benchmarks/kernels.py`).
    """
    places = math.prod(shape)
    draws = -(-places // 4)  # four places to each 64 random bits
    if device.type == "cpu":
        drawn = SFC64(int(torch.randint(2**62, ()))).random_raw(draws)
        bits = torch.from_numpy(drawn.view("int64"))
    else:
        bits = torch.empty(draws, dtype=torch.int64, device=device).random_(-(2**63), None)
    mask = torch.empty(places, dtype=torch.int8, device=device)
    torch.ge(bits.view(torch.int16)[:places], round(share * 65536) - 32768, out=mask)
    return mask.neg_().view(shape)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop_(x: Tensor, mask: Tensor) -> Tensor:
    """Set to 0, in place, what a dropout mask does not keep: by the bits, ten times faster than a product by booleans
    on a CPU.
    """
    bits = _BITS[x.dtype.itemsize]
    x.view(bits).bitwise_and_(mask.to(bits))
    return x


class _Frozen(torch.autograd.Function):
    """Frozen layers, quantized or not, of which nothing is kept for the backward pass.

    bitsandbytes' own function keeps the input of an 8-bit layer, out of the reach of gradient checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, siblings: Siblings) -> Tensor:
        ctx.siblings = siblings
        return siblings.base(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.siblings.weight(grads[0].dtype), None


class _FusedLora(torch.autograd.Function):
    """base(x) + scaling * dropout(x) A' B', with the base frozen and A, B possibly in a higher precision than x.

    The A of siblings stand below each other, so that one product reads x for all. Their B stand in the diagonal of a
    matrix that is 0 elsewhere: to multiply by zeros costs less than to start a product for each.

    What plain autograd would write to memory and read again is added in place: the correction to the output, and its
    gradient to that of the input.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, siblings: Siblings, names: list[str], scaling: float, dropout: float, *weights: Tensor
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        mask = dropout_mask(flat.shape, dropout, flat.device) if dropout else None
        kept = flat if mask is None else drop_(flat.clone(), mask)
        a, b, blocks = _side_by_side(siblings, names, weights, x.dtype)
        scaling = scaling / (1 - dropout)  # what is kept stands for what is not
        low_rank = (kept @ a.t()).mul_(scaling)
        y = siblings.base(flat).addmm_(low_rank, b.t())
        ctx.save_for_backward(kept, mask, low_rank, a, b)
        ctx.siblings, ctx.blocks, ctx.scaling, ctx.x_shape = siblings, blocks, scaling, x.shape
        ctx.precision = weights[0].dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, mask, low_rank, a, b = ctx.saved_tensors
        grad_y = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low_rank = (grad_y @ b).mul_(ctx.scaling)
        grad_b = (grad_y.t() @ low_rank).to(ctx.precision)
        grad_a = (grad_low_rank.t() @ kept).to(ctx.precision)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.siblings.weight(grad_y.dtype)
            if mask is None:
                grad_x.addmm_(grad_low_rank, a)
            else:
                grad_x.add_(drop_(grad_low_rank @ a, mask))
            grad_x = grad_x.view(ctx.x_shape)
        grads_A = [grad_a[ranks] for _, ranks in ctx.blocks]
        grads_B = [grad_b[rows, ranks] for rows, ranks in ctx.blocks]
        return grad_x, None, None, None, None, *grads_A, *grads_B


class _CompiledLora(torch.autograd.Function):
    """The same, with the products of the adapter compiled."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, siblings: Siblings, panels: Panels, scaling: float, dropout: float, *weights: Tensor
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        mask = dropout_mask(flat.shape, dropout, flat.device) if dropout else None
        kept = flat if mask is None else drop_(flat.clone(), mask)
        y = siblings.base(flat).contiguous()
        scaling = scaling / (1 - dropout)
        low = panels.correct(kept, y, scaling, for_backward=any(ctx.needs_input_grad))
        ctx.save_for_backward(kept, mask, low)
        ctx.siblings, ctx.panels, ctx.scaling, ctx.x_shape = siblings, panels, scaling, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, mask, low = ctx.saved_tensors
        grad_y = grads[0].reshape(-1, grads[0].shape[-1]).contiguous()
        grad_x = grad_y @ ctx.siblings.weight(grad_y.dtype) if ctx.needs_input_grad[0] else None
        grad_low = ctx.panels.correct_backward(grad_y, grad_x, mask, ctx.scaling)
        grads_of_weights = ctx.panels.gradients(kept, grad_y, low, grad_low)
        return None if grad_x is None else grad_x.view(ctx.x_shape), None, None, None, None, *grads_of_weights


def _side_by_side(
    siblings: Siblings, names: list[str], weights: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[tuple[slice, slice]]]:
    """A (ranks, in_features) and B (all out_features, ranks) of the named siblings; where in B each one's stands."""
    As, Bs = weights[: len(names)], weights[len(names) :]
    if len(siblings.layers) == 1:
        return As[0].to(dtype), Bs[0].to(dtype), [(slice(None), slice(None))]
    rank = len(As[0])
    a = As[0].new_empty(len(names) * rank, As[0].shape[1], dtype=dtype)
    b = Bs[0].new_zeros(sum(siblings.widths), len(names) * rank, dtype=dtype)
    blocks: list[tuple[slice, slice]] = []
    for layer, rows in zip(siblings.layers, siblings.slices, strict=True):
        if layer.name in names:
            at = len(blocks)
            ranks = slice(at * rank, (at + 1) * rank)
            a[ranks], b[rows, ranks] = As[at], Bs[at]
            blocks.append((rows, ranks))
    return a, b, blocks


class Serving:
    """Each token with the adapter of its voice: first one token of every decoding row, then chunks of prompts.

    All voices of the decoding rows take part in two products, over their weights side by side, so each is read once
    however many rows it has. In between a mask leaves to each row what is its own voice's, and nothing to a row of the
    bare base.
    """

    def __init__(
        self, rows: Sequence[Adapter | None], chunks: Sequence[tuple[Adapter | None, int]], stacks: AdapterStacks
    ) -> None:
        """`chunks`: of each, whose it is and how many tokens it has."""
        self.row_count = len(rows)
        self.chunks = chunks
        self.stacks = stacks
        stacks.seat([adapter for adapter in rows if adapter is not None])
        self._others: Tensor | None = None  # (rows, seats, 1), whose voice a row is not; None: all have the same
        if any(adapter is not voice for adapter in rows for voice in stacks.voices):
            others = [[adapter is not voice for voice in stacks.voices] for adapter in rows]
            self._others = torch.tensor(others, device=stacks.voices[0].device)[:, :, None]

    def through(self, siblings: Siblings, x: Tensor) -> Tensor:
        y = siblings.base(x).contiguous()
        tokens, corrected = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        rows = self.row_count
        stack = self.stacks.of(siblings)
        if stack is not None:
            A, B = stack
            low_rank = F.linear(tokens[:rows], A)
            if self._others is not None:
                # Filled, not multiplied by 0: what overflows in one voice must not reach the others.
                low_rank.view(rows, self._others.shape[1], -1).masked_fill_(self._others, 0)
            corrected[:rows].addmm_(low_rank, B)
        begin, stretches = rows, []
        for voice, count in self.chunks:
            alone = None if voice is None else self.stacks.alone(voice, siblings, x.dtype)
            if isinstance(alone, Panels):
                assert voice is not None
                stretches.append((alone, voice.config.scaling, begin, count))
            elif alone is not None:
                # Some tokens more are multiplied than the voice has, so that products have few different shapes.
                A, B = alone
                padded = -(-count // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
                correction = F.linear(tokens[begin : begin + padded], A) @ B
                corrected[begin : begin + count].add_(correction[:count])
            begin += count
        if stretches:
            correct_stretches(stretches, tokens, corrected)
        return y


class AdapterStacks:
    """The weights of the voices that decode, side by side. Each keeps its seat while others come and go, so that one
    that comes costs the writing of its own weights.
    """

    def __init__(self) -> None:
        self.voices: list[Adapter] = []  # by seat; some of them may decode no more
        self._stacks: dict[str, _Stack] = {}
        self._alone: WeakKeyDictionary[Adapter, dict[str, Panels | tuple[Tensor, Tensor] | None]] = WeakKeyDictionary()

    def seat(self, voices: Sequence[Adapter]) -> None:
        """Seat all of these. The others leave their seats to them, and altogether when they are the most."""
        wanted = {id(voice): voice for voice in voices}
        if len(self.voices) >= 2 * len(wanted):
            self.voices = list(wanted.values())
        seated = {id(voice) for voice in self.voices}
        free = [seat for seat, voice in enumerate(self.voices) if id(voice) not in wanted]
        for voice in wanted.values():
            if id(voice) not in seated:
                if free:
                    self.voices[free.pop()] = voice
                else:
                    self.voices.append(voice)

    def of(self, siblings: Siblings) -> tuple[Tensor, Tensor] | None:
        """Scaled A (seats * ranks, in_features) and B (seats * ranks, all out_features); None where none corrects them.

        The ranks of a seat are those of each sibling in turn, r each, r the largest rank among the voices.
        """
        if not self.voices:
            return None
        name, rank = siblings.layers[0].name, max(voice.config.rank for voice in self.voices)
        stack = self._stacks.get(name)
        if stack is None or len(stack.held) < len(self.voices) or stack.rank < rank:
            seats = 1 << (len(self.voices) - 1).bit_length()
            stack = self._stacks[name] = _Stack(siblings, seats, rank, self.voices[0])
        return stack.of(self.voices)

    def alone(self, voice: Adapter, siblings: Siblings, dtype: torch.dtype) -> Panels | tuple[Tensor, Tensor] | None:
        """For one voice that reads its prompt, and for activations of this type: packed where that is faster, else as
        from `of`.
        """
        weights = self._alone.pop(voice, {})
        self._alone[voice] = weights  # as the last one to go
        while len(self._alone) > MOST_ALONE:
            del self._alone[next(iter(self._alone))]
        name = siblings.layers[0].name
        if name not in weights:
            names = [layer.name for layer in siblings.layers if layer.name in voice.A]
            halves = [half[name] for half in (voice.A, voice.B) for name in names]
            if names and Panels.fit(siblings, halves, dtype):
                weights[name] = Panels(siblings, names, halves, for_training=False)
            else:
                weights[name] = _Stack(siblings, 1, voice.config.rank, voice).of([voice])
        return weights[name]

    def forget(self, adapter: Adapter) -> None:
        """It takes part no more."""
        if adapter in self.voices:
            self.clear()
        self._alone.pop(adapter, None)

    def clear(self) -> None:
        """Nobody decodes. What was made of the last voices for their prompts is kept: they may be asked again."""
        self.voices, self._stacks = [], {}


class _Stack:
    """Seats for the weights that correct one group of siblings."""

    def __init__(self, siblings: Siblings, seats: int, rank: int, like: Adapter) -> None:
        self.siblings = siblings
        self.rank = rank
        self.held: list[Adapter | None] = [None] * seats
        self._corrects = [False] * seats
        some = like.parameters[0]
        self._A = some.new_zeros(seats, len(siblings.layers), rank, siblings.layers[0].shape[0])
        self._B = some.new_zeros(seats, len(siblings.layers), rank, sum(siblings.widths))

    def of(self, voices: Sequence[Adapter]) -> tuple[Tensor, Tensor] | None:
        for seat, voice in enumerate(voices):
            if self.held[seat] is not voice:
                self._put(seat, voice)
        count = len(voices)
        if not any(self._corrects[:count]):
            return None
        return self._A[:count].flatten(0, 2), self._B[:count].flatten(0, 2)

    def _put(self, seat: int, voice: Adapter) -> None:
        A, B, rank = self._A[seat].zero_(), self._B[seat].zero_(), voice.config.rank
        for layer, columns, layer_A, layer_B in zip(self.siblings.layers, self.siblings.slices, A, B, strict=True):
            if layer.name in voice.A:
                layer_A[:rank] = voice.A[layer.name] * voice.config.scaling
                layer_B[:rank, columns] = voice.B[layer.name].t()
        self.held[seat] = voice
        self._corrects[seat] = any(layer.name in voice.A for layer in self.siblings.layers)
