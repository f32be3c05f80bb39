"""/api/v1/generate, /api/v1/models and /api/v1/health."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from importlib.metadata import version as version_of
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from repertory.connection import unless_disconnected
from repertory.contracts import BaseKey, GenerateRequest
from repertory.errors import InvalidInput, JobFailed, RepertoryError, Unauthenticated
from repertory.service.api.body import body_of, optional_body_of
from repertory.service.api.deps import (
    Caller,
    MayInfer,
    MayRead,
    MayTrain,
    ModelIdQuery,
    OrgIdPath,
    OrgIdQuery,
    ServiceDep,
    caller_of,
    organisation,
)
from repertory.service.api.errors import error_body
from repertory.service.api.replies import (
    END,
    OR_EVENTS,
    ROOM,
    EventStream,
    Piece,
    Voice,
    allowed_seconds,
    chain,
    event,
    ready_host,
    replies,
    unavailable,
)
from repertory.service.api.schemas import (
    Generate,
    Generated,
    Health,
    HealthStatus,
    HostSummary,
    JobError,
    ListedModel,
    ModelInfo,
    ModelList,
    ModelLoaded,
    ModelPromoted,
    ModelUnloaded,
    WhichModel,
)
from repertory.service.hosts import Host
from repertory.service.keys import Scope
from repertory.service.models import BASE, LATEST, Version
from repertory.service.service import Service
from repertory.settings import Settings

VERSION = version_of("repertory")  # read from a file

router = APIRouter(tags=["inference"])
health_router = APIRouter(tags=["health"])  # needs no key


@router.post("/generate", response_model=Generated, responses=OR_EVENTS, dependencies=ROOM)
async def generate(
    request: Request,
    service: ServiceDep,
    caller: MayInfer,
    body: Annotated[Generate, Depends(body_of(Generate))],
    org_id: OrgIdQuery = None,
) -> Generated | Response:
    """A reply in the organisation's voice, whole or (with `stream`) as server-sent events."""
    voice = await run_in_threadpool(_voice, service, caller, org_id, body.model_id)
    asked = _for_host(body, voice, service.settings, request.state.request_id)
    pieces = replies(service, voice, [asked])
    if body.stream:
        # With the first piece in hand, everything that can be refused has been, with a status of its own.
        first = await unless_disconnected(request, anext(pieces))
        events = _events(first, pieces, voice, request.state.request_id)
        return EventStream(events, pieces, allowed_seconds(service.settings, body.timeout_seconds))
    return await unless_disconnected(request, _whole(pieces, voice))


@router.post("/models/load")
async def load(
    service: ServiceDep,
    caller: MayInfer,
    body: Annotated[WhichModel, Depends(optional_body_of(WhichModel))],
    org_id: OrgIdQuery = None,
    model_id: ModelIdQuery = None,
) -> ModelLoaded:
    """Have a voice in memory before its first request, which would load it as well."""
    wanted = _one_of("model_id", model_id, body.model_id) or LATEST
    voice = await run_in_threadpool(_voice, service, caller, _one_of("org_id", org_id, body.org_id), wanted)
    with ready_host(service, voice.key) as host:
        if voice.adapter is not None:
            await host.client.load(voice.adapter)
    return ModelLoaded(message="The model is in memory.", model_info=_loaded(voice))


@router.post("/models/unload")
async def unload(
    service: ServiceDep,
    caller: MayInfer,
    body: Annotated[WhichModel, Depends(optional_body_of(WhichModel))],
    org_id: OrgIdQuery = None,
    model_id: ModelIdQuery = None,
) -> ModelUnloaded:
    """Free the memory of an organisation's voices, or of one of them. The next request loads again."""
    org = await run_in_threadpool(organisation, service, caller, _one_of("org_id", org_id, body.org_id))
    wanted = _one_of("model_id", model_id, body.model_id)
    if wanted is None:
        versions = await run_in_threadpool(service.models.versions, org)
    else:
        versions = [await run_in_threadpool(service.models.look_up, org, wanted)]
    await run_in_threadpool(service.hosts.refresh)
    unloaded = 0
    for host in service.hosts.ready():
        for version in versions:
            if version.training_id in host.health.adapters:
                await host.client.unload(version.adapter)
                unloaded += 1
    message = "The model is no longer in memory." if unloaded else "The model was not in memory."
    return ModelUnloaded(message=message, org_id=org)


