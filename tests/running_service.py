"""The real service as a process over real HTTP, for tests: with real hosts behind it, or the fake one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

DEADLINE_SECONDS = 60.0  # of everything that is waited for; generous, since a test machine may be busy
CONVERSATION = {
    "messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hey! How are you?"}]
}


def eventually(check: Callable[[], Any]) -> Any:
    """The first true value of `check`."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (value := check()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.04)
    return value


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it ended between the two questions
        return False


def has_argument(process: psutil.Process, argument: str) -> bool:
    try:
        return argument in process.cmdline()
    except psutil.NoSuchProcess:
        return False


class RunningService:
    """`python -m src.main` in a folder of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = environment
        self.log_path = folder / "service.log"
        self.start()

    def start(self) -> None:
        checkout = Path(__file__).parents[1]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{checkout}:{checkout / 'src'}",  # this one, whatever is installed
            "HOST_MODULE": "repertory.service.fake_host",
            "PORT": "0",
            **self.environment,
        }
        with self.log_path.open("ab") as log:
            command = [sys.executable, "-m", "src.main"]
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        started = self.log.count('"listening"')
        eventually(lambda: self.process.poll() is not None or self.log.count('"listening"') > started)
        assert self.process.poll() is None, self.log
        self.url = re.findall(r'"url": "([^"]+)"', self.log)[-1]
        self.client = httpx.Client(base_url=f"{self.url}/api/v1", timeout=DEADLINE_SECONDS, trust_env=False)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def until_ready(self) -> RunningService:
        def is_healthy() -> bool:
            try:
                return bool(self.client.get("/health").json()["status"] == "healthy")
            except httpx.ConnectError:
                return False

        eventually(is_healthy)
        return self

    def hosts(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children() if lives(child)]

    def preparers(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if has_argument(child, "repertory.data.preparation.worker")]

    def host_of(self, base_model: str) -> psutil.Process | None:
        return next((host for host in self.hosts() if has_argument(host, base_model)), None)

    def train(self, org_id: str, **fields: Any) -> str:
        body = {"org_id": org_id, "conversations": [CONVERSATION], **fields}
        answer = self.client.post("/training/start", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["training_id"])

    def status(self, training_id: str) -> dict[str, Any]:
        answer = self.client.get(f"/training/status/{training_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def until(self, training_id: str, *statuses: str) -> dict[str, Any]:
        return dict(eventually(lambda: (job := self.status(training_id))["status"] in statuses and job))

    def trained(self, org_id: str, **fields: Any) -> str:
        training_id = self.train(org_id, **fields)
        job = self.until(training_id, "completed", "failed")
        assert job["status"] == "completed", job
        return training_id

    def stop(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_SECONDS)

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
