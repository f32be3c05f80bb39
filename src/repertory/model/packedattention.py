"""Attention over packed rows on a CPU, in compiled loops: from joined queries, keys and values to what was seen.

A row's tokens see the prefix and the row up to themselves. Nothing is padded but a block's end, no prefix is copied for
its rows, and no weight leaves the core that computes it: the backward pass computes the weights again, once by queries
and once by keys, so that each gradient is summed by one thread in one order (https://arxiv.org/abs/2307.08691).

Each segment, the prefix and every row, is cut into blocks of PANEL tokens. Their keys lie in panels (`products`) for
the scores, whose words run along a head, and their values in panels for the sums, whose words run along the tokens. In
the backward pass queries and gradients lie in panels as well.

Shapes: H query heads, G key/value heads, D head size, N tokens, B blocks.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from repertory.model.kernel import (
    FAST,
    FP32,
    HAS_BF16_PRODUCTS,
    INT32,
    INT64,
    Kernel,
    address,
    argument,
    bits,
    compiled,
    exp,
    float_argument,
    from_bits,
    get,
    put,
    row,
)
from repertory.model.products import PANEL, ROWS, STRIP, add_tile, multiply_panel, multiply_tile
from repertory.model.rotation import copy, turn, turn_back

CHUNK = 64  # blocks at a time in the backward pass, so that what is computed of them stays in the cache
APART = PANEL  # numbers between two rows of scores: rows of 4 KiB each would have the same places in the cache
NOWHERE = 2**30  # the position of padding

# Of each block: its first token, tokens, and the first and the end of the blocks of its segment.
FACTS = 4
TOKEN, COUNT, FIRST, END = range(FACTS)


@dataclass(frozen=True)
class Segments:
    facts: Tensor  # (B, FACTS)
    positions: Tensor  # (B * PANEL,) of each token in its own sequence, int32
    prefix_blocks: int

    @staticmethod
    @lru_cache(maxsize=8)  # all layers of a pass ask for the same
    def of(prefix: int, lengths: tuple[int, ...]) -> Segments:
        facts: list[tuple[int, int, int, int]] = []
        positions, token = [], 0
        for length, begin in ((prefix, 0), *((length, prefix) for length in lengths)):
            first, blocks = len(facts), -(-length // PANEL)
            for at in range(0, length, PANEL):
                facts.append((token + at, min(PANEL, length - at), first, first + blocks))
            positions.append(torch.full((blocks * PANEL,), NOWHERE, dtype=torch.int32))
            positions[-1][:length] = torch.arange(begin, begin + length)
            token += length
        return Segments(torch.tensor(facts), torch.cat(positions), -(-prefix // PANEL))

    @property
    def blocks(self) -> int:
        return len(self.facts)


def fits(itemsize: int, head_size: int) -> bool:
    """Whether numbers of so many bytes, that kernels can compute with, and heads of this size can go through it."""
    return head_size % STRIP == 0 and (itemsize == 4 or HAS_BF16_PRODUCTS)


class PackedAttention(torch.autograd.Function):
    """(1, N, (H + 2 G) D), cosine and sine (1, N, D) -> (1, N, H D). What follows the segments is padding."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        segments: Segments,
        heads: int,
        groups: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        tokens, size, blocks = qkv.shape[1], cos.shape[-1], segments.blocks
        packed = qkv.new_empty(2 * groups * blocks * PANEL * size)  # a head of each has the same place in both kinds
        seen = qkv.new_empty(1, tokens, heads * size)
        logsums = torch.zeros(heads * blocks * PANEL)
        numbers = (blocks, segments.prefix_blocks, heads, groups, size, scale, min(window or NOWHERE, NOWHERE))
        where = segments.facts, segments.positions
        _pack.run(blocks * 2 * groups, qkv, cos, sin, 0, 0, 0, packed, packed, *where, *numbers)
        _attend.run(blocks * groups, seen, qkv, cos, sin, logsums, packed, packed, *where, *numbers)
        end = int(segments.facts[-1, TOKEN] + segments.facts[-1, COUNT])
        seen[:, end:] = 0
        ctx.save_for_backward(qkv, cos, sin, seen, logsums)
        ctx.segments, ctx.numbers, ctx.end = segments, numbers, end
        return seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin, seen, logsums = ctx.saved_tensors
        blocks, _, heads, groups, size, *_ = ctx.numbers
        grad = grads[0].contiguous()
        every = 2 * heads + 2 * groups  # heads of queries, keys, values and the gradient
        packed = [qkv.new_empty(every * blocks * PANEL * size) for _ in range(2)]
        shifts, grad_qkv = torch.zeros_like(logsums), torch.empty_like(qkv)
        where = ctx.segments.facts, ctx.segments.positions
        _pack.run(blocks * every, qkv, cos, sin, grad, seen, shifts, *packed, *where, *ctx.numbers)
        _attend_backward.run(
            2 * blocks * groups, grad_qkv, qkv, cos, sin, grad, logsums, shifts, *packed, *where, *ctx.numbers
        )
        grad_qkv[:, ctx.end :] = 0
        return grad_qkv, *[None] * 7


