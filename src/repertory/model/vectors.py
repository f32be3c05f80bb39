"""LLVM instructions over whole vector registers, which numba's own loops do not reach: for the innermost loops."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from repertory.model.kernel import LANES, LLVM_FLOAT, LLVM_INT32, LLVM_INT64

FLOATS = ir.VectorType(LLVM_FLOAT, LANES)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type of bf16 numbers, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


def number(value: int) -> Any:
    return ir.Constant(LLVM_INT64, value)


class Vectors:
    """Writes instructions."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def either(self, condition, one, other):
        """The vectors that `one` or `other` computes."""
        b = self.builder
        blocks = [b.append_basic_block(name) for name in ("one", "other", "joined")]
        b.cbranch(condition, blocks[0], blocks[1])
        found = []
        for block, way in zip(blocks, (one, other), strict=False):
            b.position_at_end(block)
            found.append((way(), b.block))
            b.branch(blocks[2])
        b.position_at_end(blocks[2])
        phis = []
        for values in zip(*(values for values, _ in found), strict=True):
            phi = b.phi(FLOATS)
            for value, (_, block) in zip(values, found, strict=True):
                phi.add_incoming(value, block)
            phis.append(phi)
        return phis

    def loop(self, end, step, carried, body):
        """`carried`, after `body` was at 0, step, 2 step, ... while a step fits before `end`; and where that ended."""
        b = self.builder
        before = b.block
        head, inside, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        at = b.phi(LLVM_INT64)
        at.add_incoming(number(0), before)
        phis = [b.phi(FLOATS) for _ in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        then = b.add(at, number(step))
        b.cbranch(b.icmp_signed("<=", then, end), inside, after)
        b.position_at_end(inside)
        for phi, value in zip(phis, body(phis, at), strict=True):
            phi.add_incoming(value, b.block)
        at.add_incoming(then, b.block)
        b.branch(head)
        b.position_at_end(after)
        return phis, at

    def prefetch(self, place):
        b, byte = self.builder, ir.PointerType(ir.IntType(8))
        function = self.function("llvm.prefetch.p0", ir.VoidType(), [byte, LLVM_INT32, LLVM_INT32, LLVM_INT32])
        b.call(function, [b.bitcast(place, byte), LLVM_INT32(0), LLVM_INT32(3), LLVM_INT32(1)])

    def fma(self, x, w, total):
        function = self.function(f"llvm.fma.v{LANES}f32", FLOATS, [FLOATS] * 3)
        return self.builder.call(function, [x, w, total])

    def bf16_products(self, x, w, total):
        """total[lane] + x[2 lane] w[2 lane] + x[2 lane + 1] w[2 lane + 1], in fp32."""
        b = self.builder
        function = self.function("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, _BFLOATS, _BFLOATS])
        return b.call(function, [total, b.bitcast(x, _BFLOATS), b.bitcast(w, _BFLOATS)])

    def function(self, name, result, arguments):
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)
