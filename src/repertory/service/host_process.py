"""A host as a process of the operating system: started with a socket and a control pipe, stopped through the pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from repertory.contracts import BaseKey
from repertory.service.host_client import HostClient

STOP_GRACE_SECONDS = 8.0  # for a checkpoint's last bytes; then it is killed


# Large pages for what malloc takes, where the kernel gives them to who asks: on a CPU all that reads weights is faster
# (`docs/log.md`). glibc reads it when a process begins.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class HostProcess:
    def __init__(self, module: str, base_model: str, key: BaseKey | None, socket: Path) -> None:
        """Start it. The kernel ends it with the *thread* that runs this, so that thread must outlive it."""
        socket.unlink(missing_ok=True)  # of the process before
        self.client = HostClient(socket)
        command = [sys.executable, "-m", module, "--socket", str(socket), "--base-model", base_model]
        if key is not None:
            command += ["--quantization", key.quantization, "--dtype", key.dtype]
        environment = LARGE_PAGES | os.environ
        # Its own process group: Ctrl-C in a terminal reaches the service alone, which then stops its hosts in order.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0, env=environment)

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self, within_seconds: float) -> bool:
        """Wait that long for its end."""
        try:
            self._process.wait(within_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def exit(self) -> str:
        """How it ended, for people."""
        code = self._process.returncode
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"

    def ask_to_end(self) -> None:
        """A host ends when its control pipe does."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self) -> None:
        """Ended when this returns, gently if it listens."""
        self.ask_to_end()
        if not self.has_ended(STOP_GRACE_SECONDS):
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
