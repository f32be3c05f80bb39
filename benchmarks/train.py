"""`make bench-train`: training against `trl.SFTTrainer`, the two alternating on the same rows of the same model.

    python -m benchmarks.train [--workloads A B C] [--repeats 3] [--output docs/benchmarks/train.json]

Same rows and labels, effective batch, rank, targets and rate. TRL runs in the fastest of its ways, found first; one for
which this machine has not memory enough is none. With --output the workloads that were measured replace those in the
file, the others stay.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from repertory.service.host_process import LARGE_PAGES

TRL_WAYS = {
    "bf16, 4 x 4": ["--dtype", "bf16", "--micro-batch", "4"],
    "bf16, 16 x 1": ["--dtype", "bf16", "--micro-batch", "16"],
    "bf16, 4 x 4, packed": ["--dtype", "bf16", "--micro-batch", "4", "--packing"],
    "bf16, 4 x 4, chunked loss": ["--dtype", "bf16", "--micro-batch", "4", "--loss", "chunked_nll"],
    "fp32, 4 x 4": ["--dtype", "fp32", "--micro-batch", "4"],
}
WHOLE_ROWS = 96
PEAK_SHAPE = (416, 576, 1536)  # rows of a micro-batch, and the widths of an MLP
STEPS = {"A": 4, "B": 2, "C": 1}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workloads", nargs="+", default=["A", "B", "C"], choices=["A", "B", "C"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="also whole jobs, evaluation and certificate included")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"workloads": {}}
    if args.output and args.output.exists():
        results = json.loads(args.output.read_text())
    results["machine"] = machine.facts()
    for name in args.workloads:
        found = compare(name, args.repeats)
        if args.whole and name != "C":
            found["whole"] = compare_whole(name, found["trl_way"])
        found["at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        results["workloads"][name] = found
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    print(json.dumps(results))


def compare(name: str, repeats: int) -> dict[str, Any]:
    steps = ["--steps", str(STEPS[name])]
    found: dict[str, dict[str, Any]] = {}
    for way, flags in TRL_WAYS.items():
        try:
            found[way] = worker("trl", name, "--steps", "1", *flags)
        except MemoryError:
            print(name, "trl", *flags, "not enough memory")
    best = max(found, key=lambda way: found[way]["tokens_per_second"])
    ours, theirs, peaks = [], [], []
    for _ in range(repeats):
        ours.append(worker("repertory", name, *steps))
        theirs.append(worker("trl", name, *steps, *TRL_WAYS[best]))
        peaks.append(machine.matmul_tflops(torch.bfloat16, *PEAK_SHAPE))
    our_rate, their_rate = median(ours, "tokens_per_second"), median(theirs, "tokens_per_second")
    return {
        "repertory_tokens_per_second": round(our_rate, 1),
        "trl_tokens_per_second": round(their_rate, 1),
        "ratio": round(our_rate / their_rate, 2),
        "trl_way": best,
        "trl_ways": {way: round(result["tokens_per_second"], 1) for way, result in found.items()},
        "repertory_peak_mb": round(median(ours, "peak_bytes") / 1e6),
        "trl_peak_mb": round(median(theirs, "peak_bytes") / 1e6),
        "repertory_tflops": round(median(ours, "flops_per_second") / 1e12, 3),
        "matmul_peak_tflops": round(statistics.median(peaks), 3),
        "share_of_matmul_peak": round(median(ours, "flops_per_second") / 1e12 / statistics.median(peaks), 2),
    }


def compare_whole(name: str, way: str) -> dict[str, Any]:
    rows = ["--rows", str(WHOLE_ROWS), "--steps", "0"]
    ours, theirs = worker("repertory", name, *rows), worker("trl", name, *rows, *TRL_WAYS[way])
    return {
        "repertory_seconds": round(ours["seconds"], 1),
        "trl_seconds": round(theirs["seconds"], 1),
        "ratio": round(theirs["seconds"] / ours["seconds"], 2),
        "repertory_val_nll": round(ours["val_nll"], 4),
        "trl_val_nll": round(theirs["val_nll"], 4),
    }


def worker(system: str, name: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_worker", system, name, *flags]
    environment = LARGE_PAGES | os.environ  # as a host of ours has them, for both
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGKILL:  # by the system, for the memory
        raise MemoryError
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(name, system, *flags, {key: value for key, value in result.items() if key not in ("system", "workload")})
    return result


def median(results: list[dict[str, Any]], key: str) -> float:
    return statistics.median(result[key] for result in results)


def show(results: dict[str, Any]) -> None:
    table = Table(
        "workload",
        "Repertory, tokens/s",
        "TRL, tokens/s",
        "ratio",
        "TRL's way",
        "peak MB, ours",
        "TRL's",
        "of matmul peak",
        "whole job, ratio",
    )
    for name, row in results["workloads"].items():
        table.add_row(
            name,
            str(row["repertory_tokens_per_second"]),
            str(row["trl_tokens_per_second"]),
            str(row["ratio"]),
            row["trl_way"],
            str(row["repertory_peak_mb"]),
            str(row["trl_peak_mb"]),
            str(row["share_of_matmul_peak"]),
            str(row["whole"]["ratio"]) if "whole" in row else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
