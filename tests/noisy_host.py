"""The fake host, which prints without end: 100 MB a second that are neither lines nor text.

HOST_MODULE=noisy_host, with this folder in PYTHONPATH.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

from repertory.service import fake_host

ESCAPES = b"\x1b[2J\x1b[31m\x1b]0;another title\x07"  # clears the screen, colours it, renames the window
NOISE = (b"\xff\xfe\x00" + ESCAPES + b"x" * 64) * 5000
PAUSE_SECONDS = 0.01


def print_without_end() -> None:
    while True:
        for stream in (1, 2):
            with suppress(OSError):  # a full disk does not silence it
                os.write(stream, NOISE)
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    threading.Thread(target=print_without_end, daemon=True).start()
    fake_host.main()
