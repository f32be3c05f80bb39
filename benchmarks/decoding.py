"""A decoding step through the fast decoder and through the general pass, in turn: `python -m benchmarks.decoding`.

The bundled model in bf16, replies of random voices, as many as there are rows or none. Milliseconds of the engine's
whole step, the median; and the share of the time that reading all weights once would take at this machine's own rate.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.throughput import voice
from repertory.contracts import BUNDLED_MODEL, BaseKey, GenerateRequest
from repertory.data.conversations import Message
from repertory.model import base as base_module
from repertory.model.adapter import Adapter
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.settings import settings

CASES = [(1, 0), (1, 1), (4, 4), (8, 0), (8, 8), (16, 8), (32, 0), (32, 8)]  # rows, voices
STEPS = 12  # of each way, in turn
QUESTION = "What did you do all day, and would you do it again tomorrow?"


def main() -> None:
    key = BaseKey(base_model=BUNDLED_MODEL, quantization="none", dtype="bf16")
    base = base_module.load(BUNDLED_MODEL, settings(), base_module.detect_device(), key, lambda phase: None)
    rate = machine.copy_gb_per_second()
    floor = 1000 * base.architecture.base_bytes(key) / (rate * 1e9)
    voices = [voice(base, seed) for seed in range(8)]
    found = [measured(base, rows, voices[:count]) for rows, count in CASES]
    table = Table("rows", "voices", "general pass, ms", "decoder, ms", "tokens/s", "of the memory's rate")
    for row in found:
        row["share_of_memory_rate"] = round(floor / row["decoder_ms"], 2)
        times = f"{row['general_ms']:.1f}", f"{row['decoder_ms']:.1f}"
        tokens = f"{1000 * row['rows'] / row['decoder_ms']:.0f}"
        table.add_row(str(row["rows"]), str(row["voices"]), *times, tokens, f"{row['share_of_memory_rate']:.2f}")
    Console().print(table)
    print(json.dumps({"machine": machine.facts(), "gb_per_second": round(rate, 1), "steps": found}))


def measured(base: Base, rows: int, voices: list[Adapter]) -> dict[str, Any]:
    engine, decoder = Engine(base), base.decoder
    for at in range(rows):
        request = GenerateRequest(
            request_id=str(at),
            org_id=f"org{at}",
            adapter=None,
            messages=[Message(role="user", content=QUESTION)],
            temperature=0,
            top_p=1,
            top_k=0,
            max_tokens=200,
        )
        sequence = engine.sequence(request, voices[at % len(voices)] if voices else None, None, lambda chunk: None)
        sequence.stop_ids = set()
        engine.submit(sequence)
    while engine.scheduler.waiting or engine.scheduler.prefilling:
        engine.step()
    times: dict[str, list[float]] = {"general_ms": [], "decoder_ms": []}
    for step in range(STEPS + 1):
        for name, way in (("general_ms", None), ("decoder_ms", decoder)):
            base.decoder = way
            begin = time.perf_counter()
            engine.step()
            if step:  # the first one makes room
                times[name].append(1000 * (time.perf_counter() - begin))
    return {"rows": rows, "voices": len(voices)} | {name: round(statistics.median(ms), 2) for name, ms in times.items()}


if __name__ == "__main__":
    main()
