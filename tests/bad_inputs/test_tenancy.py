"""Rows of the catalogue about ids of others. tests/service/test_access.py asks every route."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI

from refusals import error_of
from repertory.service.api.app import create_app
from repertory.service.keys import Scope
from repertory.settings import Settings
from running_service import CONVERSATION


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    """Not started, and it starts no hosts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in Settings.model_fields:
            patch.delenv(name.upper(), raising=False)
        patch.chdir(tmp_path_factory.mktemp("tenancy"))
        made = create_app(Settings(host_module="repertory.service.fake_host"))
        made.state.service.hosts.stop()
        yield made
        made.state.service.store.close()


def ask(app: FastAPI, method: str, path: str, key: str | None = None, **about: object) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}

    async def sent() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost/api/v1") as client:
            return await client.request(method, path, headers=headers, **about)  # type: ignore[arg-type]

    return asyncio.run(sent())


@pytest.fixture(scope="module")
def job_of_a(app: FastAPI) -> str:
    """Both organisations have a job; then keys are made."""
    jobs = {}
    for org_id in "ab":
        body = {"org_id": org_id, "conversations": [CONVERSATION]}
        jobs[org_id] = str(ask(app, "POST", "/training/start", json=body).json()["training_id"])
    return jobs["a"]


@pytest.fixture(scope="module")
def key_of_b(app: FastAPI, job_of_a: str) -> str:
    return str(app.state.service.keys.create(name="b", org_id="b", scopes=[Scope.ORG_ADMIN])[1])


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_row_047_a_job_of_another_organisation_is_as_one_that_never_was(
    app: FastAPI, job_of_a: str, key_of_b: str, method: str
) -> None:
    path = "/training/status" if method == "GET" else "/training/jobs"
    theirs, nobodys = (error_of(ask(app, method, f"{path}/{job}", key_of_b)) for job in (job_of_a, "train_" + "0" * 16))
    assert theirs | {"request_id": ""} == nobodys | {"request_id": ""}
    assert theirs["code"] == "training_not_found"


@pytest.mark.parametrize("org_id", ["a", "nobody"])
def test_row_050_an_organisation_that_is_not_the_keys_is_not_found(app: FastAPI, key_of_b: str, org_id: str) -> None:
    answer = ask(app, "GET", f"/training/jobs/{org_id}", key_of_b)
    assert (answer.status_code, error_of(answer)["code"]) == (404, "organisation_not_found")
    assert ask(app, "GET", "/training/jobs/b", key_of_b).status_code == 200
