"""Attention over packed tokens, for any model that goes through transformers' attention interface.

Every forward pass here, in training and in serving, runs over one flat row of N tokens, (1, N), that belong to several
sequences. Everything in a transformer but attention works on each token alone, so no padding is ever computed; only
this function, or `packedattention` in its place, knows which token may see which. What it knows is a layout, in force
for one forward pass (and for what gradient checkpointing computes of it again):

    PackedRows   training and scoring: an optional shared prefix, then the rows that continue it
    CachedRows   serving: each sequence's new tokens continue what its row of a KVCache holds (`kvcache.py`)

On CUDA all of it goes through torch's `scaled_dot_product_attention`: flash attention where rows are plain causal, the
memory-efficient kernel where a mask is needed (rows behind a shared prefix, windows, the cache). Packed rows are padded
to the longest of their micro-batch, which is of like lengths. Kernels that take ragged rows would save that padding,
but are for fp16 and bf16 on CUDA alone, so that no test on a CPU could show them right.

Shapes: H query heads, G key/value heads, D head size, P prefix tokens, R rows, T tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "repertory"
ROW_PADDING = 16  # tokens


class Layout(Protocol):
    """Who may see whom in one forward pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
        """query (1, H, N, D), key and value (1, G, N, D) -> (1, H, N, D).

        N may exceed the layout's tokens: what follows them is padding, whose values do not matter.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How one layer turns queries and keys into weights."""

    scale: float
    window: int | None = None  # a token sees this many tokens, itself included
    softcap: float | None = None


# A plain global, not a ContextVar: on CUDA the recomputation of gradient checkpointing runs on autograd's own threads.
# A host has one device and one thread that drives it.
_layout: Layout | None = None


def current_layout() -> Layout | None:
    return _layout


@contextmanager
def layout_in_force(layout: Layout) -> Iterator[None]:
    global _layout
    before, _layout = _layout, layout
    try:
        yield
    finally:
        _layout = before


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    # What says nothing about the weights. Anything else is a kind of attention that is not known here, and a TypeError.
    position_ids: Tensor | None = None,
    use_cache: bool = False,
    is_causal: bool | None = None,
) -> tuple[Tensor, None]:
    """The function that the model's attention layers call. Returns (1, N, H, D)."""
    layout = current_layout()
    assert layout is not None, "a forward pass outside layout_in_force"
    if attention_mask is not None or dropout or is_causal is False:
        raise TypeError("attention with a mask of its own, with dropout or to later tokens")
    how = Scoring(
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5, window=sliding_window, softcap=softcap
    )
    layer: int = module.layer_idx  # type: ignore[assignment]
    return layout.attend(layer, query, key, value, how).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)


def check_masks(model: Any, positions: int) -> None:
    """Compare the masks that the model makes with what its layers tell `packed_attention`, up to its last position.

    Here no mask is ever made, so a family that keeps a window or chunks in its masks alone would be wrong on long rows,
    which no comparison of short ones finds. Raises TypeError where they differ, or where a block has no attention.
    """
    check = _MaskCheck(positions)
    ALL_ATTENTION_FUNCTIONS.register(_CHECKING, check.attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_CHECKING, check.mask)
    model.set_attn_implementation(_CHECKING)
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        model.set_attn_implementation(ATTENTION)
    if without := sorted(set(range(model.config.num_hidden_layers)) - check.layers):
        raise TypeError(f"the blocks {without} have no attention, or their own")


_CHECKING = "repertory-checking"


