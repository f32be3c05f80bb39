"""What service and hosts tell their operator, on standard error. Never a user's text: no prompts, no replies."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

import structlog


def configure(level: str) -> None:
    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            without_secrets,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: _Output(sys.stderr),
        cache_logger_on_first_use=True,
    )


class _Output(structlog.PrintLogger):
    """What cannot be written, to a full disk or a pipe that nobody reads any more, is lost; whoever logs goes on."""

    def msg(self, message: str) -> None:
        with suppress(OSError):
            super().msg(message)

    debug = info = warning = error = critical = msg


# API keys, tokens of a hub, what follows "Bearer", and user:password@ of an address
_SECRETS = re.compile(r"\brep_[0-9A-Za-z]{8}_\w+|\bhf_\w{8,}|(?i:\bbearer)\s+\S+|(?<=://)[^\s/@]+(?=@)")


def without_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A last net: nothing that looks like a secret is written, wherever in an entry it stands."""
    return {name: _redacted(value) for name, value in event.items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return _SECRETS.sub("[secret]", value)
    if isinstance(value, dict):
        return {name: _redacted(item) for name, item in value.items()}
    return [_redacted(item) for item in value] if isinstance(value, list | tuple) else value


def without_text(error: BaseException) -> dict[str, Any]:
    """Where an unexpected error came from. Not its message: that may quote what a user has sent."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__qualname__,
        "at": [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames],
    }
