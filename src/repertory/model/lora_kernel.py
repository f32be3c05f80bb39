"""The small products of LoRA in bf16, for processors that multiply bf16: `correct`, `correct_backward`, `gradients`.

Ranks are a dozen or two: products so narrow run at a tenth of the rate of the base's in a general library, and their
results go through memory several times. Here a block of tokens is read, corrected and written in one go.

The weights are packed once for each direction (`Panels`) as `products` reads them, two rows of a weight side by side;
all widths are multiples of a strip of columns. Ranks are filled up with zeros to multiples of 16.

Shapes: N tokens, K what is summed over, R ranks of all siblings together.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from repertory.model.kernel import (
    BF16,
    FAST,
    FP32,
    INT8,
    INT32,
    INT64,
    LANES,
    LLVM_INT32,
    Kernel,
    address,
    argument,
    compiled,
    float_argument,
    from_bits,
    get,
    intrinsic,
    pointer,
    put,
    row,
)
from repertory.model.products import PANEL, ROWS, STRIP, Products, multiply
from repertory.model.vectors import number

BLOCK_TOKENS = 32
# Of each sibling: where its outputs begin, how many; where its ranks begin, how many, how many of these are not filled
# up; where its panels begin; the addresses of the gradients of its A and its B.
FACTS = 8
STRETCH = 11  # numbers about one
BEGIN, OUTPUTS, FIRST, RANKS, REAL, PANELS, GRAD_A, GRAD_B = range(FACTS)


@intrinsic
def _outer(typing, x, stride, low, low_stride, pairs, out):
    """out[k, :STRIP] = sum_n low[n, k] x[n, :STRIP], for k < ROWS. Of `low` two tokens stand side by side."""
    n = types.int64

    def generate(context, builder, signature, args):
        x, stride, low, low_stride, pairs, out = args
        b, write = builder, Products(builder)
        half = ir.VectorType(ir.IntType(16), LANES)
        mixed = ir.Constant(ir.VectorType(LLVM_INT32, 2 * LANES), [at // 2 + at % 2 * LANES for at in range(2 * LANES)])

        def half_row(at):
            return b.load(b.bitcast(b.gep(x, [at]), ir.PointerType(half)), align=2)

        def products(sums, at):
            first = b.mul(stride, b.mul(at, number(2)))
            strips = []
            for c in range(2):
                place = b.add(first, number(c * LANES))
                strips.append(b.shuffle_vector(half_row(place), half_row(b.add(place, stride)), mixed))
            found = []
            for k in range(ROWS):
                two = write.in_every_lane(low, b.add(b.mul(low_stride, at), number(k)))
                for c in range(2):
                    found.append(write.bf16_products(two, strips[c], sums[2 * k + c]))
            return found

        sums = write.loop(pairs, 1, [write.zero] * 2 * ROWS, products)[0]
        for place, total in zip(write.places(out, number(STRIP), ROWS, 2), sums, strict=True):
            b.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(x, n, low, n, n, out), generate


@compiled()
def _multiply(count, x, x_stride, packed, panel_size, pairs, columns, out):
    """`count` rows, ROWS or fewer, times one or two panels; strides in numbers."""
    multiply(count, x, x_stride // 2, packed, panel_size // 2, pairs, columns, address(out, 0), STRIP, BF16)


@compiled(fastmath=FAST)
def _reduce(count, x, x_stride, packed, pairs, ranks, first, R, scaling, low, out):
    """low[j, first:first + ranks] = scaling * x[j] times the panels of so many ranks."""
    for k in range(0, ranks, STRIP):
        width = min(STRIP, ranks - k)
        _multiply(count, x, x_stride, packed + 4 * pairs * k, 2 * PANEL * pairs, pairs, width // PANEL, out)
        for j in range(count):
            for i in range(width):
                put(low, j * R + first + k + i, scaling * out[j * STRIP + i])


@compiled()
def _interleave(low, count, n, R, pairs):
    """Into `pairs` (N / 2, R, 2) the tokens from n on."""
    for j in range(count):
        for k in range(R):
            pairs[((n + j) // 2 * R + k) * 2 + (n + j) % 2] = low[j * R + k]


@compiled(fastmath=FAST)
def _expand(count, low, first, R, packed, ranks, width, to, to_stride, mask, mask_stride, out):
    """to[j] += low[j, first:first + ranks] times the panels of `width` columns; only where there is a mask's bit."""
    pairs = ranks // 2
    for o in range(0, width, STRIP):
        _multiply(count, address(low, first), R, packed + 2 * o * ranks, PANEL * ranks, pairs, 2, out)
        for j in range(count):
            y = row(to + 2 * (j * to_stride + o), 0, STRIP, BF16)
            if mask:
                kept = row(mask + j * mask_stride + o, 0, STRIP, INT8)
                for i in range(STRIP):
                    put(y, i, get(y, i) + (out[j * STRIP + i] if kept[i] else np.float32(0)))
            else:
                for i in range(STRIP):
                    put(y, i, get(y, i) + out[j * STRIP + i])


