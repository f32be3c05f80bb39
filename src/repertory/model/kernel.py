"""What compiled functions for a CPU are written with: numba, 16-bit numbers, and torch's own threads.

A kernel cuts its work into blocks. torch's threads take one after another, so that all are busy to the end, however
many there are and whatever else has the cores; what is computed does not depend on who computes it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import ctypes
import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types
from numba.extending import overload
from torch import Tensor

intrinsic: Any = numba.extending.intrinsic  # whose functions are called without the first argument they have

_features = numba.config.CPU_FEATURES or binding.get_host_cpu_features().flatten()
HAS_FMA = "+fma" in _features or "+neon" in _features  # without it each product would be a call into libm
HAS_BF16_PRODUCTS = "+avx512bf16" in _features
LANES = 16 if "+avx512f" in _features else 8  # of a vector: numbers in fp32

LLVM_FLOAT, LLVM_INT32, LLVM_INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
BF16, FP32 = np.empty(0, np.uint16), np.empty(0, np.float32)  # what elements are like
# What arithmetic may be done for speed: other orders, but what is no number stays none, for a run to be stopped by it.
FAST = {"reassoc", "nsz", "arcp", "contract", "afn"}
SHARED = ("kernel.py", "vectors.py", "products.py", "rotation.py")
INT8, INT32, INT64 = (np.empty(0, kind) for kind in (np.int8, np.int32, np.int64))


def _version(function: Any) -> str:
    """numba takes machine code from its cache while the file of a function is unchanged. What is in the shared files
    becomes part of functions elsewhere, so it is part of their names.
    """
    shared = [Path(__file__).with_name(name) for name in SHARED]
    files = [*shared, Path(inspect.getfile(function))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def _cached(compile: Callable[..., Any], function: Any, version: str) -> Any:
    """The machine code is kept beside the function's file or in the user's cache."""
    function.__qualname__ += f"_{version}"
    try:
        return compile(cache=True)(function)
    except RuntimeError:  # neither can be written: it is compiled at each start
        return compile()(function)


def compiled(**options: Any) -> Callable[[Any], Any]:
    """numba's njit."""

    def decorate(function: Any) -> Any:
        return _cached(lambda **more: njit(error_model="numpy", **options, **more), function, _version(function))

    return decorate


class Kernel:
    """A compiled function that computes one block of a piece of work. Given what was asked, which it reads with
    `argument`, the block's number, and what the elements are like: BF16 or FP32.
    """

    def __init__(self, function: Any) -> None:
        self._name, self._version = function.__qualname__, _version(function)
        self._function = compiled(fastmath=FAST)(function)
        self._code: dict[int, Any] = {}  # by the elements' size

    def _compiled_for(self, size: int) -> Any:
        """In its own globals it finds which function it is about, and the elements."""
        if size not in self._code:
            names = {**globals(), "compute": self._function, "like": BF16 if size == 2 else FP32}
            function = FunctionType(_blocks.__code__, names)
            function.__qualname__ = f"{self._function.py_func.__module__}.{self._name}_{size}"
            signature = types.void(types.CPointer(types.int64))
            self._code[size] = _cached(
                lambda **more: cfunc(signature, error_model="numpy", **more), function, self._version
            )
        return self._code[size]

    def run(self, blocks: int, *arguments: Tensor | float, threads: int | None = None) -> None:
        """All blocks, on torch's threads or on so many; compiled when it is first asked for. The elements are like
        those of the first argument, a tensor. Of tensors the kernel gets the addresses, of a float its bits in fp32.
        """
        first = arguments[0]
        assert isinstance(first, Tensor)
        asked = (ctypes.c_int64 * (ASKED + len(arguments)))(0, blocks, *map(_as_int64, arguments))
        code = self._compiled_for(2 if first.itemsize == 2 else 4)
        _gomp_parallel()(code.address, asked, threads or min(blocks, torch.get_num_threads()), 0)


ASKED = 2  # numbers before a kernel's own arguments


def _as_int64(argument: Tensor | float) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return as_bits(argument) if isinstance(argument, float) else argument


def as_bits(value: float) -> int:
    """Of a number in fp32."""
    return int(np.float32(value).view(np.int32))


