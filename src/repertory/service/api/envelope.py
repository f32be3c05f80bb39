"""What every request and every answer has: an id, a Host that is ours, and an error body even after our mistakes."""

from __future__ import annotations

import re
import secrets

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from repertory.errors import RepertoryError
from repertory.logs import without_text
from repertory.service.api.errors import ApiError, error_response
from repertory.settings import Settings

log = structlog.get_logger()

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Envelope:
    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._allowed_hosts = _allowed_hosts(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                self._check_host(headers)
                await self._app(scope, receive, send_with_id)
            except RepertoryError as error:
                await error_response(error.info, request_id)(scope, receive, send_with_id)
            except Exception as error:
                log.error("request failed", method=scope["method"], path=scope["path"], **without_text(error))
                if has_begun:
                    raise  # the answer is half-way out: closing the connection is all that is left to say
                mistake = RepertoryError("Something went wrong inside the service.")
                await error_response(mistake.info, request_id)(scope, receive, send_with_id)

    def _check_host(self, headers: Headers) -> None:
        """A web page that has its name resolve to 127.0.0.1 gets nothing: its requests carry that name."""
        if self._allowed_hosts is None:
            return
        names = {re.sub(r":\d*$", "", headers.get("host", "")).lower()}
        if (origin := headers.get("origin")) is not None:  # sent by a browser: the page must be one of ours too
            names.add(re.sub(r":\d*$", "", origin.partition("://")[2]).lower())
        if not names <= self._allowed_hosts:
            raise ApiError(
                403,
                "host_not_allowed",
                "The Host header names a host that this service does not answer for.",
                "Call it as localhost or 127.0.0.1, or add the name to ALLOWED_HOSTS.",
            )


def _allowed_hosts(settings: Settings) -> frozenset[str] | None:
    """None: all. A container is reached under names that nobody can foresee, so only loopback is checked by itself."""
    named = [name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip()]
    if named:
        return frozenset([*named, *LOOPBACK])
    return frozenset(LOOPBACK) if settings.host in ("localhost", "127.0.0.1", "::1") else None


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if SANE_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
