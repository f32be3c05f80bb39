"""The short demo as a newcomer sees it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from repertory import demo

pytestmark = pytest.mark.slow

QUICK_SECONDS = 180.0  # what the README and the help promise, on 2 cores


def test_the_short_demo_keeps_its_promises(tmp_path: Path) -> None:
    port = _free_port()
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "repertory.cli", "demo", "--quick", "--port", str(port)],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=2 * QUICK_SECONDS,
        check=False,
    )
    seconds = time.monotonic() - started
    print(done.stdout, f"{seconds:.0f} s", sep="\n")
    assert done.returncode == 0, done.stdout + done.stderr
    pid = int(_found(r"Stop the service: kill (\d+)", done.stdout))
    try:
        assert float(_found(r"new voice\s+│\s+([\d.]+)", done.stdout)) < float(
            _found(r"base\s+│\s+([\d.]+)", done.stdout)
        )
        for question in demo.QUESTIONS:
            assert question in done.stdout
        assert _found(r"(step \d+/\d+ · loss [\d.]+ · \d+ tokens/s)", done.stdout)
        assert (tmp_path / demo.LOG).stat().st_size > 0

        curl = _found(r"^(curl -X POST .*)$", done.stdout)
        reply = subprocess.run(["bash", "-euc", curl], capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(reply.stdout)["response"].strip()
    finally:
        os.kill(pid, signal.SIGTERM)
        _wait_until_gone(pid)
    assert not _listens(port)
    assert seconds < QUICK_SECONDS


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, f"{pattern} is not in:\n{text}"
    return match[1]


def _wait_until_gone(pid: int) -> None:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.2)
    pytest.fail(f"the service {pid} is still there a minute after SIGTERM")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
