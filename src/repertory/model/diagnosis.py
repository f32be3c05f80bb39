"""What torch and bitsandbytes say of themselves and of the device, as JSON on standard output.

`repertory doctor` runs this as a process of its own: a torch that cannot be imported, or that takes its process with
it, costs a red line there and nothing else.
"""

from __future__ import annotations

import json
import platform
import sys
import warnings
from typing import Any


def torch_facts() -> dict[str, Any]:
    import torch

    with warnings.catch_warnings(record=True) as said:  # why CUDA is not available is told as a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cuda_available": available,
        "cuda_refusal": None if available or not said else f"{said[-1].message}".splitlines()[0],
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if available else [],
        "architectures": torch.cuda.get_arch_list() if available else [],
        "cpu": cpu_facts(),
    }


def bitsandbytes_error() -> str | None:
    """4-bit weights packed and unpacked on the device; what went wrong with it, or None."""
    import torch

    try:
        import bitsandbytes as bnb

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        packed, state = bnb.functional.quantize_4bit(weights, quant_type="nf4")
        away = (bnb.functional.dequantize_4bit(packed, state) - weights).abs().max().item()
    except Exception as error:  # whatever it is, it is what the line should say
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    # The widest gap between two NF4 values is 0.304, so that nothing is further away than half of it.
    return None if away < 0.16 else f"weights come back from 4-bit {away:.2f} away, more than 0.16"


def _gpu(index: int) -> dict[str, Any]:
    import torch

    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (facts.major, facts.minor)
    return {"name": facts.name, "capability": capability, "free_bytes": free, "total_bytes": total}


def cpu_facts() -> dict[str, Any]:
    """Its name, and whether it computes bf16 at full speed."""
    import torch

    able = torch.cpu.get_capabilities()
    return {
        "name": str(able.get("cpu_name") or platform.processor() or platform.machine()),
        "has_bf16": bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16")),
    }


if __name__ == "__main__":
    facts: dict[str, Any] = {"torch": torch_facts()}
    facts["bitsandbytes_error"] = bitsandbytes_error()
    json.dump(facts, sys.stdout)
