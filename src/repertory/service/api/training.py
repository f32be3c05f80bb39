"""/api/v1/training: start, watch, measure and cancel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Annotated, Any

import anyio
import structlog
from fastapi import APIRouter, Depends, Header, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from repertory.connection import unless_disconnected
from repertory.contracts import Download, EstimateRequest, EvaluateRequest, OrgId
from repertory.data.findings import findings_of
from repertory.data.imports import ImportSummary
from repertory.data.preparation.inline import inspect
from repertory.errors import DataUnusable, InvalidInput, Unavailable
from repertory.service.api.body import body_of
from repertory.service.api.deps import MayRead, MayTrain, ServiceDep
from repertory.service.api.replies import any_host, ready_host
from repertory.service.api.schemas import (
    EvaluateModel,
    JobError,
    ModelEvaluated,
    StartTraining,
    TrainingCancelled,
    TrainingEstimate,
    TrainingFindings,
    TrainingJobs,
    TrainingStarted,
    TrainingStatus,
)
from repertory.service.base_model import allowed_base_model, check_architecture, is_on_hub_alone
from repertory.service.jobs import FEW_CONVERSATIONS, Accepted, Job, JobConfig, Status, Submission, request_hash
from repertory.service.models import BASE, Version
from repertory.service.service import Service

log = structlog.get_logger()
router = APIRouter(prefix="/training", tags=["training"])

NOTHING: Mapping[str, Any] = MappingProxyType({})
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@router.post("/start")
async def start(
    service: ServiceDep,
    caller: MayTrain,
    response: Response,
    body: Annotated[StartTraining, Depends(body_of(StartTraining))],
    idempotency_key: Annotated[str | None, Header()] = None,
) -> TrainingStarted:
    """Accept a job. Once this is answered, the job survives a restart, a crash and a power cut."""
    if idempotency_key is not None and not IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise InvalidInput(
            "Idempotency-Key must be 1 to 255 visible ASCII characters.",
            cure="Use a UUID.",
            param="Idempotency-Key",
        )
    caller.organisation(body.org_id)
    # Before anything else: what was asked for then (a dataset, a version) may be gone by now.
    earlier = await run_in_threadpool(_earlier, body, service, idempotency_key)
    accepted = earlier or await _accept(body, service, idempotency_key)
    service.dispatcher.wake()
    if accepted.is_replay:
        response.headers["idempotent-replayed"] = "true"
    # As the first answer was, even if the job has run since.
    job = accepted.job
    return TrainingStarted(training_id=job.id, org_id=job.org_id, status=Status.QUEUED, progress=0.0)


@router.post("/estimate")
async def estimate(
    request: Request,
    service: ServiceDep,
    caller: MayTrain,
    body: Annotated[StartTraining, Depends(body_of(StartTraining))],
) -> TrainingEstimate:
    """What a start with this body would be and take. Nothing is stored, and no base model is loaded for it."""
    caller.organisation(body.org_id)
    submission = await run_in_threadpool(_submission, body, service, None)
    config = submission.config
    on_dataset = None if submission.dataset_id is None else service.imports.get(submission.dataset_id, body.org_id)
    with any_host(service, submission.base_model, config.hyperparameters) as (host, key):
        asked = EstimateRequest(
            key=key,
            conversations=None if submission.conversations is None else list(submission.conversations),
            conversations_path=None if on_dataset is None else str(service.imports.conversations_path(on_dataset)),
            hyperparameters=config.hyperparameters,
            validation_split=config.validation_split,
            system_prompt=config.system_prompt,
        )
        with _unusable_is_invalid():
            estimated = await unless_disconnected(request, host.estimate(asked))
    return TrainingEstimate(**estimated.model_dump(), findings=dict(submission.findings) or None)


@router.get("/findings/{training_id}")
def findings(service: ServiceDep, caller: MayRead, training_id: str) -> TrainingFindings:
    """What was found in the conversations that the job brought. They were changed only if `prepare` was true."""
    job = service.jobs.get(training_id, caller.org_id)
    return TrainingFindings(training_id=job.id, findings=service.datasets.findings(job.org_id, job.id))


@router.get("/status/{training_id}")
def status(service: ServiceDep, caller: MayRead, training_id: str) -> TrainingStatus:
    job = service.jobs.get(training_id, caller.org_id)
    if job.status not in (Status.QUEUED, Status.PREPARING):
        return _status(job)
    return _status(job, service.jobs.queue_positions(), service.hosts.downloads())


# Of an organisation when it is read, of a job when it is cancelled: one address, so one name in the description.
@router.get("/jobs/{name}")
def jobs(service: ServiceDep, caller: MayRead, org_id: Annotated[OrgId, Path(alias="name")]) -> TrainingJobs:
    """Newest first."""
    caller.organisation(org_id)
    positions = service.jobs.queue_positions()
    downloads = service.hosts.downloads()
    return TrainingJobs(jobs=[_status(job, positions, downloads) for job in service.jobs.of_organisation(org_id)])


@router.delete("/jobs/{name}")
async def cancel(
    service: ServiceDep, caller: MayTrain, training_id: Annotated[str, Path(alias="name")]
) -> TrainingCancelled:
    """Answered when the run has really stopped."""
    await run_in_threadpool(service.jobs.get, training_id, caller.org_id)
    # With a limiter of its own: however many wait here, the threads that answer other requests stay free.
    await anyio.to_thread.run_sync(service.dispatcher.cancel, training_id, limiter=anyio.CapacityLimiter(1))
    return TrainingCancelled(message="The training is cancelled.", training_id=training_id)


@router.post("/evaluate")
async def evaluate(
    request: Request,
    service: ServiceDep,
    caller: MayTrain,
    body: Annotated[EvaluateModel, Depends(body_of(EvaluateModel))],
) -> ModelEvaluated:
    """Perplexity of base and voice, and their replies to the test prompts side by side."""
    if body.model_id == BASE:
        raise InvalidInput(
            "The bare base model has no held-out conversations.",
            cure="Name a trained model; its evaluation has the base's figures beside its own.",
            param="model_id",
        )
    version = await run_in_threadpool(service.models.find, caller.organisation(body.org_id), body.model_id)
    held_out = service.datasets.conversations_path(version.org_id, version.training_id)
    asked = EvaluateRequest(
        org_id=version.org_id,
        adapter=version.adapter,
        conversations_path=str(held_out) if body.conversations is None else None,
        conversations=body.conversations,
        test_prompts=body.test_prompts,
    )
    with ready_host(service, version.key) as host, _unusable_is_invalid():
        metrics = await unless_disconnected(request, host.client.evaluate(asked))
    return ModelEvaluated(model_path=str(version.folder), model_id=version.training_id, metrics=metrics)


@contextmanager
def _unusable_is_invalid() -> Iterator[None]:
    """Of a job that runs it is the end; here it is an answer to what was sent."""
    try:
        yield
    except DataUnusable as error:
        raise InvalidInput(error.message, code=error.code, cure=error.cure, param="conversations") from error


def _earlier(body: StartTraining, service: Service, idempotency_key: str | None) -> Accepted | None:
    return service.jobs.earlier(body.org_id, idempotency_key, _hash(body))


async def _accept(body: StartTraining, service: Service, idempotency_key: str | None) -> Accepted:
    submission = await run_in_threadpool(_submission, body, service, idempotency_key)
    await _check_on_hub(submission, service)
    return await run_in_threadpool(service.jobs.submit, submission)


async def _check_on_hub(submission: Submission, service: Service) -> None:
    """Of a base model that only the hub knows: a host asks it, and has a few seconds for that.

    Raises InvalidInput for one that can never be trained on. Without an answer (no host is ready yet, the hub is out of
    reach or does not let us read) the job is accepted; its host will ask again when the job is prepared.
    """
    name, settings = submission.base_model, service.settings
    if name == settings.default_base_model or not await run_in_threadpool(is_on_hub_alone, name, settings):
        return
    try:
        with any_host(service, name, submission.config.hyperparameters) as (host, key):
            await host.check_on_hub(key)
    except Unavailable as error:
        log.info("accepted without the hub's word", base_model=name, code=error.code)


def _submission(body: StartTraining, service: Service, idempotency_key: str | None) -> Submission:
    settings = service.settings
    summary = _summary(body, service)
    inspection = None if body.conversations is None else inspect(body.conversations)
    conversations = inspection.prepared if inspection is not None and body.prepare else body.conversations
    sent = len(conversations or []) if summary is None else summary.conversations or 0
    if sent < settings.min_training_samples:
        raise InvalidInput(
            f"{sent} conversations were sent and {settings.min_training_samples} are needed.",
            code="too_few_conversations",
            cure="Send more conversations, or lower MIN_TRAINING_SAMPLES.",
            param="conversations",
        )
    base_model = settings.default_base_model
    if body.base_model is not None:
        base_model = allowed_base_model(body.base_model, settings)
        check_architecture(base_model, settings)
    requested = body.requested
    version = None
    if body.continue_from is not None:
        version = service.models.find(body.org_id, body.continue_from)
        _check_same_shape(body, version)
        base_model = version.key.name  # at the very commit it was trained on
        requested = version.shape.over(requested)
    split = settings.validation_split if body.validation_split is None else body.validation_split
    metadata: dict[str, Any] = {
        "base_model": base_model,
        "requested": body.requested.model_dump(mode="json", exclude_none=True),
        "conversations": sent,
        "validation_split": split,
        "warnings": [],
    }
    system_prompt = body.system_prompt
    if summary is not None:
        metadata |= {"dataset_id": body.dataset_id, "recorded_authors": summary.recorded_authors}
        system_prompt = system_prompt or summary.system_prompt
    if body.conversations is not None:
        metadata["recorded_authors"] = len({author for one in body.conversations for author in one.authors or ()})
    if inspection is not None:
        metadata["findings"] = dict(inspection.findings.counts)
        if body.prepare:
            metadata["prepared"] = {"surrogates": inspection.surrogates, "duplicates": inspection.duplicates}
    if body.name is not None:
        metadata["name"] = body.name
    if sent < FEW_CONVERSATIONS:
        metadata["warnings"].append(
            f"Only {sent} of the {FEW_CONVERSATIONS} or more conversations that it usually takes to catch a voice."
        )
    hyperparameters = requested.over(settings.hyperparameters)
    device = service.hosts.device
    if device is not None:  # as long as the first host has not told, the run itself will refuse what cannot be done
        hyperparameters.check_device(device.kind)
    config = JobConfig(
        hyperparameters=hyperparameters,
        validation_split=split,
        system_prompt=system_prompt,
        continue_from=None if version is None else version.training_id,
        publish_anyway=body.publish_anyway,
    )
    return Submission(
        org_id=body.org_id,
        base_model=base_model,
        config=config,
        conversations=conversations,
        findings={} if inspection is None else findings_of(inspection.findings),
        dataset_id=body.dataset_id,
        metadata=metadata,
        request_hash=_hash(body),
        idempotency_key=idempotency_key,
    )


def _hash(body: StartTraining) -> str:
    return request_hash(body.model_dump_json())


def _summary(body: StartTraining, service: Service) -> ImportSummary | None:
    """Of the dataset to train on, or None: the body brings conversations. Raises InvalidInput for both and none."""
    if body.conversations is not None and body.dataset_id is not None:
        raise InvalidInput("conversations and dataset_id are both there.", cure="Send one of them.", param="dataset_id")
    if body.dataset_id is not None and body.prepare:
        raise InvalidInput(
            "prepare is for conversations; a dataset is prepared already.",
            cure="Leave it out; POST /api/v1/datasets/{dataset_id}/prepare prepares a dataset again.",
            param="prepare",
        )
    if body.conversations is not None:
        return None
    if body.dataset_id is None:
        raise InvalidInput(
            "conversations is missing.",
            code="missing_field",
            cure="Add it, or name a dataset_id of POST /api/v1/datasets.",
            param="conversations",
        )
    return service.imports.ready(body.dataset_id, body.org_id)[1]


def _check_same_shape(body: StartTraining, version: Version) -> None:
    """Raises InvalidInput where the body asks for another base model or shape than the version to go on from has."""
    asked, kept = body.requested.model_dump(exclude_none=True), version.shape.model_dump(exclude_none=True)
    if isinstance(asked.get("lora_target_modules"), str):
        asked["lora_target_modules"] = sorted(asked["lora_target_modules"].split(","))
    other = [f"hyperparameters.{name}" for name, value in asked.items() if name in kept and kept[name] != value]
    if body.base_model not in (None, version.key.base_model, version.key.name):
        other.insert(0, "base_model")
    if other:
        raise InvalidInput(
            f"{other[0]} differs from that of {version.training_id}, which this job is to go on from.",
            code="differs_from_continued",
            cure="Leave it out: base model, precision and the shape of the adapter stay as they are.",
            param=other[0],
        )


def _status(
    job: Job, queue_positions: Mapping[str, int] = NOTHING, downloads: Mapping[str, Download] = NOTHING
) -> TrainingStatus:
    metadata = dict(job.metadata)
    if job.id in queue_positions:
        metadata["queue_position"] = queue_positions[job.id]
    if job.status in (Status.QUEUED, Status.PREPARING) and job.base_model in downloads:
        download = downloads[job.base_model]
        metadata["download"] = download.model_dump() | {"percent": download.percent}
    if job.waiting_for is not None:
        metadata["waiting_for"] = job.waiting_for
    return TrainingStatus(
        training_id=job.id,
        org_id=job.org_id,
        status=job.status,
        progress=job.progress,
        created_at=job.created_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        error=None if job.error is None else JobError.model_validate(job.error.model_dump()),
        metadata=metadata,
    )
