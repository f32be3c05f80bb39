"""Who gets in: every route of the OpenAPI document with no key, a wrong scope, and another organisation's key.

A new route needs a row in ROUTES, or the first test fails.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event, insert

from repertory import manifest
from repertory.contracts import BaseKey
from repertory.data.imports import ImportOptions
from repertory.service.api.app import create_app
from repertory.service.imports import new_id
from repertory.service.keys import Scope, included
from repertory.service.service import Service
from repertory.service.store import model_versions, now
from repertory.settings import Settings
from running_service import CONVERSATION

from .conftest import submission

FORM = {"content-type": "multipart/form-data; boundary=b"}


def form(**fields: str) -> bytes:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    file = '--b\r\nContent-Disposition: form-data; name="file"; filename="export.json"\r\n\r\n[]\r\n'
    return "".join([*parts, file, "--b--\r\n"]).encode()


@dataclass(frozen=True)
class Route:
    """What a route wants, and a call that names things of one organisation: {org_id}, {training_id}, {dataset_id}."""

    scope: Scope | None
    query: dict[str, str] = field(default_factory=dict)
    json: dict[str, Any] | None = None
    form: dict[str, str] | None = None
    name: str = ""  # what {name} of its path stands for
    names_nothing: bool = False  # so the answer must not show anything of others by itself


START = {"org_id": "{org_id}", "conversations": [CONVERSATION]}
CHAT = {"model": "{org_id}@{training_id}", "messages": [{"role": "user", "content": "Hi"}]}

ROUTES: dict[str, Route] = {
    "POST /api/v1/training/start": Route(Scope.TRAIN, json=START),
    "GET /api/v1/training/{training_id}/events": Route(Scope.READ),
    "POST /api/v1/training/estimate": Route(Scope.TRAIN, json=START),
    "GET /api/v1/training/status/{training_id}": Route(Scope.READ),
    "GET /api/v1/training/findings/{training_id}": Route(Scope.READ),
    "GET /api/v1/training/jobs/{name}": Route(Scope.READ, name="{org_id}"),
    "DELETE /api/v1/training/jobs/{name}": Route(Scope.TRAIN, name="{training_id}"),
    "POST /api/v1/training/evaluate": Route(Scope.TRAIN, json={"org_id": "{org_id}", "model_id": "{training_id}"}),
    "POST /api/v1/datasets": Route(Scope.TRAIN, form={"org_id": "{org_id}"}),
    "GET /api/v1/datasets": Route(Scope.READ, query={"org_id": "{org_id}"}),
    "GET /api/v1/datasets/consent": Route(Scope.READ, query={"org_id": "{org_id}", "author": "1"}),
    "DELETE /api/v1/datasets/consent": Route(Scope.TRAIN, query={"org_id": "{org_id}", "author": "1"}),
    "GET /api/v1/datasets/{dataset_id}": Route(Scope.READ),
    "GET /api/v1/datasets/{dataset_id}/authors": Route(Scope.READ),
    "GET /api/v1/datasets/{dataset_id}/preview": Route(Scope.READ),
    "POST /api/v1/datasets/{dataset_id}/prepare": Route(Scope.TRAIN, json={"persona": ["Ana"]}),
    "DELETE /api/v1/datasets/{dataset_id}": Route(Scope.TRAIN),
    "POST /api/v1/generate": Route(Scope.INFER, query={"org_id": "{org_id}"}, json={"message": "Hi"}),
    "POST /api/v1/models/load": Route(Scope.INFER, query={"org_id": "{org_id}"}),
    "POST /api/v1/models/unload": Route(Scope.INFER, json={"org_id": "{org_id}"}),
    "POST /api/v1/models/promote": Route(Scope.TRAIN, json={"org_id": "{org_id}", "model_id": "{training_id}"}),
    "GET /api/v1/models/{org_id}/info": Route(Scope.READ),
    "GET /api/v1/models/{org_id}/list": Route(Scope.READ),
    "GET /api/v1/health": Route(None, names_nothing=True),
    "GET /metrics": Route(Scope.ADMIN),
    "POST /v1/chat/completions": Route(Scope.INFER, json=CHAT),
    "POST /v1/completions": Route(Scope.INFER, json={"model": "{org_id}", "prompt": "Once"}),
    "GET /v1/models": Route(Scope.INFER, names_nothing=True),
    "GET /v1/models/{model}": Route(Scope.INFER),
    "POST /api/v1/admin/keys": Route(Scope.ORG_ADMIN, json={"name": "new", "org_id": "{org_id}", "scopes": ["infer"]}),
    "GET /api/v1/admin/keys": Route(Scope.ORG_ADMIN, query={"org_id": "{org_id}"}),
    "POST /api/v1/admin/keys/{key_id}/rotate": Route(Scope.ORG_ADMIN),
    "DELETE /api/v1/admin/keys/{key_id}": Route(Scope.ORG_ADMIN),
    "POST /api/v1/admin/orgs": Route(Scope.ADMIN, json={"org_id": "{org_id}-two"}),
    "GET /api/v1/admin/orgs": Route(Scope.ADMIN),
    "GET /api/v1/admin/orgs/{org_id}": Route(Scope.ORG_ADMIN),
    "DELETE /api/v1/admin/orgs/{org_id}": Route(Scope.ORG_ADMIN),
    "PUT /api/v1/admin/orgs/{org_id}/limits": Route(Scope.ADMIN, json={"queued_jobs": None}),
}
OUTSIDE_THE_DOCUMENT = {"/openapi.json"}  # the document itself; it tells nothing of anybody

Things = dict[str, str]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """Not started, and it starts no hosts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in Settings.model_fields:
            patch.delenv(name.upper(), raising=False)
        patch.chdir(tmp_path_factory.mktemp("access"))
        made = create_app(Settings(host_module="repertory.service.fake_host"))
        made.state.service.hosts.stop()
        yield made
        made.state.service.store.close()


