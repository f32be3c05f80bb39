"""/api/v1/datasets: send a chat export, see who speaks in it, have it prepared, look at what would be learned."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import ConfigDict, ValidationError
from starlette.concurrency import run_in_threadpool

from repertory.contracts import OrgId, Preview, PreviewRequest, TokensRequest
from repertory.data.imports import ImportOptions
from repertory.errors import InvalidInput, Unavailable
from repertory.service.api.body import body_of
from repertory.service.api.deps import MayRead, MayTrain, OrgIdQuery, ServiceDep
from repertory.service.api.errors import InvalidRequest, problem
from repertory.service.api.replies import any_host
from repertory.service.api.schemas import (
    Consent,
    DatasetAccepted,
    DatasetAuthors,
    DatasetDeleted,
    DatasetList,
    DatasetStatus,
    Forgotten,
    JobError,
)
from repertory.service.api.upload import receive
from repertory.service.base_model import allowed_base_model
from repertory.service.imports import Dataset, new_id
from repertory.service.service import Service

router = APIRouter(prefix="/datasets", tags=["datasets"])

LISTS = ("persona", "exclude", "mask", "column")  # fields that may come again and again


class NewDataset(ImportOptions):
    """The fields of the form, beside the file."""

    model_config = ConfigDict(
        json_schema_extra=lambda schema: schema["properties"].update(file={"type": "string", "format": "binary"})
    )

    org_id: OrgId

    @property
    def options(self) -> ImportOptions:
        return ImportOptions.model_validate(self.model_dump(exclude={"org_id"}))


@router.post("", status_code=202)
async def send(service: ServiceDep, caller: MayTrain, request: Request) -> DatasetAccepted:
    """Accept an export. Once this is answered, it survives a restart, a crash and a power cut."""
    if caller.org_id is not None:
        await run_in_threadpool(service.quotas.check_datasets, caller.org_id)  # before anything comes
    dataset_id = new_id()
    folder = await run_in_threadpool(service.datasets.new_upload, dataset_id)
    try:
        into = folder / "export"
        into.mkdir()
        upload = await receive(request, into, int(service.settings.max_upload_gb * (1 << 30)))
        asked = _asked(upload.fields)
        org_id = caller.organisation(asked.org_id)
        await run_in_threadpool(service.quotas.check_datasets, org_id, upload.file_bytes)
        await run_in_threadpool(asked.options.check)
        dataset = await run_in_threadpool(
            service.imports.accept,
            org_id,
            dataset_id,
            upload.file_name or "",
            upload.file_bytes,
            asked.options,
        )
    finally:  # nothing is there any more of one that was accepted
        await run_in_threadpool(service.datasets.discard_upload, dataset_id)
    return DatasetAccepted(dataset_id=dataset.id, status=dataset.status)


@router.get("")
def of_organisation(service: ServiceDep, caller: MayRead, org_id: Annotated[OrgId, Query()]) -> DatasetList:
    """Newest first, without their reports."""
    caller.organisation(org_id)
    return DatasetList(datasets=[_status(one, service) for one in service.imports.of_organisation(org_id)])


@router.get("/consent")
def consent(
    service: ServiceDep, caller: MayRead, org_id: Annotated[OrgId, Query()], author: Annotated[str, Query()]
) -> Consent:
    """Where the words of an author are, by the id that `authors` has: in which datasets, and in which voices."""
    of_datasets, of_jobs = service.imports.with_words_of(caller.organisation(org_id), author)
    return Consent(datasets=of_datasets, trainings=of_jobs, unrecorded=service.imports.unrecorded(org_id))


@router.delete("/consent", status_code=202)
def forget(
    service: ServiceDep, caller: MayTrain, org_id: Annotated[OrgId, Query()], author: Annotated[str, Query()]
) -> Forgotten:
    """Delete an author's words, by the id that `authors` has. The datasets are written anew, and prepared again if they
    were; from what voices were trained on every conversation with such words is taken, and the voices are marked."""
    of_datasets, of_jobs, unread = service.imports.forget(caller.organisation(org_id), author)
    return Forgotten(
        datasets=of_datasets,
        trainings=of_jobs,
        unread=unread,
        unrecorded=service.imports.unrecorded(org_id),
        message="The words are being deleted.",
    )


@router.get("/{dataset_id}")
async def status(service: ServiceDep, caller: MayRead, dataset_id: str, org_id: OrgIdQuery = None) -> DatasetStatus:
    """With its report once it is ready. The report's `tokens` want the base model's tokenizer: null without a host."""
    dataset = await run_in_threadpool(service.imports.get, dataset_id, caller.narrowed(org_id))
    report = await run_in_threadpool(service.imports.report, dataset)
    if report is not None:
        report["tokens"] = await _tokens(dataset, service)
    return await run_in_threadpool(_status, dataset, service, report=report)


async def _tokens(dataset: Dataset, service: Service) -> dict[str, Any] | None:
    """How long the rows are in tokens of the default base model; None while that cannot be told."""
    settings = service.settings
    try:
        with any_host(service, settings.default_base_model, settings.hyperparameters) as (host, key):
            if (known := service.imports.known_tokens(dataset, key.name)) is not None:
                return known.model_dump()
            request = TokensRequest(
                key=key,
                conversations_path=str(service.imports.conversations_path(dataset)),
                hyperparameters=settings.hyperparameters,
                system_prompt=None if dataset.summary is None else dataset.summary.system_prompt,
            )
            measured = await host.tokens(request)
    except (Unavailable, InvalidInput):
        return None
    service.imports.know_tokens(dataset, key.name, measured)
    return measured.model_dump()


@router.get("/{dataset_id}/authors")
def authors(service: ServiceDep, caller: MayRead, dataset_id: str, org_id: OrgIdQuery = None) -> DatasetAuthors:
    """Who speaks in it, most first: to choose the persona from. Known as soon as the export has been read."""
    found = service.imports.authors(service.imports.get(dataset_id, caller.narrowed(org_id)))
    return DatasetAuthors(dataset_id=dataset_id, **found)


@router.get("/{dataset_id}/preview")
async def preview(
    service: ServiceDep,
    caller: MayRead,
    dataset_id: str,
    org_id: OrgIdQuery = None,
    count: Annotated[int, Query(ge=1, le=100)] = 5,
    base_model: Annotated[str | None, Query()] = None,
) -> Preview:
    """Some conversations, evenly spread, exactly as the model will see them, with what is learned marked."""
    settings = service.settings
    wanted = settings.default_base_model if base_model is None else allowed_base_model(base_model, settings)
    dataset, summary = await run_in_threadpool(service.imports.ready, dataset_id, caller.narrowed(org_id))
    conversations = await run_in_threadpool(service.imports.conversations, dataset, count)
    with any_host(service, wanted, settings.hyperparameters) as (host, key):
        request = PreviewRequest(
            key=key,
            conversations=conversations,
            hyperparameters=settings.hyperparameters,
            system_prompt=summary.system_prompt,
        )
        return await host.preview(request)


@router.post("/{dataset_id}/prepare", status_code=202)
def prepare(
    service: ServiceDep,
    caller: MayTrain,
    dataset_id: str,
    options: Annotated[ImportOptions, Depends(body_of(ImportOptions))],
    org_id: OrgIdQuery = None,
) -> DatasetAccepted:
    """Prepare it, again where it was already, with these options in place of all those before."""
    options.check()
    dataset = service.imports.get(dataset_id, caller.narrowed(org_id))
    service.quotas.check_datasets(dataset.org_id)
    dataset = service.imports.prepare(dataset.id, dataset.org_id, options)
    return DatasetAccepted(dataset_id=dataset.id, status=dataset.status)


@router.delete("/{dataset_id}")
def delete(service: ServiceDep, caller: MayTrain, dataset_id: str, org_id: OrgIdQuery = None) -> DatasetDeleted:
    """Remove the export and all that was made of it. Jobs that were started on it keep their copy."""
    service.imports.delete(dataset_id, caller.narrowed(org_id))
    return DatasetDeleted(message="The dataset is deleted.", dataset_id=dataset_id)


def _asked(fields: dict[str, list[str]]) -> NewDataset:
    twice = [name for name, values in fields.items() if name not in LISTS and len(values) > 1]
    if twice:
        raise InvalidRequest([problem({"type": "twice", "loc": (twice[0],), "msg": "is sent twice"})])
    values: dict[str, Any] = {name: sent if name in LISTS else sent[0] for name, sent in fields.items()}
    try:
        return NewDataset.model_validate(values)
    except ValidationError as error:
        known = list(NewDataset.model_fields)
        raise InvalidRequest(
            [problem(details, known) for details in error.errors(include_input=False, include_url=False)]
        ) from None


def _status(dataset: Dataset, service: Service, report: dict[str, Any] | None = None) -> DatasetStatus:
    summary = dataset.summary
    return DatasetStatus(
        dataset_id=dataset.id,
        org_id=dataset.org_id,
        status=dataset.status,
        progress=service.imports.progress(dataset),
        created_at=dataset.created_at,
        file_name=dataset.file_name,
        file_bytes=dataset.file_bytes,
        options=dataset.options.model_dump(exclude_defaults=True),
        summary=summary,
        error=None if dataset.error is None else JobError.model_validate(dataset.error.model_dump()),
        trained=service.imports.trained(dataset),
        report=report,
    )
