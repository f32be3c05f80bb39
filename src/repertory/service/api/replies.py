"""A reply from the host that has the voice: piece by piece, while somebody listens."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from repertory.contracts import AdapterRef, BaseKey, GenerateRequest, Hyperparameters, TokenChunk
from repertory.errors import InvalidInput, JobFailed, Unavailable
from repertory.service.base_model import UNUSABLE
from repertory.service.host_client import HostClient
from repertory.service.hosts import Host
from repertory.service.models import Version
from repertory.service.service import Service

FAILED_HOST_RETRY_SECONDS = 30.0  # its failure is remembered for as long
END = "data: [DONE]\n\n"
OR_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Voice:
    """Who answers: a version of an organisation's voice, or the bare base."""

    org_id: str
    key: BaseKey
    version: Version | None

    @property
    def adapter(self) -> AdapterRef | None:
        return None if self.version is None else self.version.adapter

    @property
    def answered_by(self) -> str:
        """The version, or the base model with its revision: what a reply can be traced to."""
        return self.key.name if self.version is None else self.version.training_id


@contextmanager
def ready_host(service: Service, key: BaseKey) -> Iterator[Host]:
    """Raises Unavailable if it is not ready, whatever the reason: the request was good, and may be sent again."""
    try:
        host = service.hosts.acquire(key)
    except JobFailed as error:
        raise unavailable(error) from error
    try:
        yield host
    finally:
        service.hosts.release(host)


@contextmanager
def any_host(
    service: Service, base_model: str, hyperparameters: Hyperparameters
) -> Iterator[tuple[HostClient, BaseKey]]:
    """A host that is ready, for what any of them can tell of a base model that need not be in memory.

    Raises Unavailable, and InvalidInput where the host says that this base model can never be used.
    """
    try:
        key = service.hosts.key(base_model, hyperparameters)
        host = service.hosts.acquire_any(key)
    except JobFailed as error:
        raise unavailable(error) from error
    try:
        yield host.client, key
    except JobFailed as error:
        if error.code in UNUSABLE:
            raise InvalidInput(error.message, code=error.code, cure=error.cure, param="base_model") from error
        raise unavailable(error) from error
    finally:
        service.hosts.release(host)


async def reply(service: Service, voice: Voice, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
    with ready_host(service, voice.key) as host:
        async with aclosing(host.client.generate(request)) as pieces:
            async for piece in pieces:
                yield piece


class EventStream(StreamingResponse):
    """Server-sent events. However the connection ends, their source is closed at once, which stops the sequence."""

    def __init__(self, events: AsyncGenerator[str], source: AsyncGenerator[Any]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source):
            await super().__call__(scope, receive, send)


async def chain(first: T, rest: AsyncIterator[T]) -> AsyncGenerator[T]:
    yield first
    async for piece in rest:
        yield piece


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def unavailable(error: JobFailed) -> Unavailable:
    return Unavailable(error.message, code=error.code, cure=error.cure, retry_after_seconds=FAILED_HOST_RETRY_SECONDS)