@pytest.fixture(scope="module")
def service(app: FastAPI) -> Service:
    found: Service = app.state.service
    return found


def furnish(service: Service, org_id: str) -> Things:
    """An organisation with a job, a voice and a dataset."""
    job = service.jobs.submit(submission(org_id, base_model=f"base/of-{org_id}")).job
    folder = service.models.folder(org_id, job.id)
    manifest.write_durably(folder / "adapter_config.json", b"{}")
    manifest.write_manifest(folder, ["adapter_config.json"])
    key = BaseKey(base_model=f"base/of-{org_id}", quantization="none", dtype="fp32")
    with service.store.write() as connection:
        connection.execute(
            insert(model_versions).values(
                training_id=job.id, org_id=org_id, created_at=now(), **key.model_dump(), metadata={}
            )
        )
    dataset_id = new_id()
    (service.datasets.new_upload(dataset_id) / "export").mkdir()
    service.imports.accept(org_id, dataset_id, "export.json", 2, ImportOptions())
    key, _ = service.keys.create(name="furniture", org_id=org_id, scopes=[Scope.READ])
    model = f"{org_id}@{job.id}"
    return {"org_id": org_id, "training_id": job.id, "dataset_id": dataset_id, "model": model, "key_id": key.id}


@pytest.fixture(scope="module")
def theirs(service: Service) -> Things:
    return furnish(service, "theirs")


@pytest.fixture(scope="module")
def mine(service: Service) -> Things:
    return furnish(service, "mine")


def random_things() -> Things:
    """Of an organisation that there never was, with ids of the right shape."""
    job = f"train_{secrets.token_hex(8)}"
    return {
        "org_id": "nobody",
        "training_id": job,
        "dataset_id": new_id(),
        "model": f"nobody@{job}",
        "key_id": secrets.token_hex(4),
    }


@pytest.fixture(scope="module")
def key_of(service: Service, mine: Things, theirs: Things) -> Callable[[str | None, Scope], str]:
    made: dict[tuple[str | None, Scope], str] = {}

    def key_of(org_id: str | None, scope: Scope) -> str:
        if (org_id, scope) not in made:
            made[org_id, scope] = service.keys.create(name="test", org_id=org_id, scopes=[scope])[1]
        return made[org_id, scope]

    return key_of