class _MaskCheck:
    """Two functions for transformers' interfaces: one tells what a mask shows, the other compares it."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.layers: set[int] = set()  # that were compared

    def mask(self, *, mask_function: Callable[..., Tensor], device: torch.device, **_: Any) -> Tensor:
        """(2, positions): which tokens the last two see. A window shows both as many, a chunk does not."""
        at = torch.arange(self.positions, device=device)
        first = at.new_zeros(1, 1, 1, 1)  # of the batch, and of the heads
        shown = mask_function(first, first, at[-2:, None][None, None], at[None, None, None])
        return shown.expand(1, 1, 2, self.positions)[0, 0]

    def attention(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        layer: int = module.layer_idx  # type: ignore[assignment]
        told = causal_mask(2, self.positions, sliding_window, query.device)
        if attention_mask is None or not torch.equal(attention_mask, told):
            raise TypeError(f"the mask of block {layer} is not the one that its attention tells")
        self.layers.add(layer)
        return query.transpose(1, 2), None


@dataclass(frozen=True)
class PackedRows:
    """Tokens [prefix | row 1 | row 2 | ...]: each row continues the prefix and sees neither the other rows nor padding.

    The prefix is computed once, with gradient, however many rows share it.
    """

    prefix: int  # tokens, may be 0
    lengths: tuple[int, ...]  # tokens of each row after the prefix, each > 0
    device: torch.device

    @property
    def token_count(self) -> int:
        return self.prefix + sum(self.lengths)

    @cached_property
    def positions(self) -> Tensor:
        """(N,) position of each token in its own sequence."""
        spans = [torch.arange(self.prefix), *(torch.arange(self.prefix, self.prefix + n) for n in self.lengths)]
        return torch.cat(spans).to(self.device)

    @property
    def longest(self) -> int:
        """T, rounded up: few different shapes, as for whole batches (`base.padded_length`)."""
        return -(-max(self.lengths) // ROW_PADDING) * ROW_PADDING

    @cached_property
    def _spread(self) -> Tensor:
        """(R * T,) index of each row's tokens among those after the prefix; past its end a row repeats its last."""
        longest = self.longest
        rows, first = [], 0
        for length in self.lengths:
            rows.append(first + torch.arange(longest).clamp(max=length - 1))
            first += length
        return torch.cat(rows).to(self.device)

    @cached_property
    def gather(self) -> Tensor:
        """(N - P,) index of each token after the prefix among the R * T places."""
        longest = self.longest
        spans = [row * longest + torch.arange(length) for row, length in enumerate(self.lengths)]
        return torch.cat(spans).to(self.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
        _, H, N, D = query.shape
        G, R, P = key.shape[1], len(self.lengths), self.prefix
        if R <= 1:  # a single row is the prefix's plain continuation, and padding comes after it
            return causal_attention(query, key, value, H // G, how)
        T, after = self.longest, sum(self.lengths)
        # Split at once and joined at once: the gradient of a slice would fill the whole with zeros, for each slice.
        parts = [torch.split(each, [P, after, N - P - after], dim=2) for each in (query, key, value)]
        (query_P, query_R, padding), (key_P, key_R, _), (value_P, value_R, _) = parts

        def rows(packed: Tensor) -> Tensor:
            """(1, heads, N - P, D) -> (R, heads, T, D)"""
            tokens = packed[0].transpose(0, 1).flatten(1)
            spread = _Spread.apply(tokens, self._spread, self.gather)  # type: ignore[no-untyped-call]
            return spread.view(R, T, -1, D).transpose(1, 2)  # type: ignore[no-any-return]

        def with_prefix(prefix: Tensor, packed: Tensor) -> Tensor:
            """(R, G, P + T, D)"""
            return torch.cat((prefix.expand(R, -1, -1, -1), rows(packed)), dim=2) if P else rows(packed)

        seen = causal_attention(rows(query_R), with_prefix(key_P, key_R), with_prefix(value_P, value_R), H // G, how)
        places = seen.transpose(1, 2).reshape(R * T, H * D)
        gathered: Tensor = _Gather.apply(places, self.gather)  # type: ignore[no-untyped-call]
        joined = [gathered.view(1, after, H, D), padding.detach().transpose(1, 2)]
        if P:
            joined.insert(0, causal_attention(query_P, key_P, value_P, H // G, how).transpose(1, 2))
        return torch.cat(joined, dim=1).transpose(1, 2)


class _Spread(torch.autograd.Function):
    """Rows of a table by index, each at least once, some again as padding that passes no gradient back."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, spread: Tensor, gather: Tensor) -> Tensor:
        ctx.save_for_backward(gather)
        return tokens.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """Rows of a table by distinct indices, whose gradients therefore need no adding up."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, gather: Tensor) -> Tensor:
        ctx.save_for_backward(gather)
        ctx.count = len(places)
        return places.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        places = grads[0].new_zeros(ctx.count, grads[0].shape[1])
        return places.index_copy_(0, ctx.saved_tensors[0], grads[0]), None


# Keys up to which writing the scores out beats torch's flash attention on a CPU, three times over in training
# (`docs/log.md`). Beyond, the scores of a training run take too much memory.
MOST_WRITTEN_OUT = 640


def causal_attention(query: Tensor, key: Tensor, value: Tensor, group: int, how: Scoring) -> Tensor:
    """query (R, H, T, D), whose last token stands at the last key; key and value (R, G, S, D) -> (R, H, T, D)."""
    T, S = query.shape[2], key.shape[2]
    window = None if how.window is None or how.window >= S else how.window
    if query.device.type == "cpu" and how.softcap is None and S <= MOST_WRITTEN_OUT:
        return _written_out(query, key, value, group, how, window)
    if T == S and window is None and how.softcap is None:
        key, value = _repeated(key, group), _repeated(value, group)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=how.scale)
    return scaled_dot_product(query, key, value, group, causal_mask(T, S, window, query.device), how)


def _written_out(query: Tensor, key: Tensor, value: Tensor, group: int, how: Scoring, window: int | None) -> Tensor:
    """Attention by three plain operations; the query heads that share a key head stand as tokens of one head.

    In bf16 the scores are rounded to bf16, as transformers' eager attention rounds them.
    """
    R, H, T, D = query.shape
    heads = R * H // group
    hidden = _hidden_scores(T, key.shape[2], window, group, query.dtype, torch.is_inference_mode_enabled())
    if beyond := hidden.shape[1] - key.shape[2]:
        key, value = F.pad(key, (0, 0, 0, beyond)), F.pad(value, (0, 0, 0, beyond))
    grouped = query.reshape(heads, group * T, D)
    key, value = key.reshape(heads, -1, D), value.reshape(heads, -1, D)
    weights = torch.baddbmm(hidden.expand(heads, -1, -1), grouped, key.transpose(1, 2), alpha=how.scale).softmax(-1)
    return torch.bmm(weights, value).view(R, H, T, D)


@lru_cache(maxsize=8)  # the layers of one forward pass ask for the same one or two
def _hidden_scores(T: int, S: int, window: int | None, group: int, dtype: torch.dtype, is_inference: bool) -> Tensor:
    """(group * T, S or more) on the CPU: what to add to the scores, 0 or -inf. Inference tensors are kept apart, as
    autograd takes none.

    Keys are added that nobody sees: the softmax over 88 of them takes 2.8 times as long as that over 96, which is
    three registers of 32 bf16 numbers.
    """
    mask = F.pad(causal_mask(T, S, window, torch.device("cpu")), (0, -S % 32))
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf")).repeat(group, 1)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys), True where the query may look; the last query stands at the last key."""
    query_at = torch.arange(keys - queries, keys, device=device)[:, None]
    key_at = torch.arange(keys, device=device)[None]
    mask = key_at <= query_at
    return mask if window is None else mask & (query_at - key_at < window)


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, group: int, mask: Tensor | None, how: Scoring
) -> Tensor:
    """query (R, H, T, D), key and value (R, G, S, D), mask broadcastable to (R, H, T, S) -> (R, H, T, D)."""
    key, value = _repeated(key, group), _repeated(value, group)
    if how.softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=how.scale)
    scores = query @ key.transpose(-1, -2) * how.scale
    scores = torch.tanh(scores / how.softcap) * how.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    precise = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=precise).to(value.dtype) @ value


def _repeated(heads: Tensor, group: int) -> Tensor:
    """(R, G, S, D) -> (R, G * group, S, D)."""
    return heads if group == 1 else heads.repeat_interleave(group, dim=1)
