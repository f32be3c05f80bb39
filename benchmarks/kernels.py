"""The small measurements behind decisions in the code: `python -m benchmarks.kernels`. Results are in docs/log.md.

Each compares what we do with what would be obvious, on the shapes of the bundled model.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from functools import cache, partial
from shutil import which
from typing import Any
from unittest import mock

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from benchmarks.train_worker import ALPHA, RANK, load, rendered
from benchmarks.workloads import workload
from repertory.contracts import BUNDLED_MODEL
from repertory.model import crossentropy, gatedmlp, rmsnorm, selfattention
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.attention import PackedRows, Scoring, causal_attention, scaled_dot_product
from repertory.model.attention import causal_mask as mask_of
from repertory.model.base import Base, padded_length
from repertory.model.lora import Training, drop_, dropout_mask
from repertory.model.microbatch import MicroBatch
from repertory.model.packedattention import PackedAttention, Segments
from repertory.model.panels import Panels

BUSY = "import time\nends = time.time() + 30\nwhile time.time() < ends: pass"
PRODUCTS = """
import time, torch, torch.nn.functional as F
weight, x = torch.randn(1536, 576).bfloat16(), torch.randn(416, 576).bfloat16()
A, B = torch.randn(16, 576).bfloat16(), torch.randn(1536, 16).bfloat16()
count, begin = 0, time.perf_counter()
while time.perf_counter() - begin < 3:
    F.silu(F.linear(x, weight).addmm_(F.linear(x, A), B.t()))
    count += 1
