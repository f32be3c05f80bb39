"""The application without its process: what it answers when its own parts fail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError

from repertory.service.api.app import create_app
from repertory.service.jobs import Jobs
from repertory.settings import Settings


@pytest.fixture
def app(clean_settings: Settings) -> Iterator[FastAPI]:
    """Not started: it has a database, but no hosts."""
    made = create_app(clean_settings)
    yield made
    made.state.service.hosts.stop()
    made.state.service.store.close()


def get(app: FastAPI, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost/api/v1") as client:
            return await client.get(path)

    return asyncio.run(ask())


def fail_with(error: Exception) -> Any:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_a_mistake_of_ours_has_the_error_body_too(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Jobs, "get", fail_with(ZeroDivisionError("over what the user wrote")))
    answer = get(app, "/training/status/train_0")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert error["request_id"] == answer.headers["x-request-id"]
    logged = capsys.readouterr().out
    assert "ZeroDivisionError" in logged
    assert error["request_id"] in logged
    assert "what the user wrote" not in answer.text + logged


def test_a_database_that_does_not_answer_is_unavailable(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = OperationalError("SELECT", {}, Exception("database is locked"))
    monkeypatch.setattr(Jobs, "get", fail_with(locked))
    answer = get(app, "/training/status/train_0")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "storage_unavailable"
    assert answer.headers["retry-after"]
    monkeypatch.setattr(Jobs, "counts", fail_with(locked))
    health = get(app, "/health").json()
    assert (health["status"], health["jobs"]) == ("degraded", None)


def test_the_description_of_the_api_names_every_body(app: FastAPI) -> None:
    described = get(app, "/../../openapi.json").json()
    body = described["paths"]["/api/v1/training/start"]["post"]["requestBody"]
    assert body["required"] is True
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/StartTraining"}
    start = described["components"]["schemas"]["StartTraining"]
    assert start["required"] == ["org_id"]
    assert start["oneOf"] == [{"required": ["conversations"]}, {"required": ["dataset_id"]}]
    form = described["paths"]["/api/v1/datasets"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form == {"$ref": "#/components/schemas/NewDataset"}
    assert {"org_id", "file", "persona"} <= set(described["components"]["schemas"]["NewDataset"]["properties"])
    for path, methods in described["paths"].items():
        assert path.startswith(("/api/v1/", "/v1/")) or path == "/metrics"
        for method, operation in methods.items():
            assert operation["summary"], (path, method)
            assert ("requestBody" in operation) == (method in ("post", "put")), (path, method)


@pytest.mark.parametrize("allowed", ["ml-training", " ML-Training , other"])
def test_named_hosts_are_answered_for_and_no_others(clean_settings: Settings, allowed: str) -> None:
    settings = clean_settings.model_copy(update={"allowed_hosts": allowed, "host": "0.0.0.0"})
    app = create_app(settings)
    for host, status in (("ml-training:8300", 200), ("localhost", 200), ("evil.example", 403)):
        assert get_as(app, host).status_code == status
    app.state.service.hosts.stop()
    app.state.service.store.close()


def test_not_bound_to_loopback_every_host_is_answered_for(clean_settings: Settings) -> None:
    app = create_app(clean_settings.model_copy(update={"host": "0.0.0.0"}))
    assert get_as(app, "ml-training:8300").status_code == 200
    app.state.service.hosts.stop()
    app.state.service.store.close()


def test_wherever_it_is_bound_pages_of_others_are_refused(clean_settings: Settings) -> None:
    """Also where any Host is answered for, as in a container; behind a proxy the page is of the public name."""
    app = create_app(clean_settings.model_copy(update={"host": "0.0.0.0"}))
    for origin, status in (("https://voices.example", 200), ("https://evil.example", 403), ("null", 403)):
        assert get_as(app, "voices.example", origin=origin).status_code == status
    app.state.service.hosts.stop()
    app.state.service.store.close()
    named = create_app(clean_settings.model_copy(update={"host": "0.0.0.0", "allowed_hosts": "voices.example"}))
    for origin, status in (("https://voices.example:8443", 200), ("http://localhost:3000", 403)):
        assert get_as(named, "localhost:8300", origin=origin).status_code == status
    named.state.service.hosts.stop()
    named.state.service.store.close()


def get_as(app: FastAPI, host: str, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}") as client:
            return await client.get("/api/v1/health", headers=headers)

    return asyncio.run(ask())