@router.post("/models/promote")
def promote(
    service: ServiceDep,
    caller: MayTrain,
    body: Annotated[WhichModel, Depends(optional_body_of(WhichModel))],
    org_id: OrgIdQuery = None,
    model_id: ModelIdQuery = None,
) -> ModelPromoted:
    """Have an organisation speak with this version from the next request on, such as the one before the last."""
    org = organisation(service, caller, _one_of("org_id", org_id, body.org_id))
    wanted = _one_of("model_id", model_id, body.model_id)
    if wanted is None or wanted in (LATEST, BASE):
        raise InvalidInput(
            "Only a version can be promoted.",
            cure="Give the training id of a completed job as model_id; GET /api/v1/models/{org_id}/list has them.",
            param="model_id",
        )
    version = service.models.promote(org, wanted)
    service.hosts.refresh()
    is_loaded = version.training_id in service.hosts.loaded_adapters()
    about = model_info(version, version.metadata, is_loaded=is_loaded)
    return ModelPromoted(message="The organisation speaks with this model.", model_info=about)


@router.get("/models/{org_id}/info")
def info(service: ServiceDep, caller: MayRead, org_id: OrgIdPath) -> ModelInfo:
    """Of the version that answers as `latest`."""
    version = service.models.find(caller.organisation(org_id), LATEST)
    service.hosts.refresh()
    return model_info(version, version.metadata, is_loaded=version.training_id in service.hosts.loaded_adapters())


@router.get("/models/{org_id}/list")
def list_models(service: ServiceDep, caller: MayRead, org_id: OrgIdPath) -> ModelList:
    """Newest first."""
    caller.organisation(org_id)
    promoted = service.models.promoted(org_id)
    listed = [
        ListedModel(
            model_id=version.training_id,
            created_at=version.created_at,
            promoted=promoted is not None and version.training_id == promoted.training_id,
            metadata=version.summary,
        )
        for version in service.models.list(org_id)
    ]
    return ModelList(org_id=org_id, models=listed, count=len(listed))


@health_router.get("/health")
async def health(request: Request, service: ServiceDep) -> Health | HealthStatus:
    """How it is; with API keys in use, to the operator's keys alone more than the status."""
    service.store.pin()
    if service.keys.are_known_not_to_be_required() and service.jobs.are_counted():
        return _health_for(request, service)
    return await run_in_threadpool(_health_for, request, service)


def _health_for(request: Request, service: Service) -> Health | HealthStatus:
    try:
        required, caller = service.keys.are_required(), caller_of(request, service)
    except (Unauthenticated, SQLAlchemyError):
        required, caller = True, None
    whole = _health(service, mode="keys" if required else "open")
    if caller is None or caller.org_id is not None or Scope.READ not in caller.scopes:
        return HealthStatus(status=whole.status)
    return whole


def _health(service: Service, mode: Literal["open", "keys"]) -> Health:
    device = service.hosts.device
    failure = service.hosts.last_failure()
    status = service.hosts.status()
    try:
        jobs = service.jobs.counts()
    except SQLAlchemyError:
        jobs, status = None, "degraded"
    return Health(
        status=status,
        version=VERSION,
        mode=mode,
        cuda_available=device is not None and device.kind == "cuda",
        cuda_device_count=device.count if device is not None and device.kind == "cuda" else 0,
        device=None if device is None else device.name,
        loaded_models=len(service.hosts.loaded_adapters()),
        hosts=[_summary(host) for host in service.hosts.all()],
        jobs=jobs,
        error=None if failure is None else JobError.model_validate(failure.model_dump()),
    )


