"""/api/v1/training/{training_id}/events: what happened to a job, as a list or as it happens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from time import monotonic
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from repertory.errors import InvalidInput, RepertoryError, Unavailable
from repertory.service.api.deps import MayRead, ServiceDep, caller_of
from repertory.service.api.errors import error_body
from repertory.service.api.schemas import TrainingEvent, TrainingEvents
from repertory.service.jobs import TERMINAL, JobEvent
from repertory.service.service import Service
from repertory.service.store import NOT_NOW

router = APIRouter(prefix="/training", tags=["training"])

EVENT_STREAM = "text/event-stream"
LOOK_SECONDS = 1.0  # another service process may write the events, so they have to be looked for
SILENCE_SECONDS = 15.0  # after which a comment shows proxies that the connection lives
LARGEST_SEQ = 2**31 - 1


@router.get(
    "/{training_id}/events",
    response_model=TrainingEvents,
    responses={
        200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}},
        204: {"description": "The job has ended and all was told: an EventSource need not come again."},
    },
)
async def events(
    service: ServiceDep,
    caller: MayRead,
    request: Request,
    training_id: str,
    after: Annotated[int, Query(ge=0, le=LARGEST_SEQ)] = 0,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response | TrainingEvents:
    """The events with a greater `seq` than `after`; with `Accept: text/event-stream` as server-sent events, which go on
    from `Last-Event-ID` until the job has ended.
    """
    await run_in_threadpool(service.jobs.get, training_id, caller.org_id)
    if EVENT_STREAM not in accept:
        found = await run_in_threadpool(service.jobs.events, training_id, after)
        return TrainingEvents(training_id=training_id, events=[_shown(event) for event in found])
    if last_event_id is not None:
        after = _seq(last_event_id)
    job = await run_in_threadpool(service.jobs.get, training_id, caller.org_id)
    if job.is_terminal and not await run_in_threadpool(service.jobs.events, training_id, after):
        return Response(status_code=204)
    stream = _told(service, request, training_id, after)
    return StreamingResponse(stream, media_type=EVENT_STREAM, headers={"cache-control": "no-store"})


async def _told(service: Service, request: Request, training_id: str, after: int) -> AsyncGenerator[str]:
    spoke_at = monotonic()
    while True:
        try:
            is_silent = monotonic() - spoke_at > SILENCE_SECONDS
            found = await run_in_threadpool(_look, service, request, training_id, after, is_silent)
        except RepertoryError as error:
            yield _message("error", error_body(error.info, request.state.request_id))
            return
        except NOT_NOW:
            away = Unavailable("The database does not answer.", code="storage_unavailable")
            yield _message("error", error_body(away.info, request.state.request_id))
            return
        for event in found:
            yield _message(event.kind, _shown(event).model_dump(mode="json"), event.seq)
            if event.kind in TERMINAL:
                return
            after, spoke_at, is_silent = event.seq, monotonic(), False
        if is_silent:
            yield ": still here\n\n"
            spoke_at = monotonic()
        await asyncio.sleep(LOOK_SECONDS)


def _look(service: Service, request: Request, training_id: str, after: int, is_silent: bool) -> list[JobEvent]:
    """Raises once the key is revoked or, noticed in its silence, the job deleted, however long the stream is open."""
    caller = caller_of(request, service)
    if is_silent:
        service.jobs.get(training_id, caller.org_id)
    return service.jobs.events(training_id, after)


def _shown(event: JobEvent) -> TrainingEvent:
    return TrainingEvent(seq=event.seq, at=event.at, kind=event.kind, data=event.data)


def _message(kind: str, data: dict[str, Any], seq: int | None = None) -> str:
    number = "" if seq is None else f"id: {seq}\n"
    return f"{number}event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def _seq(last_event_id: str) -> int:
    if last_event_id.isascii() and last_event_id.isdigit() and int(last_event_id) <= LARGEST_SEQ:
        return int(last_event_id)
    raise InvalidInput(
        "Last-Event-ID is no id of these events.",
        cure="Send the id of the last event that arrived, or leave it out.",
        param="Last-Event-ID",
    )
