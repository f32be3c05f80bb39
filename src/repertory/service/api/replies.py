"""A reply from the host that has the voice: piece by piece, while somebody listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Depends
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from repertory.connection import unless_disconnected
from repertory.contracts import AdapterRef, BaseKey, GenerateRequest, Hyperparameters, TokenChunk
from repertory.errors import InvalidInput, JobFailed, Unavailable
from repertory.service.admission import Admitted
from repertory.service.api.deps import service_of
from repertory.service.base_model import UNUSABLE
from repertory.service.host_client import HostClient
from repertory.service.hosts import Host
from repertory.service.models import Version
from repertory.service.organisations import Limits
from repertory.service.service import Service
from repertory.settings import Settings

FAILED_HOST_RETRY_SECONDS = 30.0  # its failure is remembered for as long
DELIVERY_SECONDS = 10.0  # for the rest of a reply whose time is over
END = "data: [DONE]\n\n"
OR_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}

_JSON = json.JSONEncoder(ensure_ascii=False)  # `json.dumps` would make one for each event

Piece = tuple[int, TokenChunk]  # with the index of the reply it belongs to

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Voice:
    """Who answers: a version of an organisation's voice, or the bare base."""

    org_id: str
    limits: Limits  # of the organisation
    key: BaseKey
    version: Version | None

    @property
    def adapter(self) -> AdapterRef | None:
        return None if self.version is None else self.version.adapter

    @property
    def answered_by(self) -> str:
        """The version, or the base model with its revision: what a reply can be traced to."""
        return self.key.name if self.version is None else self.version.training_id


async def has_room(request: Request) -> None:
    """Raises Unavailable where everybody would be refused: then most requests are, so it is done before anything is
    read or looked up for them.
    """
    (await service_of(request)).admission.check_room()


ROOM = [Depends(has_room)]


def allowed_seconds(settings: Settings, asked: float | None) -> float:
    """For a reply. Raises InvalidInput if more is asked for than there is."""
    most = settings.generation_timeout_seconds
    if asked is not None and asked > most:
        raise InvalidInput(
            f"timeout_seconds {asked:g} is more than the {most:g} that a reply may take here.",
            cure="Ask for less, or have GENERATION_TIMEOUT_SECONDS raised.",
            param="timeout_seconds",
        )
    return asked or most


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


async def replies(service: Service, voice: Voice, requests: Sequence[GenerateRequest]) -> AsyncGenerator[Piece]:
    """The pieces of all replies as they come, each with the index of its request. Closing it stops them all.

    What can be refused is refused before the first piece: limits and overload, and by the host.
    """
    with (
        service.admission.admit(voice.org_id, voice.limits, len(requests)) as admitted,
        ready_host(service, voice.key) as host,
    ):
        async with aclosing(_merged([_reply(service, host, one, admitted) for one in requests])) as pieces:
            async for piece in pieces:
                yield piece


async def _reply(
    service: Service, host: Host, request: GenerateRequest, admitted: Admitted
) -> AsyncGenerator[TokenChunk]:
    charged = 0
    with service.metrics.reply(request.org_id, host.base_model) as reply:
        async with aclosing(host.client.generate(request)) as pieces:
            async for piece in pieces:
                reply.hear(piece)
                if piece.usage is not None:
                    tokens = piece.usage.prompt_tokens + piece.usage.completion_tokens
                    admitted.charge(tokens - charged)
                    charged = tokens
                yield piece


async def _merged(replies: Sequence[AsyncGenerator[TokenChunk]]) -> AsyncGenerator[Piece]:
    if len(replies) == 1:  # and no task is needed for each of its pieces
        async with aclosing(replies[0]) as only:
            async for chunk in only:
                yield 0, chunk
        return
    waiting = {asyncio.ensure_future(anext(one)): at for at, one in enumerate(replies)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for one in sorted(done, key=waiting.__getitem__):
                chunk = one.result()
                at = waiting.pop(one)
                if chunk.finish_reason is None:
                    waiting[asyncio.ensure_future(anext(replies[at]))] = at
                yield at, chunk
    finally:
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in replies:
            await source.aclose()


class EventStream(StreamingResponse):
    """Server-sent events. However the connection ends, their source is closed at once, which stops the sequence.

    So it is after `timeout_seconds`: a reader who does not read would hold a place for ever.
    """

    def __init__(self, events: AsyncGenerator[str], source: AsyncGenerator[Any], timeout_seconds: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._source = source
        self._timeout_seconds = timeout_seconds + DELIVERY_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            async with aclosing(self._source), asyncio.timeout(self._timeout_seconds):
                await unless_disconnected(Request(scope, receive), self.stream_response(send))


async def chain(first: T, rest: AsyncIterator[T]) -> AsyncGenerator[T]:
    yield first
    async for piece in rest:
        yield piece


def event(data: dict[str, Any]) -> str:
    return f"data: {_JSON.encode(data)}\n\n"


def unavailable(error: JobFailed) -> Unavailable:
    return Unavailable(error.message, code=error.code, cure=error.cure, retry_after_seconds=FAILED_HOST_RETRY_SECONDS)
