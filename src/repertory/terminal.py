"""Text from outside on a terminal: an escape sequence in a name could repaint it, or worse."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # controls but tabs and ends of lines


def printable(text: str) -> str:
    return _UNPRINTABLE.sub("\ufffd", text)
