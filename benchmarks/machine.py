"""Facts about the machine that a measurement is worth nothing without."""

from __future__ import annotations

import platform
import statistics
import time
from importlib.metadata import version
from typing import Any

import psutil
import torch

from repertory.model.base import detect_device


def facts() -> dict[str, Any]:
    device = detect_device()
    return {
        "device": device.name,
        "kind": device.kind,
        "cores": psutil.cpu_count(logical=False),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(device.memory_bytes / 2**30, 1),
        "bf16": device.has_bf16,
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "load_average": round(psutil.getloadavg()[0], 2),
    }


def matmul_tflops(dtype: torch.dtype, rows: int, inner: int, columns: int, seconds: float = 1.0) -> float:
    """Median rate of x W' at this shape, with weights as a linear layer holds them."""
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    times = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        begin = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - begin)
    return 2 * rows * inner * columns / statistics.median(times) / 1e12


def copy_gb_per_second(seconds: float = 1.0) -> float:
    """Median rate at which memory outside the caches is read (a sum over 512 MB)."""
    block = torch.ones(128 * 2**20)
    times = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        begin = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - begin)
    return block.numel() * 4 / statistics.median(times) / 1e9
