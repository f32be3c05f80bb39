"""Rotary position embedding (https://arxiv.org/abs/2104.09864) of one head of one token, in compiled loops.

Heads are given by their addresses: what is read and written apart is apart for the compiler, too, which then takes
vectors.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from repertory.model.kernel import FAST, FP32, compiled, get, put, row


@compiled(inline="always")
def _halves(head, D, like):
    return row(head, 0, D // 2, like), row(head, 1, D // 2, like)


@compiled(fastmath=FAST)
def turn(x, cos, sin, D, to, like):
    one, other = _halves(x, D, like)
    cos_one, cos_other = _halves(cos, D, like)
    sin_one, sin_other = _halves(sin, D, like)
    to_one, to_other = _halves(to, D, like)
    for i in range(D // 2):
        put(to_one, i, get(one, i) * get(cos_one, i) - get(other, i) * get(sin_one, i))
    for i in range(D // 2):
        put(to_other, i, get(other, i) * get(cos_other, i) + get(one, i) * get(sin_other, i))


@compiled(fastmath=FAST)
def turn_back(grad, cos, sin, D, to, like):
    """The gradient, in fp32, of what was turned."""
    one, other = _halves(grad, D, FP32)
    cos_one, cos_other = _halves(cos, D, like)
    sin_one, sin_other = _halves(sin, D, like)
    to_one, to_other = _halves(to, D, like)
    for i in range(D // 2):
        put(to_one, i, one[i] * get(cos_one, i) + other[i] * get(sin_other, i))
    for i in range(D // 2):
        put(to_other, i, other[i] * get(cos_other, i) - one[i] * get(sin_one, i))


@compiled()
def copy(x, D, to, like):
    from_, copied = row(x, 0, D, like), row(to, 0, D, like)
    for i in range(D):
        copied[i] = from_[i]
