"""The HTTP application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool

from repertory.data.imports import ImportOptions
from repertory.service.api import admin, datasets, errors, events, inference, metrics, openai, training
from repertory.service.api.admin import NewKey, NewOrganisation, RotateKey
from repertory.service.api.datasets import NewDataset
from repertory.service.api.deps import authenticated, strict_query
from repertory.service.api.envelope import Envelope
from repertory.service.api.openai_schemas import ChatCompletion, TextCompletion
from repertory.service.api.schemas import EvaluateModel, Generate, StartTraining, WhichModel
from repertory.service.organisations import Limits
from repertory.service.service import Service
from repertory.settings import Settings

PREFIX = "/api/v1"
OPENAI_PREFIX = "/v1"
BODIES: dict[str, type[BaseModel]] = {
    f"{PREFIX}/admin/keys": NewKey,
    f"{PREFIX}/admin/keys/{{key_id}}/rotate": RotateKey,
    f"{PREFIX}/admin/orgs": NewOrganisation,
    f"{PREFIX}/admin/orgs/{{org_id}}/limits": Limits,
    f"{PREFIX}/training/start": StartTraining,
    f"{PREFIX}/training/estimate": StartTraining,
    f"{PREFIX}/training/evaluate": EvaluateModel,
    f"{PREFIX}/datasets/{{dataset_id}}/prepare": ImportOptions,
    f"{PREFIX}/generate": Generate,
    f"{PREFIX}/models/load": WhichModel,
    f"{PREFIX}/models/unload": WhichModel,
    f"{PREFIX}/models/promote": WhichModel,
    f"{OPENAI_PREFIX}/chat/completions": ChatCompletion,
    f"{OPENAI_PREFIX}/completions": TextCompletion,
}
OPTIONAL = (WhichModel, RotateKey)


def create_app(settings: Settings) -> FastAPI:
    """The service behind HTTP. Raises what `Service` does if the database cannot be used."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await run_in_threadpool(service.stop)

    # The pages of /docs and /redoc load their scripts from elsewhere, so they stay blank on a machine without network.
    app = FastAPI(
        title="Repertory",
        version=version("repertory"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=errors.DOCUMENTED,
    )
    app.state.service = service
    guarded = [Depends(authenticated), Depends(strict_query)]
    # Routes are tried in their order, and most requests are for replies.
    for router in (inference.router, training.router, events.router, datasets.router, admin.router):
        app.include_router(router, prefix=PREFIX, dependencies=guarded)
    app.include_router(openai.router, prefix=OPENAI_PREFIX, dependencies=guarded)
    app.include_router(inference.health_router, prefix=PREFIX, dependencies=[Depends(strict_query)])
    app.include_router(metrics.router, dependencies=guarded)
    errors.install(app)
    app.add_middleware(Envelope, settings=settings)
    app.add_middleware(metrics.Measured, metrics=service.metrics, prefixes=(PREFIX, OPENAI_PREFIX))
    _describe_bodies(app)
    return app


def _describe_bodies(app: FastAPI) -> None:
    """Bodies are parsed by our own dependency, so FastAPI has to be told of them for /openapi.json."""
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = generated()
            models: list[type[BaseModel]] = list(dict.fromkeys([*BODIES.values(), NewDataset]))
            references, definitions = models_json_schema(
                [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
            )
            schema["components"]["schemas"] |= definitions["$defs"]
            form = {"multipart/form-data": {"schema": references[NewDataset, "validation"]}}
            schema["paths"][f"{PREFIX}/datasets"]["post"]["requestBody"] = {"content": form, "required": True}
            for path, model in BODIES.items():
                content = {"application/json": {"schema": references[model, "validation"]}}
                body = {"content": content, "required": model not in OPTIONAL}
                operations = schema["paths"][path]
                operations["put" if "put" in operations else "post"]["requestBody"] = body
        return app.openapi_schema or schema

    app.openapi = openapi  # type: ignore[method-assign]