def model_info(version: Version, metadata: dict[str, Any], *, is_loaded: bool) -> ModelInfo:
    return ModelInfo(
        org_id=version.org_id,
        model_id=version.training_id,
        model_path=str(version.folder),
        metadata=metadata,
        loaded=is_loaded,
    )


def _loaded(voice: Voice) -> ModelInfo:
    """Of a voice that has just answered."""
    if voice.version is not None:
        return model_info(voice.version, voice.version.summary, is_loaded=True)
    return ModelInfo(
        org_id=voice.org_id,
        model_id=BASE,
        model_path=voice.key.base_model,
        metadata=voice.key.model_dump(exclude_none=True),
        loaded=True,
    )


def _voice(service: Service, caller: Caller, org_id: str | None, model_id: str) -> Voice:
    org = organisation(service, caller, org_id)
    version = service.models.find(org, model_id) if model_id != BASE else None
    key = _base_key(service, org) if version is None else version.key
    return Voice(org_id=org, limits=service.organisations.limits(org), key=key, version=version)


def _base_key(service: Service, org_id: str) -> BaseKey:
    """The base of the organisation's voice, to compare with; of one that has none, the default."""
    promoted = service.models.promoted(org_id)
    if promoted is not None:
        return promoted.key
    settings = service.settings
    try:
        return service.hosts.key(settings.default_base_model, settings.hyperparameters)
    except JobFailed as error:
        raise unavailable(error) from error


def _for_host(body: Generate, voice: Voice, settings: Settings, request_id: str) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        org_id=voice.org_id,
        adapter=voice.adapter,
        messages=body.messages,
        temperature=settings.temperature if body.temperature is None else body.temperature,
        top_p=settings.top_p if body.top_p is None else body.top_p,
        top_k=settings.top_k if body.top_k is None else body.top_k,
        max_tokens=settings.max_new_tokens if body.max_tokens is None else body.max_tokens,
        stop=body.stop,
        seed=body.seed,
        timeout_seconds=allowed_seconds(settings, body.timeout_seconds),
    )


async def _whole(pieces: AsyncGenerator[Piece], voice: Voice) -> Generated:
    text = ""
    async with aclosing(pieces):
        async for _, piece in pieces:
            text += piece.text
            if piece.finish_reason is not None and piece.usage is not None:
                return Generated(
                    response=text,
                    finish_reason=piece.finish_reason,
                    usage=piece.usage,
                    model_info=_loaded(voice),
                )
    raise AssertionError("a host client ends with a finish_reason or an error")


async def _events(first: Piece, rest: AsyncIterator[Piece], voice: Voice, request_id: str) -> AsyncGenerator[str]:
    try:
        async for _, piece in chain(first, rest):
            if piece.text:
                yield event({"text": piece.text})
            if piece.finish_reason is not None and piece.usage is not None:
                yield event(
                    {
                        "done": True,
                        "finish_reason": piece.finish_reason,
                        "usage": piece.usage.model_dump(),
                        "model_info": _loaded(voice).model_dump(mode="json"),
                    }
                )
        yield END
    except RepertoryError as error:
        yield event(error_body(error.info, request_id))


def _one_of(name: str, in_query: str | None, in_body: str | None) -> str | None:
    if in_query is not None and in_body is not None and in_query != in_body:
        raise InvalidInput(
            f"{name} differs between the query and the body.", cure="Send it in one of the two places.", param=name
        )
    return in_query if in_query is not None else in_body


def _summary(host: Host) -> HostSummary:
    return HostSummary(
        base_model=host.base_model,
        quantization=None if host.key is None else host.key.quantization,
        dtype=None if host.key is None else host.key.dtype,
        state="ready" if host.is_ready else "starting",
        phase="" if host.is_ready else host.phase,
        download=None if host.is_ready else host.health.download,
        adapters=len(host.health.adapters),
        running=host.health.running,
        waiting=host.health.waiting,
        runs=len(host.health.runs),
        memory_bytes=host.health.memory_bytes,
    )
