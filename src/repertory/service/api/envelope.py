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
        self._named_hosts = _named_hosts(settings)
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
                self._check_origin(headers)
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
        if self._allowed_hosts is not None and _name(headers.get("host", "")) not in self._allowed_hosts:
            raise ApiError(
                403,
                "host_not_allowed",
                "The Host header names a host that this service does not answer for.",
                "Call it as localhost or 127.0.0.1, or add the name to ALLOWED_HOSTS.",
            )

    def _check_origin(self, headers: Headers) -> None:
        """A browser sends forms, and requests without a body, for any page, and says whose page it is."""
        if "origin" not in headers:
            return
        page = headers["origin"].partition("://")[2].lower()
        if page != headers.get("host", "").lower() and _name(page) not in self._named_hosts:
            raise ApiError(
                403,
                "origin_not_allowed",
                "The request comes from a page of another origin.",
                "Send it from a program or from a page of this service, or add the page's host to ALLOWED_HOSTS.",
            )


def _name(authority: str) -> str:
    """Without the port."""
    return re.sub(r":\d*$", "", authority).lower()


def _named_hosts(settings: Settings) -> frozenset[str]:
    return frozenset(name.strip().lower() for name in settings.allowed_hosts.split(",") if name.strip())


def _allowed_hosts(settings: Settings) -> frozenset[str] | None:
    """None: all. A container is reached under names that nobody can foresee, so only loopback is checked by itself."""
    named = _named_hosts(settings)
    if named:
        return named | frozenset(LOOPBACK)
    return frozenset(LOOPBACK) if settings.host in ("localhost", "127.0.0.1", "::1") else None


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if SANE_REQUEST_ID.fullmatch(given) else new_request_id()


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"
