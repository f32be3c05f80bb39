"""`python -m benchmarks.memory`: what training takes on a CPU beside the loaded base model, measured and estimated.

One forward and backward of the bundled model at a few micro-batch shapes. Measured is how far the process's resident
memory rises above where it was (the kernel's high-water mark, reset before each pass).
"""

from __future__ import annotations

import ctypes
import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from repertory.contracts import BUNDLED_MODEL, BaseKey
from repertory.data.render import NO_LABEL, Row
from repertory.model import base as base_module
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.base import Base
from repertory.model.lora import Training
from repertory.model.memory import BatchShape, Demand
from repertory.model.microbatch import MicroBatch
from repertory.settings import settings

SHAPES = [BatchShape(0, (128,)), BatchShape(0, (384,)), BatchShape(0, (64,) * 6), BatchShape(256, (64,) * 6)]
RANK = 16
CLEAR_HIGH_WATER_MARK = "5"  # https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html


@dataclass(frozen=True)
class Comparison:
    dtype: str
    dropout: float
    shape: str
    measured_mb: float
    estimated_mb: float


def main() -> None:
    device = base_module.detect_device()
    found = []
    for dtype in ("fp32", "bf16"):
        key = BaseKey(base_model=BUNDLED_MODEL, quantization="none", dtype=dtype)
        base = base_module.load(BUNDLED_MODEL, settings(), device, key, lambda phase: None)
        for dropout in (0.05, 0.0):
            found += [compare(base, shape, dropout) for shape in SHAPES]
        del base
    table = Table("precision", "dropout", "prefix + rows", "measured, MB", "estimated, MB")
    for one in found:
        numbers = (f"{one.measured_mb:.0f}", f"{one.estimated_mb:.0f}")
        table.add_row(one.dtype, str(one.dropout), one.shape, *numbers)
    Console().print(table)
    print(json.dumps([asdict(one) for one in found]))


def compare(base: Base, shape: BatchShape, dropout: float) -> Comparison:
    """Activations of one pass, measured and estimated; the gradients, which also appear in it, are counted apart."""
    names = tuple(base.layers)
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    config = LoraConfig(base_model=BUNDLED_MODEL, rank=RANK, alpha=32, dropout=dropout, target_modules=short)
    adapter = Adapter.fresh(config, base.layers, names, 0)
    demand = Demand(
        architecture=base.architecture,
        key=base.key,
        device=base.device.type,
        rank=RANK,
        adapted=names,
        dropout=dropout,
        batch=shape,
    )
    estimate = demand.estimate()
    expected = estimate.activations + estimate.adapter - 4 * adapter.parameter_count  # with the bf16 copy
    batch = MicroBatch.of(rows_of(shape), base.device)
    peak_bytes_of_pass(base, batch, adapter, dropout)  # the first one also plans products and grows buffers
    measured = peak_bytes_of_pass(base, batch, adapter, dropout)
    rows = f"{shape.prefix} + {len(shape.lengths)} x {shape.lengths[0]}"
    return Comparison(base.key.dtype, dropout, rows, measured / 1e6, expected / 1e6)


def rows_of(shape: BatchShape) -> list[Row]:
    """Random tokens; those after the prefix are trained."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> list[int]:
        return torch.randint(1000, 30_000, (count,), generator=generator).tolist()

    prefix = drawn(shape.prefix)
    rows = []
    for length in shape.lengths:
        ids = prefix + drawn(length)
        rows.append(Row(ids, [NO_LABEL] * (shape.prefix + 1) + ids[shape.prefix + 1 :]))
    return rows


def peak_bytes_of_pass(base: Base, batch: MicroBatch, adapter: Adapter, dropout: float) -> int:
    """How far one forward and backward raises the resident memory of this process at the most."""
    for parameter in adapter.parameters:
        parameter.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(CLEAR_HIGH_WATER_MARK)
    before = int(psutil.Process().memory_info().rss)
    routing = Training(adapter, dropout)
    with base.passing(batch.layout, routing):
        batch.nll(base, routing).sum().backward()  # type: ignore[no-untyped-call]
    return high_water_mark() - before


def high_water_mark() -> int:
    """Bytes: the most resident memory since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