def filled(template: Any, things: Things) -> Any:
    if isinstance(template, str):
        return template.format_map(things)
    if isinstance(template, dict):
        return {name: filled(value, things) for name, value in template.items()}
    if isinstance(template, list):
        return [filled(value, things) for value in template]
    return template


def call(app: FastAPI, name: str, things: Things, key: str | None, **headers: str) -> httpx.Response:
    route = ROUTES[name]
    method, _, path = name.partition(" ")
    about: dict[str, Any] = {"params": filled(route.query, things)}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    if route.json is not None:
        about["json"] = filled(route.json, things)
    if route.form is not None:
        about["content"] = form(**filled(route.form, things))
        headers |= FORM

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            address = path.format_map(things | {"name": filled(route.name, things)})
            return await client.request(method, address, headers=headers, **about)

    return asyncio.run(ask())


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def owner(scope: Scope) -> str | None:
    """Keys with the scope admin are of no organisation."""
    return None if scope == Scope.ADMIN else "mine"


def test_every_route_has_a_row(app: FastAPI) -> None:
    documented = {f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods}
    assert documented == set(ROUTES)
    routers = [getattr(route, "original_router", None) for route in app.routes]
    served = [*app.routes, *(route for router in routers if router is not None for route in router.routes)]
    hidden = {route.path for route in served if not getattr(route, "include_in_schema", True)}  # type: ignore[attr-defined]
    assert hidden == OUTSIDE_THE_DOCUMENT


GUARDED = sorted(name for name, route in ROUTES.items() if route.scope is not None)


