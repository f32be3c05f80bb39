"""The real service as a process of its own, with the bundled base model, in a folder of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

README_PORT = 8300
START_SECONDS = 300.0  # unpacks the bundled base model into an empty cache


@dataclass(frozen=True, kw_only=True)
class RunningService:
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """On the README's port where that is free. The hub is out of its reach, whatever machine this is."""
    folder = tmp_path_factory.mktemp("service")
    running = RunningService(port=README_PORT if _is_free(README_PORT) else _free_port(), log=folder / "service.log")
    with running.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "repertory.cli", "serve"],
            cwd=folder,
            env=os.environ | {"PORT": str(running.port), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(running, process)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _wait_until_healthy(running: RunningService, process: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + START_SECONDS
    status = "nothing"
    while time.monotonic() < ends:
        assert process.poll() is None, f"the service ended: {running.log.read_text()[-2000:]}"
        with suppress(httpx.ConnectError):
            status = httpx.get(f"{running.url}/api/v1/health", timeout=5).json()["status"]
        if status == "healthy":
            return
        time.sleep(0.5)
    pytest.fail(f"after {START_SECONDS} s /health says {status}: {running.log.read_text()[-2000:]}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
