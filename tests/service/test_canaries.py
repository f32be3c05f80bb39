"""Words and secrets are planted wherever a caller can put them, and looked for wherever they must not be."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from repertory.logs import without_secrets
from running_service import RunningService, eventually

TOKEN = "hf_5f8e42e764851219c7c567a446127e8bc"


def word(place: str) -> str:
    return f"canary{secrets.token_hex(6)}{place}"


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_words_and_secrets_are_told_to_nobody(start_service: Callable[..., RunningService]) -> None:
    service = start_service(HUGGINGFACE_TOKEN=TOKEN, LOG_LEVEL="DEBUG").until_ready()
    client = service.client
    planted = {place: word(place) for place in ("learned", "asked", "prompt", "history", "stop", "name", "role", "id")}
    told: list[str] = []  # what everybody else may read: errors, events, metrics

    def send(method: str, path: str, **about: Any) -> httpx.Response:
        answer = client.request(method, path, **about)
        if answer.is_error:
            told.append(answer.text + str(answer.headers))
        return answer

    operator = {"name": "operator", "scopes": ["admin"]}
    operator_key = send("POST", "/admin/keys", json=operator).json()["key"]
    client.headers["authorization"] = f"Bearer {operator_key}"
    send("POST", "/admin/orgs", json={"org_id": "org"})
    bot = {"name": "bot", "org_id": "org", "scopes": ["train", "infer"]}
    bot_key = send("POST", "/admin/keys", json=bot).json()["key"]

    conversation = {"messages": [said("user", planted["history"]), said("assistant", planted["learned"])]}
    about = {"org_id": "org", "conversations": [conversation], "system_prompt": planted["prompt"]}
    about["name"] = planted["name"]
    headers = {"authorization": f"Bearer {bot_key}"}
    for base_model in (None, "fake/fail", "fake/crash", "fake/damaged"):
        started = send("POST", "/training/start", json=about | {"base_model": base_model}, headers=headers)
        training_id = started.json()["training_id"]
        service.until(training_id, "completed", "failed")
        told.append(send("GET", f"/training/{training_id}/events").text)
    question = {"message": planted["asked"], "history": [said("user", planted["history"])], "stop": planted["stop"]}
    question["system_prompt"] = planted["prompt"]
    assert send("POST", "/generate", json=question, headers=headers).status_code == 200

    # Wrong in every way that a caller is told of
    broken = [
        json.dumps(question)[:-1],
        json.dumps(question).encode("utf-16"),
        json.dumps(question | {"temperature": planted["asked"]}),
        json.dumps(question | {"seed": 10**30}),
        json.dumps(question | {"history": [said(planted["role"], planted["history"])]}),
        json.dumps(question | {"history": [said("user", [planted["history"]])]}),
        json.dumps(question | {"model_id": planted["id"]}),
        json.dumps(planted["asked"]),
        f'{{"message": "{planted["asked"]}", "message": "{planted["asked"]}"}}',
        f'{{"message": "{planted["asked"]}\\ud800"}}',
    ]
    for body in broken:
        answer = send("POST", "/generate", content=body, headers=headers | {"content-type": "application/json"})
        assert answer.status_code in (400, 404, 422), answer.text
    assert send("POST", "/generate", content=json.dumps(question), headers=headers).status_code == 415
    wrong = about | {"conversations": [conversation, {"messages": [said("assistant", planted["learned"]), 7]}]}
    assert send("POST", "/training/start", json=wrong, headers=headers).status_code == 422
    for path in (f"/training/status/{planted['id']}", f"/datasets/{planted['id']}", f"/nothing/{planted['id']}"):
        assert send("GET", path).status_code == 404
    assert send("GET", f"/training/jobs/{planted['id']}!").status_code == 422
    assert send("GET", "/training/jobs/org", params={planted["id"]: planted["id"]}).status_code == 422
    assert (
        send("POST", "/training/start", json=about, headers={"idempotency-key": planted["id"] * 50}).status_code == 422
    )
    assert send("GET", "/admin/keys", headers={"authorization": f"Bearer {bot_key[:-1]}"}).status_code == 401
    assert send("POST", "/datasets", data={"org_id": planted["id"] + "!"}, files={"file": b"x"}).status_code == 422
    die = question | {"message": f"die {planted['asked']}"}
    assert send("POST", "/generate", json=die, headers=headers).status_code == 503
    eventually(lambda: client.get("/health").json()["status"] == "healthy")
    told += [client.get("/health").text, client.get(f"{service.url}/metrics").text]
    service.stop()

    for path in (service.folder / "models").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path

    secret_parts = [TOKEN, *(key.split("_")[2] for key in (operator_key, bot_key))]
    for place, text in {"the log": service.log, "an answer": "\n".join(told)}.items():
        assert len(text) > 1000
        for canary in [*planted.values(), *secret_parts]:
            assert canary not in text, (place, re.findall(f".{{200}}{canary}.{{50}}", text, re.DOTALL)[:1])


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("rep_k3J9xQ2a_" + "0" * 32 + "_1bX9aD", "[secret]"),
        ("the key rep_k3J9xQ2a_" + "0" * 32, "the key [secret]"),
        (f"token {TOKEN}!", "token [secret]!"),
        ("Authorization: Bearer abc.def", "Authorization: [secret]"),
        ("https://ana:pass@hub.example/x", "https://[secret]@hub.example/x"),
        ("org_123 trains representative_words hf_ok", "org_123 trains representative_words hf_ok"),
    ],
)
def test_what_looks_like_a_secret_is_not_logged(written: str, kept: str) -> None:
    event = {"event": written, "nested": [{"deep": written}], "count": 3}
    assert without_secrets(None, "info", event) == {"event": kept, "nested": [{"deep": kept}], "count": 3}
