"""`make bench-adapters`: a thousand voices on disk, a few of them in memory, fewer in slots, and all of them asked.

A real host of the bundled model. Readers ask one voice after the other, drawn by Zipf's law, each as soon as the one
before has answered; there are more readers than slots. First they fill what the host keeps of prompts to its limit,
some minutes, then they are timed. Fails if one of them gets an error. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.modes import Host, hosting
from benchmarks.voices import random_voice, write_version
from repertory.contracts import BUNDLED_MODEL, AdapterRef, BaseKey, GenerateRequest, HostHealth, HostStats
from repertory.data.conversations import Message
from repertory.model import base as base_module
from repertory.model.weights import fingerprint, locate
from repertory.service.host_client import HostClient
from repertory.settings import settings

KEY = BaseKey(base_model=BUNDLED_MODEL, quantization="none", dtype="bf16")
RANK = 4
MEMORY_GB = 0.125  # for adapters: about a twentieth of a thousand such voices, so that they come and go
NEW_TOKENS = 24
ZIPF_EXPONENT = 1.0
FULL = 0.98  # of what is kept of prompts: a block more may not fit
FILLING_SECONDS = 900.0  # at the most


@dataclass
class Heard:
    """What the readers have seen."""

    seconds: float = 0.0  # until the last of them was answered
    replies: int = 0
    tokens: int = 0
    voices: set[str] = field(default_factory=set)
    first: list[float] = field(default_factory=list)  # seconds from asking to the first text
    gaps: list[float] = field(default_factory=list)  # seconds between two pieces of a reply
    errors: list[str] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)  # of the host, second by second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--readers", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--filling", type=float, default=FILLING_SECONDS, help="seconds at the most, before")
    args = parser.parse_args()
    found = measured(args.adapters, args.slots, args.readers, args.seconds, args.filling)
    print(json.dumps(found))
    if found["errors"]:
        raise SystemExit(f"{found['errors']} requests failed: {found['first_error']}")


def measured(
    adapters: int = 1000, slots: int = 32, readers: int = 48, seconds: float = 60.0, filling: float = FILLING_SECONDS
) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        print(f"writing {adapters} voices", file=sys.stderr)
        refs = write_voices(Path(folder), adapters)
        limits = {"ADAPTER_SLOTS": str(slots), "ADAPTER_MEMORY_GB": str(MEMORY_GB)}
        with hosting(KEY.quantization, KEY.dtype, **limits) as host:
            host.reply()
            print(f"{readers} readers until the prefix cache is full", file=sys.stderr)
            filled = asyncio.run(read(host, refs, range(readers), filling, until_full=True))
            before = stats_of(host)
            print(f"{readers} readers for {seconds:.0f} s", file=sys.stderr)
            heard = asyncio.run(read(host, refs, range(readers, 2 * readers), seconds))
            stats = stats_of(host)
    ram, ram_before, errors = stats.adapters["ram"], before.adapters["ram"], filled.errors + heard.errors
    loads = sum(ram.loads.counts) - sum(ram_before.loads.counts)
    load_seconds = ram.loads.total_seconds - ram_before.loads.total_seconds
    return {
        "adapters": adapters,
        "slots": slots,
        "readers": readers,
        "seconds": seconds,
        "replies": heard.replies,
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "voices_asked": len(heard.voices),
        "tokens_per_second": round(heard.tokens / heard.seconds, 1),
        "first_token_ms": spread(heard.first),
        "between_tokens_ms": spread(heard.gaps),
        "loads": loads,
        "load_ms": round(1000 * load_seconds / max(loads, 1), 1),
        "evictions": ram.evictions - ram_before.evictions,
        "in_memory": ram.resident,
        "adapter_mb": round(ram.bytes / 1e6, 1),
        "filling_seconds": round(filled.seconds),
        "prefix_cache_mb": round(stats.prefix_cache_bytes / 1e6),
        "prefix_cache_limit_mb": round(stats.prefix_cache_most_bytes / 1e6),
        "memory_mb": {
            "begin": round(heard.memory_mb[0]),
            "most": round(max(heard.memory_mb)),
            "end": round(heard.memory_mb[-1]),
        },
    }


def stats_of(host: Host) -> HostStats:
    return HostHealth.model_validate(host.client.get("/health").json()).stats


def write_voices(folder: Path, count: int) -> list[AdapterRef]:
    located = locate(KEY, settings())
    outline = base_module.outline(located.folder, KEY, base_module.detect_device())
    renderer = base_module.renderer_in(located.folder, BUNDLED_MODEL)
    assert renderer is not None
    of_files = fingerprint(located.folder)
    return [
        write_version(folder / f"voice{at}", random_voice(outline, at, RANK), outline, renderer, of_files)
        for at in range(count)
    ]


async def read(
    host: Host, refs: Sequence[AdapterRef], seeds: Sequence[int], seconds: float, *, until_full: bool = False
) -> Heard:
    """Readers with these seeds, for so long, or at the most so long until the prefix cache is full."""
    heard = Heard()
    begin = time.perf_counter()
    over = asyncio.Event()
    asking = [asyncio.create_task(reader(host, refs, seed, over, heard)) for seed in seeds]
    while time.perf_counter() < begin + seconds:
        heard.memory_mb.append(host.resident_mb)
        await asyncio.sleep(1)
        if until_full:
            stats = await asyncio.to_thread(stats_of, host)
            if stats.prefix_cache_bytes >= FULL * stats.prefix_cache_most_bytes:
                break
    over.set()
    await asyncio.gather(*asking)
    heard.seconds = time.perf_counter() - begin
    return heard


async def reader(host: Host, refs: Sequence[AdapterRef], seed: int, over: asyncio.Event, heard: Heard) -> None:
    chance = random.Random(seed)
    weights = list(itertools.accumulate((at + 1) ** -ZIPF_EXPONENT for at in range(len(refs))))
    client = HostClient(host.socket)
    while not over.is_set():
        ref = chance.choices(refs, cum_weights=weights)[0]
        request = GenerateRequest(
            request_id=f"{seed}",
            org_id=ref.org_id,
            adapter=ref,
            messages=[Message(role="user", content=f"Tell me about the number {chance.randrange(1000)}.")],
            temperature=0,
            top_p=1,
            top_k=0,
            max_tokens=NEW_TOKENS,
        )
        told = time.perf_counter()
        waits = heard.first
        try:
            async for chunk in client.generate(request):
                now = time.perf_counter()
                waits.append(now - told)
                told, waits = now, heard.gaps
                if chunk.finish_reason and chunk.usage:
                    heard.tokens += chunk.usage.completion_tokens
        except Exception as error:  # whatever it is, it is what this measures
            heard.errors.append(f"{ref.training_id}: {error!r}")
            continue
        heard.replies += 1
        heard.voices.add(ref.training_id)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    parts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {name: round(1000 * value, 1) for name, value in (("p50", parts[49]), ("p99", parts[98]))} | {
        "worst": round(1000 * max(seconds), 1)
    }


if __name__ == "__main__":
    main()
