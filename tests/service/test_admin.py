"""Organisations, limits and keys: over HTTP and on the command line, on one database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from repertory.cli import app as commands
from repertory.service.api.app import create_app
from repertory.service.keys import Scope, included
from repertory.service.organisations import Limits
from repertory.settings import Settings, settings

Call = Callable[..., httpx.Response]


@pytest.fixture
def app(clean_settings: Settings) -> Iterator[FastAPI]:
    made = create_app(clean_settings)
    made.state.service.hosts.stop()
    yield made
    made.state.service.store.close()


@pytest.fixture
def call(app: FastAPI) -> Call:
    def call(method: str, path: str, key: str | None = None, **body: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost/api/v1") as client:
                return await client.request(method, path, headers=headers, json=body or None)

        return asyncio.run(ask())

    return call


@pytest.fixture
def run(clean_settings: Settings) -> Iterator[Callable[..., Any]]:
    """`repertory …`, its exit code checked; standard output."""
    settings.cache_clear()

    def run(*arguments: str, exit_code: int = 0) -> Any:
        result = CliRunner().invoke(commands, arguments)
        assert result.exit_code == exit_code, result.output
        return result

    yield run
    settings.cache_clear()


def test_the_first_key_closes_the_service(call: Call) -> None:
    assert call("GET", "/health").json()["mode"] == "open"
    made = call("POST", "/admin/keys", name="operator", scopes=["admin"])
    assert made.status_code == 201
    key = made.json()["key"]
    assert made.json()["org_id"] is None
    assert call("GET", "/admin/keys").status_code == 401
    (listed,) = call("GET", "/admin/keys", key).json()["keys"]
    assert listed.pop("last_used_at") is not None
    assert listed == {name: value for name, value in made.json().items() if name not in ("key", "last_used_at")}
    assert call("DELETE", f"/admin/keys/{listed['key_id']}", key).json()["state"] == "revoked"
    assert call("GET", "/admin/keys", key).status_code == 401
    assert call("POST", "/admin/keys", name="another", scopes=["admin"]).status_code == 401


def test_an_organisation_administers_its_own_keys_and_no_others(call: Call) -> None:
    operator = call("POST", "/admin/keys", name="operator", scopes=["admin"]).json()["key"]
    for org_id in ("mine", "theirs"):
        assert call("POST", "/admin/orgs", operator, org_id=org_id).status_code == 201
    about = {"name": "owner", "scopes": ["org-admin"]}
    owner = call("POST", "/admin/keys", operator, **about, org_id="mine").json()["key"]
    bot = call("POST", "/admin/keys", owner, name="bot", scopes=["infer"], expires_in_seconds=60).json()
    assert (bot["org_id"], bot["scopes"], bot["state"]) == ("mine", ["infer"], "active")
    assert bot["expires_at"] > bot["created_at"]
    assert len(call("GET", "/admin/keys", owner).json()["keys"]) == 2
    assert len(call("GET", "/admin/keys", operator).json()["keys"]) == 3
    refused = call("POST", "/admin/keys", owner, name="more", scopes=["admin"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    refused = call("POST", "/admin/keys", owner, name="other", scopes=["infer"], org_id="theirs")
    assert refused.status_code == 404
    rotated = call("POST", f"/admin/keys/{bot['key_id']}/rotate", owner, grace_seconds=0).json()
    assert rotated["scopes"] == ["infer"]
    assert call("GET", "/admin/keys", bot["key"]).status_code == 401
    assert call("GET", "/admin/keys", rotated["key"]).status_code == 403
    assert call("GET", "/admin/orgs/mine", owner).json()["org_id"] == "mine"
    assert call("GET", "/admin/orgs", owner).status_code == 403
    assert [one["org_id"] for one in call("GET", "/admin/orgs", operator).json()["organisations"]] == ["mine", "theirs"]


def test_limits_are_everybodys_unless_set(app: FastAPI, call: Call) -> None:
    app.state.service.organisations._everybody = Limits(queued_jobs=5, running_jobs=2)
    made = call("POST", "/admin/orgs", org_id="org", limits={"queued_jobs": 9}).json()
    assert made["own_limits"] == {"queued_jobs": 9}
    assert (made["limits"]["queued_jobs"], made["limits"]["running_jobs"]) == (9, 2)
    changed = call("PUT", "/admin/orgs/org/limits", running_jobs=None, dataset_gb=0.5).json()
    assert changed["own_limits"] == {"running_jobs": None, "dataset_gb": 0.5}
    assert (changed["limits"]["queued_jobs"], changed["limits"]["running_jobs"]) == (5, None)
    assert call("POST", "/admin/orgs", org_id="org").json()["error"]["code"] == "organisation_exists"
    assert call("PUT", "/admin/orgs/nobody/limits", queued_jobs=1).status_code == 404
    whole = call("PUT", "/admin/orgs/org/limits", queued_jobs=3.0).json()
    assert str(whole["own_limits"]["queued_jobs"]) == "3"
    for wrong in ({"queued_jobs": -1}, {"queued_jobs": "1"}, {"queued_jobs": 1.5}, {"jobs": 1}):
        assert call("PUT", "/admin/orgs/org/limits", **wrong).status_code == 422


def test_the_settings_are_everybodys_limits(monkeypatch: pytest.MonkeyPatch, clean_settings: Settings) -> None:
    for number, name in enumerate(Limits.model_fields, 1):
        monkeypatch.setenv(f"ORG_{name.upper()}", str(number))
    assert Limits.of_everybody(Settings()).model_dump() == {
        name: number for number, name in enumerate(Limits.model_fields, 1)
    }


def test_keys_on_the_command_line_beside_a_running_service(run: Callable[..., Any], call: Call) -> None:
    run("orgs", "create", "org")
    shown = run("keys", "create", "bot", "--org", "org", "--scope", "read", "--expires", "90d").stdout.strip()
    assert call("GET", "/training/jobs/org", shown).status_code == 200
    (listed,) = json.loads(run("keys", "list", "--json").stdout)
    assert (listed["name"], listed["org_id"], listed["scopes"], listed["state"]) == ("bot", "org", ["read"], "active")
    assert shown not in run("keys", "list").output
    rotated = run("keys", "rotate", listed["id"], "--grace", "0m").stdout.strip()
    assert call("GET", "/training/jobs/org", shown).status_code == 401
    assert call("GET", "/training/jobs/org", rotated).status_code == 200
    newest = json.loads(run("keys", "list", "--org", "org", "--json").stdout)[0]
    run("keys", "revoke", newest["id"])
    assert call("GET", "/training/jobs/org", rotated).status_code == 401
    operator = run("keys", "create", "operator", "--every-org", "--scope", "admin").stdout.strip()
    assert call("GET", "/admin/orgs", operator).status_code == 200


def test_organisations_on_the_command_line(run: Callable[..., Any]) -> None:
    run("orgs", "create", "org")
    assert "queued_jobs              10\n" in run("orgs", "limits", "org", "queued_jobs=10", "model_gb=none").stdout
    assert json.loads(run("orgs", "list", "--json").stdout)[0]["own_limits"] == {"queued_jobs": 10, "model_gb": None}
    run("orgs", "limits", "org", "model_gb=default")
    shown = json.loads(run("orgs", "show", "org").stdout)
    assert shown["own_limits"] == {"queued_jobs": 10}
    assert shown["limits"]["queued_jobs"] == 10
    assert "queued_jobs=10" in run("orgs", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("keys", "create", "bot"), 5, "--every-org"),
        (("keys", "create", "bot", "--org", "a", "--every-org"), 5, "--every-org"),
        (("keys", "create", "bot", "--org", "nobody"), 3, "organisation_not_found"),
        (("keys", "create", "bot", "--every-org", "--scope", "root"), 5, "There is no such scope"),
        (("keys", "create", "bot", "--every-org", "--expires", "soon"), 5, "no length of time"),
        (("keys", "rotate", "nothing"), 3, "api_key_not_found"),
        (("keys", "revoke", "nothing"), 3, "api_key_not_found"),
        (("orgs", "create", "../x"), 5, "no name"),
        (("orgs", "show", "nobody"), 3, "organisation_not_found"),
        (("orgs", "limits", "org", "queued_jobs=-1"), 5, "queued_jobs"),
        (("orgs", "limits", "org", "jobs=1"), 5, "Known are requests_per_minute"),
        (("orgs", "limits", "org", "queued_jobs"), 5, "queued_jobs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_the_commands_refuse(
    run: Callable[..., Any], arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    run("orgs", "create", "org")
    assert said in run(*arguments, exit_code=exit_code).output


def test_a_scope_is_documented_as_it_is_included() -> None:
    """The comments beside the scopes and `included` say the same."""
    assert included([Scope.TRAIN]) == {Scope.TRAIN, Scope.READ}
    assert included([Scope.ORG_ADMIN]) == {Scope.ORG_ADMIN, Scope.TRAIN, Scope.READ, Scope.INFER}
    assert included([Scope.ADMIN]) == set(Scope)
