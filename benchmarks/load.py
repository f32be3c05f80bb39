"""What the service does with more callers than it has places: `python -m benchmarks.load`.

The real service as a process, with the fake host behind it: 200 clients who ask for replies, whole and as streams, and
who come again when a 429 or 503 tells them to. Beside them /health is asked ten times a second. With --rude there are
others too: some who send a request a byte at a time, and some who ask for a stream and never read it.

It prints JSON: answers by status, the seconds that clients were told to wait, /health in milliseconds, and the resident
memory of the service's process. Exits with 1 where something but 200, 429 and 503 came back, one of those two without
Retry-After, or a connection broke.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import httpx
import psutil

ORGANISATIONS = 8
TOKENS = 25  # of a reply, half a second of the fake host
HEALTH_SECONDS = 0.1
SETTINGS = {"MAX_CONCURRENT_GENERATIONS": "64", "ORG_CONCURRENT_GENERATIONS": "16"}
CONVERSATION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey!"}]}


@dataclass
class Seen:
    statuses: Counter[int] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)  # what clients met instead of an answer
    waits: list[float] = field(default_factory=list)  # of Retry-After
    seconds: list[float] = field(default_factory=list)  # of whole replies
    health: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes, each second

    @property
    def is_clean(self) -> bool:
        return not self.broken and set(self.statuses) <= {200, 429, 503}

    def summary(self) -> dict[str, Any]:
        # The first quarter warms up: threads, connections, and what allocators keep.
        settled = self.memory[len(self.memory) // 4 :]
        third = max(1, len(settled) // 3)
        return {
            "answers": dict(sorted(self.statuses.items())),
            "broken": dict(self.broken),
            "retry_after_seconds": {"most": max(self.waits, default=0), "mean": fmean(self.waits or [0])},
            "reply_ms": percentiles(self.seconds),
            "health_ms": percentiles(self.health),
            "memory_mb": {"begin": fmean(settled[:third]) / 1e6, "end": fmean(settled[-third:]) / 1e6},
        }


def percentiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    at = quantiles(seconds, n=100, method="inclusive")
    found = {"p50": at[49], "p95": at[94], "p99": at[98], "most": max(seconds)}
    return {name: round(1000 * value, 1) for name, value in found.items()} | {"count": len(seconds)}


@contextmanager
def service() -> Iterator[tuple[str, psutil.Process]]:
    """Its address, and its process; every organisation has a voice."""
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+b") as log:
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{root}:{root / 'src'}",
            "HOST_MODULE": "repertory.service.fake_host",
            "PORT": "0",
            **SETTINGS,
        }
        command = [sys.executable, "-m", "src.main"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            url = _address(Path(folder) / "log", process)
            with httpx.Client(base_url=f"{url}/api/v1", trust_env=False, timeout=30) as client:
                _until(lambda: client.get("/health").json()["status"] == "healthy")
                jobs = [_train(client, f"org{number}") for number in range(ORGANISATIONS)]
                for job in jobs:
                    _until(lambda: client.get(f"/training/status/{job}").json()["status"] == "completed")  # noqa: B023
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    _until(lambda: process.poll() is not None or "listening" in log.read_text())
    return re.findall(r'"url": "([^"]+)"', log.read_text())[-1]


def _train(client: httpx.Client, org_id: str) -> str:
    body = {"org_id": org_id, "conversations": [CONVERSATION]}
    return str(client.post("/training/start", json=body).raise_for_status().json()["training_id"])


def _until(check: Any) -> None:
    ends = time.monotonic() + 60
    while not check():
        if time.monotonic() > ends:
            raise TimeoutError("the service did not get ready")
        time.sleep(0.1)


async def measure(url: str, process: psutil.Process, clients: int, seconds: float, rude: int = 0) -> Seen:
    """`rude`: how many there are of each of the two kinds."""
    seen = Seen()
    ends = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, trust_env=False, timeout=60) as client:
        others = [asyncio.create_task(_slow_writer(url)) for _ in range(rude)]
        others += [asyncio.create_task(_slow_reader(url, at)) for at in range(rude)]
        await asyncio.gather(
            _ask_health(url, ends, seen),
            _weigh(process, ends, seen),
            *(_ask_for_replies(client, at, ends, seen) for at in range(clients)),
        )
        for one in others:
            one.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return seen


async def _ask_for_replies(client: httpx.AsyncClient, number: int, ends: float, seen: Seen) -> None:
    address = f"/api/v1/generate?org_id=org{number % ORGANISATIONS}"
    body = {"message": "a long one", "max_tokens": TOKENS, "stream": number % 2 == 0}
    while time.monotonic() < ends:
        begin = time.monotonic()
        try:
            answer = await client.post(address, json=body)
        except httpx.HTTPError as error:
            seen.broken[type(error).__name__] += 1
            continue
        seen.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            seen.seconds.append(time.monotonic() - begin)
            if not answer.text.endswith("data: [DONE]\n\n" if body["stream"] else "}"):
                seen.broken["not whole"] += 1
        elif "retry-after" not in answer.headers:
            seen.broken[f"{answer.status_code} without Retry-After"] += 1
            return
        else:
            wait = float(answer.headers["retry-after"])
            seen.waits.append(wait)
            await asyncio.sleep(min(wait, max(0.0, ends - time.monotonic())))


async def _ask_health(url: str, ends: float, seen: Seen) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        while time.monotonic() < ends:
            begin = time.monotonic()
            answer = await client.get("/api/v1/health")
            seen.health.append(time.monotonic() - begin)
            if answer.status_code != 200 or answer.json()["status"] != "healthy":
                seen.broken["health"] += 1
            await asyncio.sleep(HEALTH_SECONDS)


async def _weigh(process: psutil.Process, ends: float, seen: Seen) -> None:
    while time.monotonic() < ends:
        seen.memory.append(process.memory_info().rss)
        await asyncio.sleep(1)


def _request(org: int, tokens: int) -> bytes:
    body = json.dumps({"message": "a long one", "max_tokens": tokens, "stream": True}).encode()
    address = f"/api/v1/generate?org_id=org{org}"
    head = (
        f"POST {address} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    )
    return head.encode() + b"\r\n\r\n" + body


async def _slow_writer(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    try:
        for byte in _request(0, 5):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(1)
    finally:
        writer.close()


async def _slow_reader(url: str, number: int) -> None:
    """All of one organisation, whose places they hold."""
    host, port = url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1)  # stops reading at two bytes
    try:
        writer.write(_request(0, 10_000))
        await writer.drain()
        await asyncio.sleep(600)
    finally:
        writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rude", type=int, default=0, help="slow writers, and as many readers who do not read")
    asked = parser.parse_args()
    with service() as (url, process):
        seen = asyncio.run(measure(url, process, asked.clients, asked.seconds, asked.rude))
    from benchmarks.machine import facts  # which imports torch, and would take time from the clients

    print(json.dumps({"machine": facts(), "asked": vars(asked), "settings": SETTINGS, **seen.summary()}, indent=2))
    return 0 if seen.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
