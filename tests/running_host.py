"""A real host as a process, driven over its socket as the service drives it, for several folders of tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from repertory.contracts import AdapterRef, RunSpec

DEADLINE_SECONDS = 60.0


def eventually(check: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := check()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


class RunningHost:
    def __init__(self, cache: Path, socket: Path, base_model: str, *flags: str, **settings: str) -> None:
        self.socket = socket
        command = [sys.executable, "-m", "repertory.model.host", "--socket", str(socket), "--base-model", base_model]
        self.process = subprocess.Popen(
            [*command, *flags],
            stdin=subprocess.PIPE,
            env=os.environ | {"MODEL_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | settings,
        )
        transport = httpx.HTTPTransport(uds=str(socket))
        self.client = httpx.Client(transport=transport, base_url="http://host", timeout=DEADLINE_SECONDS)

    def health(self) -> dict[str, Any]:
        return dict(self.client.get("/health").json())

    def until(self, *states: str) -> dict[str, Any]:
        eventually(self.listens)
        return dict(eventually(lambda: (health := self.health())["state"] in states and health))

    def listens(self) -> bool:
        """Its socket appears a moment before anybody listens at it."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def generate(self, adapter: AdapterRef | None = None, **asked: Any) -> list[dict[str, Any]]:
        with self.client.stream("POST", "/generate", json=request(adapter, **asked)) as answer:
            return [json.loads(line) for line in answer.iter_lines()]

    def run(self, spec: RunSpec) -> Iterator[dict[str, Any]]:
        with self.client.stream("POST", "/runs", json=spec.model_dump()) as answer:
            for line in answer.iter_lines():
                yield json.loads(line)

    def close(self) -> None:
        self.client.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(DEADLINE_SECONDS)


def request(adapter: AdapterRef | None, **asked: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"temperature": 0, "top_p": 1, "top_k": 0, "max_tokens": 12}
    messages = [{"role": "user", "content": "Hello!"}]
    about = {"request_id": "r", "org_id": "org", "adapter": adapter.model_dump() if adapter else None}
    return about | {"messages": messages} | values | asked
