"""A limit on the time that code of somebody else may take in this thread."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _TimeIsUp(BaseException):  # so that no `except Exception` on the way takes it for an error of its own
    pass


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError where the block takes longer, between two of Python's instructions: one call into a library
    written in C runs to its end.
    """
    thread, guard, is_over = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with guard:
            if not is_over:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeIsUp))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with guard:
                is_over = True
            timer.cancel()  # an interrupt that came just before the guard was taken is raised here at the latest
    except _TimeIsUp:
        raise TimeoutError(f"not done within {seconds:g} seconds") from None