@compiled(inline="always")
def _numbers(asked, first):
    """B, blocks of the prefix, H, G, D; a scale and a window follow."""
    some = argument(asked, first), argument(asked, first + 1), argument(asked, first + 2)
    return (*some, argument(asked, first + 3), argument(asked, first + 4))


@compiled()
def _turn_rows(x, stride, cos, sin, rows, D, to, like):
    """One head of so many tokens; `stride` numbers from one token to the next."""
    size = like.itemsize
    for r in range(rows):
        place = r * D * size
        turn(x + r * stride * size, cos + place, sin + place, D, to + place, like)


@compiled()
def _copy_rows(x, stride, rows, D, to, like):
    for r in range(rows):
        copy(x + r * stride * like.itemsize, D, to + r * D * like.itemsize, like)


@compiled(fastmath=FAST)
def _write(sums, factor, D, to, like):
    from_, written = row(sums, 0, D, FP32), row(to, 0, D, like)
    for i in range(D):
        put(written, i, from_[i] * factor)


def joined(one, other):
    """The word of two numbers in bf16; of one in fp32."""


@overload(joined, inline="always")
def _joined(one, other):
    if one == types.uint16:
        return lambda one, other: np.uint32(one) | (np.uint32(other) << np.uint32(16))
    return lambda one, other: bits(one)


@compiled()
def _pack_depths(block, words, to):
    """A panel whose words run along a head. block: PANEL tokens of so many words."""
    for w in range(words):
        panel = row(to, w, PANEL, INT32)
        for lane in range(PANEL):
            panel[lane] = row(block, lane, words, INT32)[w]


