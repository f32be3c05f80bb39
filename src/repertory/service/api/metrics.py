"""GET /metrics, and what is measured of every request."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from repertory.service.api.deps import MayAdminister, ServiceDep
from repertory.service.metrics import Metrics

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(service: ServiceDep, _caller: MayAdminister) -> Response:
    """For Prometheus. It names organisations, so where keys are in use it wants an operator's."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


class Measured:
    """Takes the time of every request, by its route: never by its address, which may name anything."""

    def __init__(self, app: ASGIApp, metrics: Metrics, prefixes: Sequence[str]) -> None:
        """`prefixes`: under which routers are included; FastAPI's routes do not know them."""
        self._app = app
        self._metrics = metrics
        self._prefixes = prefixes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = monotonic()
        status = 0  # nothing was answered: the caller left

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.http.labels(method, self._handler(scope), status).observe(monotonic() - begin)

    def _handler(self, scope: Scope) -> str:
        if "route" not in scope:
            return "none"
        path: str = scope["route"].path
        prefix = next((one for one in self._prefixes if scope["path"].startswith(f"{one}/")), "")
        return prefix + path.removeprefix(prefix)