@Kernel
def correct(asked, at, like):
    """y += scaling * x A' B', sibling by sibling, for several stretches of tokens, each with the adapter of its own.

    Asked are the stretches, their number, in_features and out_features. Of each: its first block of the work; the
    addresses of its x and y, of packed A (by ranks) and B (by outputs), of its facts, and of the low ranks in pairs for
    the backward pass, or 0; N, R, siblings, and the bits of the scaling.
    """
    which = argument(asked, 1) - 1
    while row(argument(asked, 0), which, STRETCH, INT64)[0] > at:
        which -= 1
    stretch, K, width = row(argument(asked, 0), which, STRETCH, INT64), argument(asked, 2), argument(asked, 3)
    x, to, A, pairs = stretch[1], stretch[2], stretch[3], stretch[6]
    N, R, scaling = stretch[7], stretch[8], from_bits(np.uint32(stretch[10]))
    out, low = np.empty(ROWS * STRIP, np.float32), np.empty(ROWS * R, np.uint16)
    block = at - stretch[0]
    for n in range(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, N), ROWS):
        count = min(ROWS, N - n)
        _reduce(count, x + 2 * n * K, K, A, K // 2, R, 0, R, scaling, low, out)
        if pairs:
            _interleave(low, count, n, R, row(pairs, 0, N * R, BF16))
        for s in range(stretch[9]):
            fact = row(stretch[5], s, FACTS, INT64)
            B, y = stretch[4] + 2 * fact[PANELS], to + 2 * (n * width + fact[BEGIN])
            _expand(count, low, fact[FIRST], R, B, fact[RANKS], fact[OUTPUTS], y, width, 0, 0, out)


@Kernel
def correct_backward(asked, at, like):
    """grad_x += scaling * grad_y B A, where the mask is, if there is one.

    grad_y (N, out_features), grad_x (N, in_features) or 0, packed B (by ranks), packed A (by inputs), facts; the
    gradients of the low ranks in pairs; mask (N, in_features) or 0; N, in_features, out_features, R, siblings, scaling.
    """
    N, K, width, R, siblings = (
        argument(asked, 7),
        argument(asked, 8),
        argument(asked, 9),
        argument(asked, 10),
        argument(asked, 11),
    )
    scaling = float_argument(asked, 12)
    out, low = np.empty(ROWS * STRIP, np.float32), np.empty(ROWS * R, np.uint16)
    for n in range(at * BLOCK_TOKENS, min((at + 1) * BLOCK_TOKENS, N), ROWS):
        count = min(ROWS, N - n)
        for s in range(siblings):
            fact = row(argument(asked, 4), s, FACTS, INT64)
            grad_y, B = argument(asked, 0) + 2 * (n * width + fact[BEGIN]), argument(asked, 2) + 2 * fact[PANELS]
            _reduce(count, grad_y, width, B, fact[OUTPUTS] // 2, fact[RANKS], fact[FIRST], R, scaling, low, out)
        _interleave(low, count, n, R, row(argument(asked, 5), 0, N * R, BF16))
        if argument(asked, 1):
            grad_x, mask = argument(asked, 1) + 2 * n * K, argument(asked, 6)
            if mask:
                mask += n * K
            _expand(count, low, 0, R, argument(asked, 3), R, K, grad_x, K, mask, K, out)


@Kernel
def gradients(asked, at, like):
    """Of A (r, in_features) and of B (outputs, r), in fp32, sums over all tokens: 32 columns of x or of grad_y.

    x, grad_y, low ranks in pairs and their gradients, facts; N, in_features, out_features, R, siblings.
    """
    N, K, width, R, siblings = (
        argument(asked, 5),
        argument(asked, 6),
        argument(asked, 7),
        argument(asked, 8),
        argument(asked, 9),
    )
    out = np.empty(ROWS * STRIP, np.float32)
    to = pointer(address(out, 0), FP32)
    of_A = K // STRIP
    column = at * STRIP if at < of_A else (at - of_A) * STRIP
    for s in range(siblings):
        fact = row(argument(asked, 4), s, FACTS, INT64)
        begin, first, real = fact[BEGIN], fact[FIRST], fact[REAL]
        for k in range(0, real, ROWS):
            if at < of_A:
                low, x = argument(asked, 3) + 4 * (first + k), argument(asked, 0) + 2 * column
                _outer(pointer(x, BF16), K, pointer(low, INT32), R, N // 2, to)
                for j in range(min(ROWS, real - k)):
                    grad = row(fact[GRAD_A], k + j, K, FP32)
                    for i in range(STRIP):
                        grad[column + i] = out[j * STRIP + i]
            elif begin <= column < begin + fact[OUTPUTS]:
                low, y = argument(asked, 2) + 4 * (first + k), argument(asked, 1) + 2 * column
                _outer(pointer(y, BF16), width, pointer(low, INT32), R, N // 2, to)
                for i in range(STRIP):
                    grad = row(fact[GRAD_B], column - begin + i, real, FP32)
                    for j in range(min(ROWS, real - k)):
                        grad[k + j] = out[j * STRIP + i]


@Kernel
def pack(asked, at, like):
    """One weight in bf16 or fp32, as their size says.

    Of each weight: the address of its first number, elements from one number of K to the next and from one column to
    the next, numbers of K, columns, pairs of a panel, address of the first panel, numbers from one panel to the next.
    """
    about = row(argument(asked, 0), at, 8, INT64)
    if argument(asked, 1) == 2:
        _pack(about, BF16)
    else:
        _pack(about, FP32)


@compiled()
def _pack(about, like):
    next_k, next_column, K, columns, pairs = about[1], about[2], about[3], about[4], about[5]
    numbers = row(about[0], 0, K * next_k + columns * next_column, like)
    for first in range(0, columns, PANEL):
        panel = row(about[6] + 2 * first // PANEL * about[7], 0, pairs * 2 * PANEL, BF16)
        for p in range(pairs):
            for c in range(PANEL):
                for half in range(2):
                    k, value = 2 * p + half, np.float32(0)
                    if k < K and first + c < columns:
                        value = get(numbers, k * next_k + (first + c) * next_column)
                    put(panel, (p * PANEL + c) * 2 + half, value)