@compiled()
def _pack_tokens(block, D, to, panel_size, like):
    """Panels whose words run along the tokens; `panel_size` words from one to the next."""
    per_word = 4 // like.itemsize
    for t in range(0, PANEL, per_word):
        one, other = row(block, t, D, like), row(block, t + per_word - 1, D, like)
        for c in range(D // PANEL):
            panel = row(to + 4 * (c * panel_size + t // per_word * PANEL), 0, PANEL, INT32)
            from_one, from_other = row(address(one, 0), c, PANEL, like), row(address(other, 0), c, PANEL, like)
            for lane in range(PANEL):
                panel[lane] = joined(from_one[lane], from_other[lane])


@compiled(inline="always")
def _depths_at(packed, head, block, B, words):
    return packed + 4 * (head * B + block) * PANEL * words


@compiled(inline="always")
def _tokens_at(packed, head, column, block, B, D, per_word):
    """Of the panel of `column`, at a block."""
    return packed + 4 * ((head * D + column) // PANEL * B + block) * (PANEL // per_word) * PANEL


@Kernel
def _pack(asked, at, like):
    """Forward: keys for the scores, values for the sums. Backward, where there is a gradient: queries, keys and the
    gradient for both, values for the scores' gradients, and of each query the sum by which those are shifted.
    """
    grad, seen = argument(asked, 3), argument(asked, 4)
    depths, tokens = argument(asked, 6), argument(asked, 7)
    B, _, H, G, D = _numbers(asked, 10)
    per_word = 4 // like.itemsize
    block, head = at % B, at // B  # heads of queries, keys, values, the gradient; forward of keys and values alone
    fact = row(argument(asked, 8), block, FACTS, INT64)
    kind = head if grad else head + H
    from_, width, begin = argument(asked, 0), (H + 2 * G) * D, kind * D
    if kind >= H + 2 * G:
        from_, width, begin = grad, H * D, (kind - H - 2 * G) * D
    heads = np.zeros(PANEL * D, like.dtype)
    for j in range(fact[COUNT]):
        n = fact[TOKEN] + j
        x, to = from_ + (n * width + begin) * like.itemsize, address(heads, j * D)
        if kind < H + G:
            cos, sin = argument(asked, 1) + n * D * like.itemsize, argument(asked, 2) + n * D * like.itemsize
            turn(x, cos, sin, D, to, like)
        else:
            copy(x, D, to, like)
    is_value = H + G <= kind < H + 2 * G
    if grad or not is_value:
        _pack_depths(address(heads, 0), D // per_word, _depths_at(depths, head, block, B, D // per_word))
    if is_value != (grad != 0):
        panel_size = B * (PANEL // per_word) * PANEL
        _pack_tokens(address(heads, 0), D, _tokens_at(tokens, head, 0, block, B, D, per_word), panel_size, like)
    if kind >= H + 2 * G:
        shifts = row(argument(asked, 5), (kind - H - 2 * G) * B + block, PANEL, FP32)
        for j in range(fact[COUNT]):
            of_seen = row(seen + ((fact[TOKEN] + j) * width + begin) * like.itemsize, 0, D, like)
            shifts[j] = _dot(row(address(heads, j * D), 0, D, like), of_seen)


@compiled(fastmath=FAST)
def _dot(one, other):
    total = np.float32(0)
    for i in range(len(one)):
        total += get(one, i) * get(other, i)
    return total


@compiled()
def _by_depths(x, words, packed, blocks, to, stride, like):
    """ROWS rows times the panels of so many blocks."""
    for i in range(0, blocks - 1, 2):
        panels = packed + 4 * i * PANEL * words
        multiply_tile(x, words, panels, PANEL * words, words, to + 4 * i * PANEL, stride, like)
    if blocks % 2:
        last = blocks - 1
        multiply_panel(x, words, packed + 4 * last * PANEL * words, words, to + 4 * last * PANEL, stride, like)


@compiled()
def _add_by_tokens(x, stride, packed, panel_size, blocks, to, D, like):
    """On top of what is there: ROWS rows over the tokens of so many blocks times their numbers."""
    count = blocks * (PANEL // (4 // like.itemsize))
    for column in range(0, D, STRIP):
        panels = packed + 4 * column // PANEL * panel_size
        add_tile(x, stride, panels, panel_size, count, to + 4 * column, D, like)


@compiled(fastmath=FAST)
def _hide(scores, positions, first, last, blocks):
    """Those of keys that are not from `first` to `last` become -inf."""
    begin = (blocks - 1) * PANEL  # where padding is, or what comes later
    if row(positions, 0, 1, INT32)[0] < first:
        begin = 0
    count = blocks * PANEL - begin
    some, places = row(scores + 4 * begin, 0, count, FP32), row(positions + 4 * begin, 0, count, INT32)
    for i in range(count):
        some[i] = some[i] if places[i] >= first and places[i] <= last else np.float32(-np.inf)


@compiled()
def _largest(scores, count):
    """By bits, which are in the order of the numbers if those below 0 are turned around; and which vectors compare."""
    some, largest = row(scores, 0, count, INT32), np.int32(-(2**31))
    for i in range(count):
        ordered = some[i] ^ ((some[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))
        largest = max(largest, ordered)
    return from_bits(np.uint32(largest ^ ((largest >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@compiled(fastmath=FAST)
def _weigh(scores, count, most, scale, to, like):
    """Their exponentials, of which `most` becomes 1; the sum."""
    some, weights, total = row(scores, 0, count, FP32), row(to, 0, count, like), np.float32(0)
    for i in range(count):
        x = (some[i] - most) * scale
        weight = exp(x)
        weight = np.float32(0) if x < np.float32(-87) else weight
        weight = weight if x == x else x
        total += weight
        put(weights, i, weight)
    return total


@Kernel
def _attend(asked, at, like):
    """A block's queries of the heads that share a key."""
    qkv, cos, sin, logsums = argument(asked, 1), argument(asked, 2), argument(asked, 3), argument(asked, 4)
    depths, tokens, positions = argument(asked, 5), argument(asked, 6), argument(asked, 8)
    B, prefix_blocks, H, G, D = _numbers(asked, 9)
    scale, window = float_argument(asked, 14), argument(asked, 15)
    size, per_word = like.itemsize, 4 // like.itemsize
    words, width = D // per_word, (H + 2 * G) * D
    block, g = B - 1 - at // G, at % G  # the last blocks of a row have the most to see
    fact = row(argument(asked, 7), block, FACTS, INT64)
    first_block, before = fact[FIRST], prefix_blocks if block >= prefix_blocks else 0
    own = block + 1 - first_block
    columns = (before + own) * PANEL
    stride = columns + APART
    scores, weights = np.empty(ROWS * stride, np.float32), np.empty(ROWS * stride, like.dtype)
    query, sums = np.zeros(ROWS * D, like.dtype), np.empty(ROWS * D, np.float32)
    totals = np.empty(ROWS, np.float32)
    panel_size = B * (PANEL // per_word) * PANEL
    keys_before, keys_own = _depths_at(depths, g, 0, B, words), _depths_at(depths, g, first_block, B, words)
    values_before = _tokens_at(tokens, G + g, 0, 0, B, D, per_word)
    values_own = _tokens_at(tokens, G + g, 0, first_block, B, D, per_word)
    for h in range(g * (H // G), (g + 1) * (H // G)):
        logsum = row(logsums, h * B + block, PANEL, FP32)
        for j in range(0, fact[COUNT], ROWS):
            rows, n = min(ROWS, fact[COUNT] - j), fact[TOKEN] + j
            x, place = qkv + (n * width + h * D) * size, n * D * size
            _turn_rows(x, width, cos + place, sin + place, rows, D, address(query, 0), like)
            x, to = address(query, 0), address(scores, 0)
            _by_depths(x, words, keys_before, before, to, stride, like)
            _by_depths(x, words, keys_own, own, to + 4 * before * PANEL, stride, like)
            for r in range(rows):
                some, to = address(scores, r * stride), address(weights, r * stride)
                last = row(positions, block * PANEL + j + r, 1, INT32)[0]
                first = np.int32(last - window + 1)
                if before:
                    _hide(some, positions, first, last, before)
                _hide(some + 4 * before * PANEL, positions + 4 * first_block * PANEL, first, last, own)
                largest = _largest(some, columns)
                totals[r] = _weigh(some, columns, largest, scale, to, like)
                logsum[j + r] = largest * scale + np.log(totals[r])
            sums[:] = 0
            x, to = address(weights, 0), address(sums, 0)
            _add_by_tokens(x, stride // per_word, values_before, panel_size, before, to, D, like)
            x += before * PANEL * size
            _add_by_tokens(x, stride // per_word, values_own, panel_size, own, to, D, like)
            for r in range(rows):
                to = argument(asked, 0) + ((n + r) * H + h) * D * size
                _write(address(sums, r * D), np.float32(1) / totals[r], D, to, like)


@compiled(fastmath=FAST)
def _weigh_again(scores, positions, first, last, scale, logsums, count):
    """In place: the weights, whose logarithms are the scaled scores less `logsums`."""
    some, places, less = row(scores, 0, count, FP32), row(positions, 0, count, INT32), row(logsums, 0, count, FP32)
    for i in range(count):
        x = some[i] * scale - less[i]
        weight = exp(x)
        weight = weight if x == x else x
        some[i] = weight if places[i] >= first and places[i] <= last else np.float32(0)


@compiled(fastmath=FAST)
def _scores_backward(weights, gradients, shifts, scale, to, count, like):
    """The gradients of the scores, from those of the weights."""
    some, grads, less = row(weights, 0, count, FP32), row(gradients, 0, count, FP32), row(shifts, 0, count, FP32)
    written = row(to, 0, count, like)
    for i in range(count):
        put(written, i, some[i] * (grads[i] - less[i]) * scale)


@compiled()
def _queries_backward(asked, block, g, like):
    """Of a block's queries of the heads that share a key."""
    qkv, cos, sin, grad = argument(asked, 1), argument(asked, 2), argument(asked, 3), argument(asked, 4)
    logsums, shifts, depths, tokens = argument(asked, 5), argument(asked, 6), argument(asked, 7), argument(asked, 8)
    positions = argument(asked, 10)
    B, prefix_blocks, H, G, D = _numbers(asked, 11)
    scale, window = float_argument(asked, 16), argument(asked, 17)
    size, per_word = like.itemsize, 4 // like.itemsize
    words, width = D // per_word, (H + 2 * G) * D
    fact = row(argument(asked, 9), block, FACTS, INT64)
    before = prefix_blocks if block >= prefix_blocks else 0
    query, given = np.zeros(ROWS * D, like.dtype), np.zeros(ROWS * D, like.dtype)
    most = min(CHUNK, max(before, block + 1 - fact[FIRST])) * PANEL
    stride = most + APART
    scores, gradients = np.empty(ROWS * stride, np.float32), np.empty(ROWS * stride, np.float32)
    back, sums = np.empty(ROWS * stride, like.dtype), np.empty(ROWS * D, np.float32)
    logsum, shift = np.empty(most, np.float32), np.empty(most, np.float32)
    panel_size = B * (PANEL // per_word) * PANEL
    for h in range(g * (H // G), (g + 1) * (H // G)):
        for j in range(0, fact[COUNT], ROWS):
            rows, n = min(ROWS, fact[COUNT] - j), fact[TOKEN] + j
            x, place = qkv + (n * width + h * D) * size, n * D * size
            _turn_rows(x, width, cos + place, sin + place, rows, D, address(query, 0), like)
            _copy_rows(grad + (n * H + h) * D * size, H * D, rows, D, address(given, 0), like)
            sums[:] = 0
            for own in range(2):
                at, end = (fact[FIRST], block + 1) if own else (0, before)
                while at < end:
                    blocks = min(CHUNK, end - at)
                    keys, values = (
                        _depths_at(depths, H + g, at, B, words),
                        _depths_at(depths, H + G + g, at, B, words),
                    )
                    _by_depths(address(query, 0), words, keys, blocks, address(scores, 0), stride, like)
                    _by_depths(address(given, 0), words, values, blocks, address(gradients, 0), stride, like)
                    count, places = blocks * PANEL, positions + 4 * at * PANEL
                    for r in range(rows):
                        logsum[:] = row(logsums, h * B + block, PANEL, FP32)[j + r]
                        shift[:] = row(shifts, h * B + block, PANEL, FP32)[j + r]
                        last = row(positions, block * PANEL + j + r, 1, INT32)[0]
                        first = np.int32(last - window + 1)
                        some, grads = address(scores, r * stride), address(gradients, r * stride)
                        _weigh_again(some, places, first, last, scale, address(logsum, 0), count)
                        to = address(back, r * stride)
                        _scores_backward(some, grads, address(shift, 0), scale, to, count, like)
                    keys = _tokens_at(tokens, H + g, 0, at, B, D, per_word)
                    x, to = address(back, 0), address(sums, 0)
                    _add_by_tokens(x, stride // per_word, keys, panel_size, blocks, to, D, like)
                    at += blocks
            for r in range(rows):
                place = (n + r) * D * size
                to = argument(asked, 0) + ((n + r) * width + h * D) * size
                turn_back(address(sums, r * D), cos + place, sin + place, D, to, like)


@compiled()
def _keys_backward(asked, block, g, like):
    """Of a block's keys and values: from the queries behind them in their segment, and for the prefix all rows'."""
    qkv, cos, sin = argument(asked, 1), argument(asked, 2), argument(asked, 3)
    logsums, shifts, depths, tokens = argument(asked, 5), argument(asked, 6), argument(asked, 7), argument(asked, 8)
    positions = argument(asked, 10)
    B, prefix_blocks, H, G, D = _numbers(asked, 11)
    scale, window = float_argument(asked, 16), argument(asked, 17)
    size, per_word = like.itemsize, 4 // like.itemsize
    words, width = D // per_word, (H + 2 * G) * D
    fact = row(argument(asked, 9), block, FACTS, INT64)
    key, value = np.zeros(ROWS * D, like.dtype), np.zeros(ROWS * D, like.dtype)
    end = B if block < prefix_blocks else fact[END]
    stride = min(CHUNK, end - block) * PANEL + APART
    scores, gradients = np.empty(ROWS * stride, np.float32), np.empty(ROWS * stride, np.float32)
    weights, back = np.empty(ROWS * stride, like.dtype), np.empty(ROWS * stride, like.dtype)
    key_sums, value_sums = np.empty(ROWS * D, np.float32), np.empty(ROWS * D, np.float32)
    panel_size = B * (PANEL // per_word) * PANEL
    for j in range(0, fact[COUNT], ROWS):
        rows, n = min(ROWS, fact[COUNT] - j), fact[TOKEN] + j
        x, place = qkv + (n * width + (H + g) * D) * size, n * D * size
        _turn_rows(x, width, cos + place, sin + place, rows, D, address(key, 0), like)
        _copy_rows(x + G * D * size, width, rows, D, address(value, 0), like)
        key_sums[:] = 0
        value_sums[:] = 0
        at = block
        while at < end:
            blocks = min(CHUNK, end - at)
            count, places = blocks * PANEL, positions + 4 * at * PANEL
            for h in range(g * (H // G), (g + 1) * (H // G)):
                queries = _depths_at(depths, h, at, B, words)
                grads = _depths_at(depths, H + 2 * G + h, at, B, words)
                _by_depths(address(key, 0), words, queries, blocks, address(scores, 0), stride, like)
                _by_depths(address(value, 0), words, grads, blocks, address(gradients, 0), stride, like)
                of_queries = 4 * (h * B + at) * PANEL
                for r in range(rows):
                    first = row(positions, block * PANEL + j + r, 1, INT32)[0]
                    last = np.int32(min(first + window, NOWHERE) - 1)
                    some, of_weights = address(scores, r * stride), address(gradients, r * stride)
                    _weigh_again(some, places, first, last, scale, logsums + of_queries, count)
                    _write(some, np.float32(1), count, address(weights, r * stride), like)
                    to = address(back, r * stride)
                    _scores_backward(some, of_weights, shifts + of_queries, scale, to, count, like)
                grads = _tokens_at(tokens, H + 2 * G + h, 0, at, B, D, per_word)
                x, to = address(weights, 0), address(value_sums, 0)
                _add_by_tokens(x, stride // per_word, grads, panel_size, blocks, to, D, like)
                queries = _tokens_at(tokens, h, 0, at, B, D, per_word)
                x, to = address(back, 0), address(key_sums, 0)
                _add_by_tokens(x, stride // per_word, queries, panel_size, blocks, to, D, like)
            at += blocks
        for r in range(rows):
            place = (n + r) * D * size
            to = argument(asked, 0) + ((n + r) * width + (H + g) * D) * size
            turn_back(address(key_sums, r * D), cos + place, sin + place, D, to, like)
            _write(address(value_sums, r * D), np.float32(1), D, to + G * D * size, like)


@Kernel
def _attend_backward(asked, at, like):
    """First a block's keys and values, then a block's queries."""
    B, _, _, G, _ = _numbers(asked, 11)
    if at < B * G:
        _keys_backward(asked, at // G, at % G, like)
    else:
        _queries_backward(asked, B - 1 - (at - B * G) // G, at % G, like)
