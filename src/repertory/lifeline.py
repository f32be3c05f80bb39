"""A child process that ends with the service, whatever ends that."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def end_with_service() -> None:
    """Called by the child. Its standard input is a pipe that the service holds open as long as it wants the child."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def until_closed() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os._exit(0)

    threading.Thread(target=until_closed, name="control-pipe", daemon=True).start()