@pytest.mark.parametrize("name", GUARDED)
def test_without_a_key_nobody_gets_in(
    app: FastAPI, name: str, theirs: Things, key_of: Callable[[str | None, Scope], str]
) -> None:
    key = key_of("theirs", Scope.INFER)  # so that keys are in use
    for things in (theirs, random_things()):
        answer = call(app, name, things, None)
        assert code_of(answer) == (401, "missing_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert code_of(call(app, name, theirs, key[:-1])) == (401, "invalid_api_key")
    assert code_of(call(app, name, theirs, None, authorization=f"Basic {key}")) == (401, "missing_api_key")
    assert code_of(call(app, name, theirs, None, authorization="Bearer ")) == (401, "missing_api_key")


@pytest.mark.parametrize("name", GUARDED)
def test_a_key_without_the_scope_is_refused(
    app: FastAPI, name: str, mine: Things, key_of: Callable[[str | None, Scope], str]
) -> None:
    needed = ROUTES[name].scope
    assert needed is not None
    short = [scope for scope in Scope if needed not in included([scope])]
    assert short or needed == Scope.READ, "some key must be too weak"
    for scope in short:
        answer = call(app, name, mine, key_of(owner(scope), scope))
        assert code_of(answer) == (403, "insufficient_scope")
        assert answer.json()["error"]["message"] == f"The API key has not the scope {needed}."
    for scope in set(Scope) - set(short):
        assert call(app, name, random_things(), key_of(owner(scope), scope)).status_code not in (401, 403)


NAMING = [name for name in GUARDED if not ROUTES[name].names_nothing and ROUTES[name].scope != Scope.ADMIN]


@pytest.mark.parametrize("name", NAMING)
def test_what_is_anothers_is_answered_as_if_it_were_not_there(
    app: FastAPI, service: Service, name: str, theirs: Things, key_of: Callable[[str | None, Scope], str]
) -> None:
    """The same status, body and headers, and the same statements sent to the database: so no clock tells more."""
    scope = ROUTES[name].scope
    assert scope is not None
    key = key_of("mine", scope)
    call(app, name, theirs, key)  # the first use of a key is noted

    def told(things: Things) -> tuple[int, Any, list[str], list[str]]:
        statements: list[str] = []
        engine = service.store._engine

        def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            statements.append(statement)

        event.listen(engine, "before_cursor_execute", note)
        try:
            answer = call(app, name, things, key, **{"x-request-id": "same"})
        finally:
            event.remove(engine, "before_cursor_execute", note)
        return answer.status_code, answer.json(), sorted(answer.headers), statements

    of_theirs, of_nobody = told(theirs), told(random_things())
    assert of_theirs[0] == 404
    assert of_theirs == of_nobody


@pytest.mark.parametrize("name", sorted(name for name, route in ROUTES.items() if route.names_nothing))
def test_lists_show_nothing_of_others(
    app: FastAPI, name: str, mine: Things, theirs: Things, key_of: Callable[[str | None, Scope], str]
) -> None:
    scope = ROUTES[name].scope or Scope.READ
    answer = call(app, name, mine, key_of("mine", scope))
    assert answer.status_code == 200
    for word in ("theirs", theirs["training_id"], theirs["dataset_id"]):
        assert word not in answer.text


def test_ones_own_are_there(
    app: FastAPI, mine: Things, theirs: Things, key_of: Callable[[str | None, Scope], str]
) -> None:
    """Else the tests above would pass with every door shut."""
    reading, operator = key_of("mine", Scope.READ), key_of(None, Scope.READ)
    for name in (name for name in GUARDED if name.startswith("GET /api/v1/") and ROUTES[name].scope == Scope.READ):
        if re.search("preview|authors|info", name):  # want a host, a read export, a promoted voice
            continue
        assert call(app, name, mine, reading).status_code == 200, name
        assert call(app, name, theirs, operator).status_code == 200, name
    listed = [one["id"] for one in call(app, "GET /v1/models", mine, key_of("mine", Scope.INFER)).json()["data"]]
    assert mine["model"] in listed
    assert "base/of-mine" in listed
    everything = [one["id"] for one in call(app, "GET /v1/models", mine, key_of(None, Scope.INFER)).json()["data"]]
    assert {mine["model"], theirs["model"]} <= set(everything)


def test_anothers_base_model_is_no_model(
    app: FastAPI, mine: Things, theirs: Things, key_of: Callable[[str | None, Scope], str]
) -> None:
    things = {**mine, "org_id": "base/of-theirs"}
    answer = call(app, "POST /v1/completions", things, key_of("mine", Scope.INFER))
    assert code_of(answer) == (404, "model_not_found")


def test_the_organisation_comes_from_the_key(
    app: FastAPI, mine: Things, key_of: Callable[[str | None, Scope], str]
) -> None:
    """The AI-personality client names none. Found is found, even if no host can answer here."""

    async def generate(key: str, query: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            headers = {"authorization": f"Bearer {key}"}
            body = {"message": "Hi", "model_id": mine["training_id"]}
            return await client.post(f"/api/v1/generate{query}", json=body, headers=headers)

    theirs_scope, own = key_of("theirs", Scope.INFER), key_of("mine", Scope.INFER)
    for query in ("", "?org_id=mine"):
        assert code_of(asyncio.run(generate(own, query))) == (503, "shutting_down")
    assert code_of(asyncio.run(generate(own, "?org_id=theirs"))) == (404, "organisation_not_found")
    assert code_of(asyncio.run(generate(theirs_scope, ""))) == (404, "model_not_found")


def test_health_says_more_to_the_operator_alone(
    app: FastAPI, mine: Things, key_of: Callable[[str | None, Scope], str]
) -> None:
    route = "GET /api/v1/health"
    for key in (None, "rep_nonsense", key_of("mine", Scope.ORG_ADMIN), key_of(None, Scope.INFER)):
        answer = call(app, route, mine, key)
        assert answer.status_code == 200
        assert set(answer.json()) == {"status"}
    for key in (key_of(None, Scope.READ), key_of(None, Scope.ADMIN)):
        assert call(app, route, mine, key).json()["mode"] == "keys"


def test_revoking_is_seen_by_the_next_request(
    app: FastAPI, service: Service, mine: Things, key_of: Callable[[str | None, Scope], str]
) -> None:
    key, shown = service.keys.create(name="short", org_id="mine", scopes=[Scope.READ])
    route = "GET /api/v1/training/jobs/{name}"
    assert call(app, route, mine, shown).status_code == 200
    service.keys.revoke(key.id)
    assert code_of(call(app, route, mine, shown)) == (401, "invalid_api_key")
