"""What the service does with more callers than it has places: `python -m benchmarks.load`.

The real service as a process, with the fake host behind it: 200 clients who ask for replies, whole and as streams, and
who come again when a 429 or 503 tells them to. They begin within a second of each other, and read as cheaply as they
can, since they share the machine with the service. From another process, whose clock their work does not delay,
/health is asked ten times a second. With --rude there are others too: some who send a request a byte at a time, and
some who ask for a stream and never read it.

It prints JSON: answers by status, the seconds that clients were told to wait, replies and /health in milliseconds, how
much of a core each side took, and the resident memory of the service's process. Exits with 1 where something but 200,
429 and 503 came back, one of those two without Retry-After, a reply was not whole, or a connection broke.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import httpx
import psutil

ORGANISATIONS = 8
TOKENS = 25  # of a reply, half a second of the fake host
HEALTH_SECONDS = 0.1
BEGIN_SECONDS = 1.0  # in which all clients have come
SETTINGS = {"MAX_CONCURRENT_GENERATIONS": "64", "ORG_CONCURRENT_GENERATIONS": "16"}
CONVERSATION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey!"}]}


@dataclass
class Health:
    """How it answered."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0  # answers that were not: healthy


@dataclass
class Seen:
    statuses: Counter[int] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)  # what clients met instead of an answer
    waits: list[float] = field(default_factory=list)  # of Retry-After
    seconds: list[float] = field(default_factory=list)  # of whole replies
    health: Health = field(default_factory=Health)
    memory: list[int] = field(default_factory=list)  # bytes, each second
    cores: dict[str, float] = field(default_factory=dict)  # each side's share of one

    @property
    def is_clean(self) -> bool:
        return not self.broken and not self.health.wrong and set(self.statuses) <= {200, 429, 503}

    def summary(self) -> dict[str, Any]:
        # The first quarter warms up: threads, connections, and what allocators keep.
        settled = self.memory[len(self.memory) // 4 :]
        third = max(1, len(settled) // 3)
        return {
            "answers": dict(sorted(self.statuses.items())),
            "broken": dict(self.broken),
            "retry_after_seconds": {"most": max(self.waits, default=0), "mean": fmean(self.waits or [0])},
            "reply_ms": percentiles(self.seconds),
            "health_ms": percentiles(self.health.seconds),
            "health_wrong": self.health.wrong,
            "cores": {name: round(share, 2) for name, share in self.cores.items()},
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
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(os.getpid).result()  # it is there
        asking = asyncio.get_running_loop().run_in_executor(pool, ask_health, url, seconds)
        ends = time.monotonic() + seconds
        used = _cpu_seconds(process)
        others = [asyncio.create_task(_slow_writer(url)) for _ in range(rude)]
        others += [asyncio.create_task(_slow_reader(url, at)) for at in range(rude)]
        asked = [_ask_for_replies(url, at, BEGIN_SECONDS * at / clients, ends, seen) for at in range(clients)]
        await asyncio.gather(_weigh(process, ends, seen), *asked)
        seen.cores = {name: (after - used[name]) / seconds for name, after in _cpu_seconds(process).items()}
        for one in others:
            one.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        seen.health = await asking
    return seen


def ask_health(url: str, seconds: float) -> Health:
    host = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    health, ends = Health(), time.monotonic() + seconds
    while time.monotonic() < ends:
        begin = time.monotonic()
        host.request("GET", "/api/v1/health")
        answer = host.getresponse()
        body = answer.read()
        health.seconds.append(time.monotonic() - begin)
        health.wrong += answer.status != 200 or json.loads(body)["status"] != "healthy"
        time.sleep(HEALTH_SECONDS)
    host.close()
    return health


async def _ask_for_replies(url: str, number: int, begin_seconds: float, ends: float, seen: Seen) -> None:
    is_stream = number % 2 == 0
    request = _request(number % ORGANISATIONS, TOKENS, is_stream=is_stream)
    await asyncio.sleep(begin_seconds)
    connection = await _connected(url)
    while time.monotonic() < ends:
        begin = time.monotonic()
        try:
            answer = await connection.ask(request)
        except ConnectionError as error:
            seen.broken[type(error).__name__] += 1
            connection = await _connected(url)
            continue
        seen.statuses[answer.status] += 1
        if answer.status == 200:
            seen.seconds.append(time.monotonic() - begin)
            if (_words_streamed(answer.body) if is_stream else _words(answer.body)) != TOKENS:
                seen.broken["not whole"] += 1
        elif answer.retry_after is None:
            seen.broken[f"{answer.status} without Retry-After"] += 1
        else:
            seen.waits.append(answer.retry_after)
            await asyncio.sleep(min(answer.retry_after, max(0.0, ends - time.monotonic())))
    connection.close()


async def _connected(url: str) -> Connection:
    host, port = url.removeprefix("http://").split(":")
    _, connection = await asyncio.get_running_loop().create_connection(Connection, host, int(port))
    return connection


def _words(body: bytes) -> int:
    return len(json.loads(body)["response"].split())


def _words_streamed(body: bytes) -> int:
    """0 where the stream did not come to its end."""
    stream = _without_chunks(body)
    if not stream.endswith(b"data: [DONE]\n\n"):
        return 0
    *texts, done = [json.loads(event.removeprefix(b"data: ")) for event in stream.split(b"\n\n")[:-2]]
    return len("".join(event["text"] for event in texts).split()) if done["done"] else 0


def _without_chunks(body: bytes) -> bytes:
    """The text of HTTP's chunks: each has its size on a line before it, and the last one is empty."""
    pieces, at = [], 0
    while True:
        begin = body.index(b"\r\n", at) + 2
        size = int(body[at:begin], 16)
        if not size:
            return b"".join(pieces)
        pieces.append(body[begin : begin + size])
        at = begin + size + 2


@dataclass(frozen=True)
class Answer:
    head: bytes
    body: bytes

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1])

    @property
    def retry_after(self) -> float | None:
        found = re.search(rb"(?i)\r\nretry-after: (\d+)", self.head)
        return None if found is None else float(found[1])


class Connection(asyncio.Protocol):
    """A client's. Of what comes it reads no more than where it ends."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._asking: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def ask(self, request: bytes) -> Answer:
        """One after the other. Raises ConnectionError."""
        if self._transport.is_closing():
            raise ConnectionResetError
        self._received.clear()
        self._asking = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._asking

    def data_received(self, data: bytes) -> None:
        self._received += data
        head_bytes = self._received.find(b"\r\n\r\n")
        if head_bytes < 0 or self._asking is None:
            return
        head = bytes(self._received[:head_bytes])
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if length is None:
            is_whole = self._received.endswith(b"\r\n0\r\n\r\n")
        else:
            is_whole = len(self._received) == head_bytes + 4 + int(length[1])
        if is_whole:
            self._asking.set_result(Answer(head, bytes(self._received[head_bytes + 4 :])))

    def connection_lost(self, error: Exception | None) -> None:
        if self._asking is not None and not self._asking.done():
            self._asking.set_exception(ConnectionResetError())

    def close(self) -> None:
        self._transport.close()


async def _weigh(process: psutil.Process, ends: float, seen: Seen) -> None:
    while time.monotonic() < ends:
        seen.memory.append(process.memory_info().rss)
        await asyncio.sleep(1)


def _cpu_seconds(service: psutil.Process) -> dict[str, float]:
    """Which each side has used so far."""
    sides = {"service": service, "host": service.children()[0], "clients": psutil.Process()}
    used = {name: process.cpu_times() for name, process in sides.items()}
    return {name: times.user + times.system for name, times in used.items()}


def _request(org: int, tokens: int, *, is_stream: bool = True) -> bytes:
    body = json.dumps({"message": "a long one", "max_tokens": tokens, "stream": is_stream}).encode()
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