@cache
def _gomp_parallel() -> Any:
    """Of the OpenMP library that torch computes with: its threads wait where their core is, for a microsecond or so."""
    shipped = Path(torch.__file__).parent
    found = [*shipped.glob("lib/libgomp*.so*"), *shipped.parent.glob("torch.libs/libgomp*.so*"), "libgomp.so.1"]
    try:
        library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_LOCAL)
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


def is_for(*tensors: Tensor) -> bool:
    """Whether kernels can compute with these: on a CPU, all in bf16 or all in fp32."""
    first = tensors[0].dtype
    return (
        all(each.device.type == "cpu" and each.dtype == first for each in tensors)
        and first in (torch.bfloat16, torch.float32)
        and lacking() is None
    )


@cache
def lacking() -> str | None:
    """What this machine lacks for kernels, with the cure; None where nothing."""
    if not HAS_FMA:
        return "the processor has no fused multiply-add (FMA3 or NEON); one of the last ten years has"
    if _gomp_parallel() is None:
        return "torch does not compute with GNU's OpenMP library; install torch from PyPI or download.pytorch.org"
    return None


def _blocks(asked):
    """Block after block, until all are taken."""
    at = atomic_add(asked, 1)
    while at < asked[1]:
        compute(asked, at, like)  # type: ignore[name-defined]  # noqa: F821
        at = atomic_add(asked, 1)


@intrinsic
def pointer(typing, address, like):
    """`address`, an integer, as a pointer to elements of the array `like`."""
    to = types.CPointer(like.dtype)

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(to))

    return to(address, like), generate


@intrinsic
def atomic_add(typing, place, value):
    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], args[1], "acq_rel")

    return types.int64(types.CPointer(types.int64), types.int64), generate


@intrinsic
def bits(typing, value):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], LLVM_INT32)

    return types.uint32(types.float32), generate


@intrinsic
def from_bits(typing, value):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], LLVM_FLOAT)

    return types.float32(types.uint32), generate


def put(array, at, value):
    """array[at] = value, rounded to bf16 where that is what the array holds."""


@overload(put)
def _put(array, at, value):
    if array.dtype == types.uint16:

        def rounded(array, at, value):
            exact = bits(value)
            nearest = (exact + np.uint32(0x7FFF) + ((exact >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            array[at] = np.uint16(nearest) if value == value else np.uint16(0x7FC0)

        return rounded

    def plain(array, at, value):
        array[at] = value

    return plain


def get(array, at):
    """array[at] in fp32."""


@overload(get)
def _get(array, at):
    if array.dtype == types.uint16:
        return lambda array, at: from_bits(np.uint32(array[at]) << np.uint32(16))
    return lambda array, at: array[at]


@compiled(inline="always")
def argument(asked, at):
    return asked[ASKED + at]


@compiled(inline="always")
def float_argument(asked, at):
    return from_bits(np.uint32(asked[ASKED + at]))


@compiled(inline="always")
def address(array, element):
    """Of what lies so many elements after an array's first."""
    return np.int64(array.ctypes.data) + element * array.itemsize


@compiled(inline="always")
def row(begin, at, width, like):
    """Row `at` of the matrix at the address `begin`, whose rows are `width` elements apart."""
    return carray(pointer(begin + at * width * like.itemsize, like), (width,))


@compiled(inline="always")
def table(begin, shape, like):
    """What lies at the address `begin`, as an array."""
    return carray(pointer(begin, like), shape)


LOG2E, LN2_HIGH, LN2_LOW = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)


@compiled(inline="always")
def exp(x):
    """Cephes' expf, which compilers turn into vectors; between -87 and 88, and beyond as there."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    whole = np.floor(x * LOG2E + np.float32(0.5))
    x = x - whole * LN2_HIGH - whole * LN2_LOW
    y = np.float32(1.9875691500e-4)
    y = y * x + np.float32(1.3981999507e-3)
    y = y * x + np.float32(8.3334519073e-3)
    y = y * x + np.float32(4.1665795894e-2)
    y = y * x + np.float32(1.6666665459e-1)
    y = y * x + np.float32(5.0000001201e-1)
    y = y * x * x + x + np.float32(1)
    return y * from_bits(np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)))