print((time.perf_counter() - begin) / count * 1000)
"""
# How waiting threads wait: libgomp's own way, asleep at once, or after a short spin.
SPIN: dict[str, str] = {}
SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
OURS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}


def main() -> None:
    table = Table("what", "obvious", "ours", "unit")
    table.add_row("a product of a shape never seen, of one seen before", *shapes(), "ms")
    table.add_row("memory that 400 new shapes keep, that 13 padded ones keep", *kept_by_shapes(), "MB")
    table.add_row("attention, forward and backward, 4 rows of 96 + 24 tokens", *attention(4, 96, 24), "ms")
    table.add_row("attention, forward and backward, 16 rows of 32 + 440 tokens", *attention(16, 32, 440), "ms")
    for what, prefix, lengths in PACKS:
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            times = packed(prefix, lengths, dtype)
            table.add_row(f"attention over packed rows, forward and backward, {what}, {name}", *times, "ms")
    table.add_row("softmax over 88 keys, over 96", *softmax(), "ms")
    table.add_row("dropout of 416 x 576", *dropout(), "ms")
    table.add_row("an optimizer step over the adapter's 420 tensors", *optimizer(), "ms")
    for part, without in COMPILED.items():
        table.add_row(f"a training pass over 16 short rows: {part} by torch, compiled", *without(), "ms")
    if which("g++"):
        seconds, *times = block_by_torch_compile()
        table.add_row("a block over 16 short rows: torch.compile without LoRA, ours with it", *times, "ms")
        table.add_row("what torch.compile took before", seconds, "", "s")
    for name, busy in (("alone on the machine", False), ("beside one busy process", True)):
        for how, wait in (("sleeping at once", SLEEP), ("spinning as libgomp does", SPIN)):
            times = waiting(wait, busy=busy), waiting(OURS, busy=busy)
            table.add_row(f"a layer with LoRA {name}: threads {how}, our short spin", *times, "ms")
    Console().print(table)


def milliseconds(work: Callable[[], object], times: int = 30) -> float:
    for _ in range(3):
        work()
    begin = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - begin) / times * 1000


def shapes() -> tuple[str, str]:
    weight = torch.randn(1536, 576).bfloat16()
    inputs = [torch.randn(tokens, 576).bfloat16() for tokens in range(301, 401)]

    def through() -> float:
        begin = time.perf_counter()
        for x in inputs:
            F.linear(x, weight)
        return (time.perf_counter() - begin) / len(inputs) * 1000

    return f"{through():.2f}", f"{through():.2f}"


def kept_by_shapes() -> tuple[str, str]:
    weights = [torch.randn(out, inner).bfloat16() for out, inner in ((576, 576), (192, 576), (1536, 576), (576, 1536))]

    def growth(lengths: range) -> float:
        before = psutil.Process().memory_info().rss
        for tokens in lengths:
            for weight in weights:
                F.linear(torch.randn(tokens, weight.shape[1]).bfloat16(), weight)
        return (psutil.Process().memory_info().rss - before) / 1e6

    return f"{growth(range(401, 801)):.0f}", f"{growth(range(832, 1248, 32)):.0f}"


def attention(rows: int, tokens: int, prefix: int) -> tuple[str, str]:
    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(rows, heads, length, 64).bfloat16().requires_grad_()

    query, key, value = draw(9, tokens), draw(3, prefix + tokens), draw(3, prefix + tokens)
    mask = mask_of(tokens, prefix + tokens, None, torch.device("cpu"))
    how = Scoring(scale=0.125)
    gradient = torch.randn_like(query)

    def flash() -> None:
        scaled_dot_product(query, key, value, 3, mask, how).backward(gradient)

    def ours() -> None:
        causal_attention(query, key, value, 3, how).backward(gradient)

    return f"{milliseconds(flash):.2f}", f"{milliseconds(ours):.2f}"


SHORT = tuple(range(38, 54))
PACKS = [("24 + 16 x 38 to 53", 24, SHORT), ("440 + 16 x 38 to 53", 440, SHORT), ("24 + 1 x 1100", 24, (1100,))]


def packed(prefix: int, lengths: tuple[int, ...], dtype: torch.dtype) -> tuple[str, str]:
    """From joined queries, keys and values on: as other families go, by torch, and compiled."""
    layout, segments = PackedRows(prefix, lengths, torch.device("cpu")), Segments.of(prefix, lengths)
    heads, groups, size = 9, 3, 64
    tokens = padded_length(layout.token_count)
    cos, sin = torch.rand(2, 1, tokens, size).to(dtype)
    qkv = torch.randn(1, tokens, (heads + 2 * groups) * size).to(dtype).requires_grad_()
    gradient = torch.randn(1, tokens, heads * size).to(dtype)

    def by_torch() -> None:
        parts = qkv.split([heads * size, groups * size, groups * size], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        seen = layout.attend(0, query, key, value, Scoring(scale=0.125))
        seen.transpose(1, 2).flatten(2).backward(gradient)

    def ours() -> None:
        PackedAttention.apply(qkv, cos, sin, segments, heads, groups, 0.125, None).backward(gradient)

    return f"{milliseconds(by_torch):.2f}", f"{milliseconds(ours):.2f}"


def optimizer() -> tuple[str, str]:
    layers = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30
    shapes = [shape for out, inner in layers for shape in ((16, inner), (out, 16))]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    plain, fused = torch.optim.AdamW(parameters), torch.optim.AdamW(parameters, fused=True)
    return f"{milliseconds(plain.step):.2f}", f"{milliseconds(fused.step):.2f}"


def dropout() -> tuple[str, str]:
    x = torch.randn(416, 576).bfloat16()
    theirs = milliseconds(lambda: torch.native_dropout(x, 0.05, True))
    return f"{theirs:.2f}", f"{milliseconds(lambda: drop_(x.clone(), dropout_mask(x.shape, 0.05, x.device))):.2f}"


def softmax() -> tuple[str, str]:
    scores = {keys: torch.randn(48, 192, keys).bfloat16() for keys in (88, 96)}
    return f"{milliseconds(lambda: scores[88].softmax(-1)):.2f}", f"{milliseconds(lambda: scores[96].softmax(-1)):.2f}"


def training_pass(*taken_away: tuple[Any, str]) -> tuple[str, str]:
    """Forward and backward with these parts by torch, and with all compiled: in turn, the medians."""
    base, batch, routing = a_micro_batch()

    def once() -> float:
        begin = time.perf_counter()
        with base.passing(batch.layout, routing):
            batch.loss(base, routing).backward()  # type: ignore[no-untyped-call]
        return (time.perf_counter() - begin) * 1000

    times: tuple[list[float], list[float]] = [], []
    for _ in range(PASSES):
        with ExitStack() as stack:
            for module, name in taken_away:
                stack.enter_context(mock.patch.object(module, name, return_value=False))
            once()  # what the allocator has to find first
            times[0].append(once())
        once()
        times[1].append(once())
    return f"{statistics.median(times[0]):.0f}", f"{statistics.median(times[1]):.0f}"


@cache
def a_micro_batch() -> tuple[Base, MicroBatch, Training]:
    base, work = load("bf16"), workload("A", 16)
    rows = rendered(base, work)
    names = list(base.layers)
    described = LoraConfig(BUNDLED_MODEL, RANK, ALPHA, 0.0, sorted({name.rpartition(".")[2] for name in names}))
    adapter = Adapter.fresh(described, base.layers, names, 0)
    return base, MicroBatch.of(rows, base.device), Training(adapter)


PASSES = 7
PARTS = {
    "norms": [(rmsnorm, "is_for")],
    "gates": [(gatedmlp, "is_for")],
    "attention": [(selfattention, "is_for")],
    "cross entropy": [(crossentropy, "is_for")],
    "LoRA": [(Panels, "fit")],
}
COMPILED = {part: partial(training_pass, *where) for part, where in PARTS.items()}
COMPILED["all of these"] = partial(training_pass, *(one for where in PARTS.values() for one in where))


def block_by_torch_compile() -> tuple[str, str, str]:
    """Seconds to compile; forward and backward of one block as torch.compile has it, over rows of equal lengths, and as
    a training pass has it, over as many tokens."""
    base, batch, routing = a_micro_batch()
    tokens, rows = padded_length(batch.layout.token_count), len(batch.layout.lengths)
    config = base.model.config
    plain = LlamaDecoderLayer(config, 0).bfloat16().requires_grad_(False)
    plain.self_attn.config = copy(config)
    plain.self_attn.config._attn_implementation = "sdpa"
    of_model: Any = base.model.model

    def through(block: Any, rows: int) -> None:
        x = torch.ones(rows, tokens // rows, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        turns = of_model.rotary_emb(x, torch.arange(tokens // rows)[None])
        with base.passing(batch.layout, routing):
            seen = block(x, position_embeddings=turns)
        seen.sum().backward()

    by_torch = torch.compile(plain)
    begin = time.perf_counter()
    through(by_torch, rows)
    seconds = time.perf_counter() - begin
    times = milliseconds(lambda: through(by_torch, rows)), milliseconds(lambda: through(of_model.layers[1], 1))
    return f"{seconds:.0f}", f"{times[0]:.2f}", f"{times[1]:.2f}"


def waiting(how: dict[str, str], *, busy: bool) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    other = subprocess.Popen([sys.executable, "-c", BUSY]) if busy else None
    try:
        done = subprocess.run(
            [sys.executable, "-c", PRODUCTS], env=inherited | how, capture_output=True, text=True, check=True
        )
    finally:
        if other is not None:
            other.kill()
            other.wait()
    return f"{float(done.stdout):.2f}"


if __name__ == "__main__":
    main()
