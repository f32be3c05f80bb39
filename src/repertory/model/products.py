"""Products of a few rows and two panels of columns, in registers: what compiled loops multiply with.

What is multiplied is read in words of 32 bits: one number in fp32, or two in bf16 that lie side by side, which the
processor multiplies and adds up in one instruction. A panel holds a word of each of its columns, then the next word of
each, and so on: one column a lane of a vector.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from repertory.model.kernel import FP32, INT32, LANES, LLVM_INT32, compiled, intrinsic, pointer
from repertory.model.vectors import FLOATS, Vectors, number

PANEL = LANES  # columns
STRIP = 2 * PANEL  # columns of a product
ROWS = LANES // 2  # of a product: with two panels the registers hold their sums

_WORDS = ir.VectorType(LLVM_INT32, LANES)


class Products(Vectors):
    def words(self, base, at):
        """A vector of them, from word `at` on."""
        b = self.builder
        return b.load(b.bitcast(b.gep(base, [at]), ir.PointerType(_WORDS)), align=2)

    def in_every_lane(self, base, at):
        b = self.builder
        one = b.insert_element(ir.Constant(_WORDS, ir.Undefined), b.load(b.gep(base, [at]), align=2), LLVM_INT32(0))
        return b.shuffle_vector(one, one, ir.Constant(_WORDS, [0] * LANES))

    def products(self, x, w, total, is_half):
        if is_half:
            return self.bf16_products(x, w, total)
        return self.fma(self.builder.bitcast(x, FLOATS), self.builder.bitcast(w, FLOATS), total)

    def places(self, out, stride, rows, columns):
        b = self.builder
        for j in range(rows):
            for c in range(columns):
                place = b.gep(out, [b.add(b.mul(stride, number(j)), number(c * LANES))])
                yield b.bitcast(place, ir.PointerType(FLOATS))

    @property
    def zero(self):
        return ir.Constant(FLOATS, [0.0] * LANES)


def _panels(rows: int, columns: int, *, adds: bool) -> Any:
    @intrinsic
    def panels(typing, x, stride, packed, panel_size, count, out, out_stride, like):
        """out[j, : PANEL * columns] (+)= x[j] times so many panels of `count` words, for j < rows."""
        n, is_half = types.int64, like.dtype == types.uint16

        def generate(context, builder, signature, args):
            x, stride, packed, panel_size, count, out, out_stride, _ = args
            b, write = builder, Products(builder)

            def products(sums, at):
                place = b.mul(at, number(LANES))
                weights = [write.words(packed, b.add(b.mul(panel_size, number(c)), place)) for c in range(columns)]
                found = []
                for j in range(rows):
                    word = write.in_every_lane(x, b.add(b.mul(stride, number(j)), at))
                    for c in range(columns):
                        found.append(write.products(word, weights[c], sums[j * columns + c], is_half))
                return found

            places = list(write.places(out, out_stride, rows, columns))
            begin = [b.load(place, align=4) for place in places] if adds else [write.zero] * rows * columns
            for place, total in zip(places, write.loop(count, 1, begin, products)[0], strict=True):
                b.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(x, n, packed, n, n, out, n, like), generate

    return panels


_many_2, _many_1 = _panels(ROWS, 2, adds=False), _panels(ROWS, 1, adds=False)
_one_2, _one_1 = _panels(1, 2, adds=False), _panels(1, 1, adds=False)
_add_many_2 = _panels(ROWS, 2, adds=True)


@compiled()
def multiply_tile(x, stride, packed, panel_size, count, out, out_stride, like):
    """out[j, :STRIP] = x[j] times two panels, for j < ROWS; see `multiply`."""
    to = pointer(out, FP32)
    _many_2(pointer(x, INT32), stride, pointer(packed, INT32), panel_size, count, to, out_stride, like)


@compiled()
def multiply_panel(x, stride, packed, count, out, out_stride, like):
    """out[j, :PANEL] = x[j] times one panel, for j < ROWS."""
    _many_1(pointer(x, INT32), stride, pointer(packed, INT32), 0, count, pointer(out, FP32), out_stride, like)


@compiled()
def add_tile(x, stride, packed, panel_size, count, out, out_stride, like):
    """`multiply_tile`, on top of what is in `out`."""
    to = pointer(out, FP32)
    _add_many_2(pointer(x, INT32), stride, pointer(packed, INT32), panel_size, count, to, out_stride, like)


@compiled()
def multiply(rows, x, stride, packed, panel_size, count, columns, out, out_stride, like):
    """out[j, : PANEL * columns] = x[j] times one or two panels, for j < rows <= ROWS.

    x, packed, out: addresses; stride, panel_size: words from one row or panel to the next; out_stride: numbers.
    """
    if rows == ROWS and columns == 2:
        multiply_tile(x, stride, packed, panel_size, count, out, out_stride, like)
    elif rows == ROWS:
        multiply_panel(x, stride, packed, count, out, out_stride, like)
    else:
        weights = pointer(packed, INT32)
        for j in range(rows):
            from_, to = pointer(x + 4 * j * stride, INT32), pointer(out + 4 * j * out_stride, FP32)
            if columns == 2:
                _one_2(from_, stride, weights, panel_size, count, to, out_stride, like)
            else:
                _one_1(from_, stride, weights, panel_size, count, to, out_stride, like)
