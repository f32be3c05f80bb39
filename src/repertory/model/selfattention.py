"""Self-attention of Llama-type models on a CPU, with one compiled loop in front of the scores and one behind.

transformers and `PackedRows` turn queries and keys to their positions, part heads from tokens and rows from the pack in
some thirty operations, each of which reads and writes all there is; and as many backward. Here a token's queries, keys
and values go where the products want them in one pass, and what attention found comes back in another.

Shapes: H query heads, G key/value heads, D head size, N tokens, P prefix tokens, R rows, T tokens of the longest row.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from repertory.model.attention import PackedRows, Scoring, causal_attention, current_layout
from repertory.model.kernel import FAST, INT64, Kernel, argument, compiled, get, is_for, put, row

BLOCK_TOKENS = 8


def quicken_attention(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) in (LlamaAttention, MistralAttention, Qwen2Attention):
            module.forward = partial(_forward, module, module.forward)


def _forward(
    attention: Any,
    otherwise: Callable[..., tuple[Tensor, Any]],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Any]:
    """In place of the module's own, which is `otherwise`: for another device, or before its layers are joined."""
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    siblings = getattr(projections[0], "siblings", None)
    if siblings is None or siblings.layers != projections or not is_for(hidden_states):
        return otherwise(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **more,
        )
    qkv = siblings.outputs(hidden_states, projections[0].router.routing)
    if isinstance(attention, MistralAttention):
        window = getattr(attention.config, "sliding_window", None)
    else:
        window = getattr(attention, "sliding_window", None)
    how, layout = Scoring(scale=attention.scaling, window=window), current_layout()
    if isinstance(layout, PackedRows) and len(layout.lengths) > 1:
        shape = _Shape.of(attention, qkv.shape[1], layout.prefix, layout.lengths, layout.longest)
        places = layout.gather
    else:
        shape = _Shape.of(attention, qkv.shape[1], 0, (qkv.shape[1],), qkv.shape[1])
        places = torch.arange(qkv.shape[1])
    query_P, key_P, value_P, query, key, value = _Apart.apply(qkv, *position_embeddings, places, shape)
    if isinstance(layout, PackedRows):
        seen = causal_attention(query, key, value, shape.heads // shape.groups, how)
        seen_P = (
            causal_attention(query_P, key_P, value_P, shape.heads // shape.groups, how) if shape.prefix else query_P
        )
    else:
        seen, seen_P = layout.attend(attention.layer_idx, query, key, value, how), query_P
    return attention.o_proj(_Together.apply(seen_P, seen, places, shape)), None


@dataclass(frozen=True)
class _Shape:
    tokens: int  # N, with what follows the last row
    prefix: int  # P
    after: int  # tokens of all rows behind the prefix
    rows: int  # R
    longest: int  # T
    heads: int  # H
    groups: int  # G
    size: int  # D

    @staticmethod
    def of(attention: Any, tokens: int, prefix: int, lengths: tuple[int, ...], longest: int) -> _Shape:
        size: int = attention.head_dim
        heads, groups = attention.q_proj.shape[1] // size, attention.k_proj.shape[1] // size
        return _Shape(tokens, prefix, sum(lengths), len(lengths), longest, heads, groups, size)

    @property
    def blocks(self) -> int:
        return -(-self.tokens // BLOCK_TOKENS)

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.prefix, self.after, self.longest, self.heads, self.size, self.groups, self.rows, self.tokens


class _Apart(torch.autograd.Function):
    """(1, N, (H + 2 G) D), cosine and sine (1, N, D), and of each token after the prefix its place among R * T ->
    of the prefix (1, H, P, D), (1, G, P, D) twice; of the rows (R, H, T, D), (R, G, P + T, D) twice.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, places: Tensor, shape: _Shape) -> tuple[Tensor, ...]:
        R, T, P, D = shape.rows, shape.longest, shape.prefix, shape.size
        made = qkv.new_zeros if shape.after < R * T else qkv.new_empty  # where a row ends, zeros follow
        whole = [qkv.new_empty(1, heads, P, D) for heads in (shape.heads, shape.groups, shape.groups)]
        whole += [made(R, shape.heads, T, D), made(R, shape.groups, P + T, D), made(R, shape.groups, P + T, D)]
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        _apart.run(shape.blocks, qkv, cos, sin, places, *whole, *shape.numbers)
        ctx.save_for_backward(cos, sin, places)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return tuple(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin, places = ctx.saved_tensors
        shape: _Shape = ctx.shape
        given = [0 if grad is None else grad.contiguous() for grad in grads]
        grad_qkv = cos.new_empty(1, shape.tokens, (shape.heads + 2 * shape.groups) * shape.size)
        _apart_backward.run(shape.blocks, grad_qkv, cos, sin, places, *given, *shape.numbers)
        return grad_qkv, None, None, None, None


class _Together(torch.autograd.Function):
    """Of the prefix (1, H, P, D) and of the rows (R, H, T, D) -> (1, N, H D)."""

    @staticmethod
    def forward(ctx: Any, prefix: Tensor, rows: Tensor, places: Tensor, shape: _Shape) -> Tensor:
        joined = rows.new_empty(1, shape.tokens, shape.heads * shape.size)
        _together.run(shape.blocks, joined, prefix.contiguous(), rows.contiguous(), places, *shape.numbers)
        ctx.save_for_backward(places)
        ctx.shape = shape
        return joined

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        shape: _Shape = ctx.shape
        made = grads[0].new_zeros if shape.rows * shape.longest > shape.after else grads[0].new_empty
        prefix = made(1, shape.heads, shape.prefix, shape.size)
        rows = made(shape.rows, shape.heads, shape.longest, shape.size)
        _together_backward.run(shape.blocks, grads[0].contiguous(), prefix, rows, places, *shape.numbers)
        return prefix, rows, None, None


@compiled(inline="always")
def _sizes(asked, first):
    """P, tokens behind it, T, H, D; there are three more."""
    sizes = argument(asked, first), argument(asked, first + 1), argument(asked, first + 2)
    return (*sizes, argument(asked, first + 3), argument(asked, first + 4))


@compiled(fastmath=FAST)
def _turn(from_, begin, cos, sin, to):
    """Rotary position embedding: https://arxiv.org/abs/2104.09864."""
    half = len(to) // 2
    for i in range(half):
        one, other = get(from_, begin + i), get(from_, begin + half + i)
        put(to, i, one * get(cos, i) - other * get(sin, i))
        put(to, half + i, other * get(cos, half + i) + one * get(sin, half + i))


@compiled(fastmath=FAST)
def _turn_back(from_, cos, sin, to, begin):
    half = len(from_) // 2
    for i in range(half):
        one, other = get(from_, i), get(from_, half + i)
        put(to, begin + i, one * get(cos, i) + other * get(sin, half + i))
        put(to, begin + half + i, other * get(cos, half + i) - one * get(sin, i))


@compiled()
def _copy(from_, begin, to):
    for i in range(len(to)):
        to[i] = from_[begin + i]


@Kernel
def _apart(asked, at, like):
    P, after, T, H, D = _sizes(asked, 10)
    G, R = argument(asked, 15), argument(asked, 16)
    query_P, key_P, value_P = argument(asked, 4), argument(asked, 5), argument(asked, 6)
    query, key, value = argument(asked, 7), argument(asked, 8), argument(asked, 9)
    places = row(argument(asked, 3), 0, after, INT64)
    for n in range(at * BLOCK_TOKENS, min((at + 1) * BLOCK_TOKENS, P + after)):
        qkv = row(argument(asked, 0), n, (H + 2 * G) * D, like)
        cos, sin = row(argument(asked, 1), n, D, like), row(argument(asked, 2), n, D, like)
        if n < P:
            for h in range(H):
                _turn(qkv, h * D, cos, sin, row(query_P, h * P + n, D, like))
            for g in range(G):
                turned, kept = row(key_P, g * P + n, D, like), row(value_P, g * P + n, D, like)
                _turn(qkv, (H + g) * D, cos, sin, turned)
                _copy(qkv, (H + G + g) * D, kept)
                for r in range(R):
                    _copy(turned, 0, row(key, (r * G + g) * (P + T) + n, D, like))
                    _copy(kept, 0, row(value, (r * G + g) * (P + T) + n, D, like))
        else:
            r, t = places[n - P] // T, places[n - P] % T
            for h in range(H):
                _turn(qkv, h * D, cos, sin, row(query, (r * H + h) * T + t, D, like))
            for g in range(G):
                _turn(qkv, (H + g) * D, cos, sin, row(key, (r * G + g) * (P + T) + P + t, D, like))
                _copy(qkv, (H + G + g) * D, row(value, (r * G + g) * (P + T) + P + t, D, like))


@compiled(fastmath=FAST)
def _total(of_prefix, of_rows, P, T, g, G, n, R, D, like, to):
    """to = what the prefix's own attention gives back for its token n, and every row's."""
    if of_prefix:
        own = row(of_prefix, g * P + n, D, like)
        for i in range(D):
            to[i] = get(own, i)
    else:
        to[:] = 0
    for r in range(R):
        one = row(of_rows, (r * G + g) * (P + T) + n, D, like)
        for i in range(D):
            to[i] += get(one, i)


@Kernel
def _apart_backward(asked, at, like):
    P, after, T, H, D = _sizes(asked, 10)
    G, R, N = argument(asked, 15), argument(asked, 16), argument(asked, 17)
    query_P, key_P, value_P = argument(asked, 4), argument(asked, 5), argument(asked, 6)
    query, key, value = argument(asked, 7), argument(asked, 8), argument(asked, 9)
    places = row(argument(asked, 3), 0, after, INT64)
    total = np.empty(D, np.float32)
    for n in range(at * BLOCK_TOKENS, min((at + 1) * BLOCK_TOKENS, N)):
        grad = row(argument(asked, 0), n, (H + 2 * G) * D, like)
        cos, sin = row(argument(asked, 1), n, D, like), row(argument(asked, 2), n, D, like)
        if n >= P + after:
            grad[:] = 0
        elif n < P:
            for h in range(H):
                if query_P:
                    _turn_back(row(query_P, h * P + n, D, like), cos, sin, grad, h * D)
                else:
                    grad[h * D : (h + 1) * D] = 0
            for g in range(G):
                _total(key_P, key, P, T, g, G, n, R, D, like, total)
                _turn_back(total, cos, sin, grad, (H + g) * D)
                _total(value_P, value, P, T, g, G, n, R, D, like, total)
                for i in range(D):
                    put(grad, (H + G + g) * D + i, total[i])
        else:
            r, t = places[n - P] // T, places[n - P] % T
            for h in range(H):
                _turn_back(row(query, (r * H + h) * T + t, D, like), cos, sin, grad, h * D)
            for g in range(G):
                of_row = (r * G + g) * (P + T) + P + t
                _turn_back(row(key, of_row, D, like), cos, sin, grad, (H + g) * D)
                kept = row(value, of_row, D, like)
                for i in range(D):
                    grad[(H + G + g) * D + i] = kept[i]


@Kernel
def _together(asked, at, like):
    P, after, T, H, D = _sizes(asked, 4)
    places, N = row(argument(asked, 3), 0, after, INT64), argument(asked, 11)
    for n in range(at * BLOCK_TOKENS, min((at + 1) * BLOCK_TOKENS, N)):
        joined = row(argument(asked, 0), n, H * D, like)
        for h in range(H):
            to = joined[h * D : (h + 1) * D]
            if n < P:
                _copy(row(argument(asked, 1), h * P + n, D, like), 0, to)
            elif n < P + after:
                r, t = places[n - P] // T, places[n - P] % T
                _copy(row(argument(asked, 2), (r * H + h) * T + t, D, like), 0, to)
            else:
                to[:] = 0


@Kernel
def _together_backward(asked, at, like):
    P, after, T, H, D = _sizes(asked, 4)
    places = row(argument(asked, 3), 0, after, INT64)
    for n in range(at * BLOCK_TOKENS, min((at + 1) * BLOCK_TOKENS, P + after)):
        grad = row(argument(asked, 0), n, H * D, like)
        for h in range(H):
            if n < P:
                _copy(grad, h * D, row(argument(asked, 1), h * P + n, D, like))
            else:
                r, t = places[n - P] // T, places[n - P] % T
                _copy(grad, h * D, row(argument(asked, 2), (r * H + h) * T + t, D, like))
