"""The service as a process, over HTTP: the two journeys, restarts, crashes, and the end."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from running_service import CONVERSATION, RunningService, eventually

Start = Callable[..., RunningService]
SLOW = {"FAKE_HOST_STEPS": "1000", "FAKE_HOST_STEP_SECONDS": "0.05"}  # runs that no test waits for


def events_of(response: httpx.Response) -> list[Any]:
    """The data of each server-sent event."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# The quick start


def test_the_quick_start_works_verbatim(service: RunningService) -> None:
    """The commands of the product's description, with nothing changed but the port."""
    port = service.url.rpartition(":")[2]

    def shell(command: str) -> dict[str, Any]:
        command = command.replace("localhost:8300", f"localhost:{port}")
        return dict(json.loads(subprocess.run(["sh", "-c", command], check=True, capture_output=True).stdout))

    started = shell(
        """curl -X POST http://localhost:8300/api/v1/training/start -H "Content-Type: application/json" """
        """-d '{"org_id": "org_123", "conversations": [{"messages": [{"role": "user", "content": "Hello!"}, """
        """{"role": "assistant", "content": "Hey! How are you?"}], "platform": "discord"}]}'"""
    )
    assert started.pop("training_id").startswith("train_")
    assert started == {"org_id": "org_123", "status": "queued", "progress": 0.0}
    training_id = service.client.get("/training/jobs/org_123").json()["jobs"][0]["training_id"]
    eventually(
        lambda: shell(f"curl http://localhost:8300/api/v1/training/status/{training_id}")["status"] == "completed"
    )
    replied = shell(
        """curl -X POST "http://localhost:8300/api/v1/generate?org_id=org_123" -H "Content-Type: application/json" """
        """-d '{"message": "Tell me a joke", "temperature": 0.8, "max_tokens": 100}'"""
    )
    assert replied["response"] == f"Hello from {training_id}"


def test_the_quick_start_with_a_base_model_out_of_reach_fails_with_a_cure(service: RunningService) -> None:
    job = service.until(service.train("unreachable", base_model="meta-llama/unavailable"), "failed")
    assert job["error"]["code"] == "base_model_unavailable"
    assert "meta-llama/unavailable" in job["error"]["message"]
    assert job["error"]["cure"]
    assert job["completed_at"] is not None


def test_the_ai_personality_client_is_answered(service: RunningService) -> None:
    """It sends no org_id, and reads `response`."""
    training_id = service.trained("default_org")
    content = (
        b'{"system_prompt":"You are Mara.","history":[{"role":"user","content":"Hi"},'
        b'{"role":"assistant","content":"Hey"}],"message":"How are you?","temperature":0.8,"max_tokens":500}'
    )
    answer = service.client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert answer.json()["response"] == f"Hello from {training_id}"


# Training


def test_a_job_tells_its_story_in_its_status(service: RunningService) -> None:
    training_id = service.train(
        "story", num_epochs=2, hyperparameters={"lora_r": 8}, name="first", validation_split=0.2
    )
    job = service.until(training_id, "completed")
    assert job["training_id"] == training_id
    assert job["org_id"] == "story"
    assert job["progress"] == 1.0
    assert job["error"] is None
    assert job["created_at"].endswith("Z")
    assert job["created_at"] <= job["started_at"] <= job["completed_at"]
    metadata = job["metadata"]
    assert metadata["requested"] == {"lora_r": 8, "num_train_epochs": 2}
    assert metadata["name"] == "first"
    assert metadata["validation_split"] == 0.2
    assert metadata["base_model"] == "bundled/SmolLM2-135M-Instruct"
    assert metadata["report"]["perplexity"] < metadata["report"]["base_perplexity"]
    assert metadata["step"] == metadata["total_steps"] == 10
    assert "Only 1 of the 100" in metadata["warnings"][0]
    assert "phase" not in metadata


def test_jobs_are_listed_newest_first(service: RunningService) -> None:
    older, newer = service.train("lists"), service.train("lists")
    jobs = service.client.get("/training/jobs/lists").json()["jobs"]
    assert [job["training_id"] for job in jobs] == [newer, older]
    assert service.client.get("/training/jobs/nobody").json() == {"jobs": []}


def test_a_failed_run_says_why(service: RunningService) -> None:
    error = service.until(service.train("fails", base_model="fake/fail"), "failed")["error"]
    assert error == {
        "code": "diverged",
        "message": "The loss is not a number any more.",
        "cure": "Lower LEARNING_RATE.",
    }


def test_an_adapter_whose_files_are_not_whole_is_not_published(service: RunningService) -> None:
    job = service.until(service.train("damaged", base_model="fake/damaged"), "failed")
    assert job["error"]["code"] == "adapter_damaged"
    assert service.client.get("/models/damaged/list").json()["count"] == 0


@pytest.mark.fault("F1")
def test_a_host_that_dies_once_costs_the_steps_since_the_checkpoint(service: RunningService) -> None:
    job = service.until(service.train("dies-once", base_model="fake/crash-once"), "completed", "failed")
    assert job["status"] == "completed"
    assert job["metadata"]["resumed_from_step"] == 5


@pytest.mark.fault("F15")
def test_a_job_that_kills_every_host_fails(service: RunningService) -> None:
    job = service.until(service.train("killer", base_model="fake/crash"), "completed", "failed")
    assert job["status"] == "failed"
    assert job["error"]["code"] == "host_crashed"


@pytest.mark.fault("F22")
def test_an_idempotency_key_makes_one_job_of_two_requests(service: RunningService) -> None:
    body = {"org_id": "twice", "conversations": [CONVERSATION]}
    key = {"Idempotency-Key": "7f3d"}
    first = service.client.post("/training/start", json=body, headers=key)
    second = service.client.post("/training/start", json=body, headers=key)
    assert first.json() == second.json()
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    other = service.client.post("/training/start", json=body | {"num_epochs": 2}, headers=key)
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_key_reused"


def test_a_voice_is_evaluated_on_request(service: RunningService) -> None:
    training_id = service.trained("evaluated")
    body = {"org_id": "evaluated", "test_prompts": [{"instruction": "Say hello", "expected_response": "Hi"}]}
    answer = service.client.post("/training/evaluate", json=body).json()
    assert answer["model_path"].endswith(f"evaluated/{training_id}")
    metrics = answer["metrics"]
    assert metrics["scored_on"] == "held-out"
    assert metrics["test_responses"] == [
        {
            "instruction": "Say hello",
            "generated_response": f"Hello from {training_id}",
            "base_response": "Hello from base",
            "expected_response": "Hi",
        }
    ]
    assert {"perplexity", "base_perplexity", "total_parameters", "trainable_parameters", "model_size_mb"} <= set(
        metrics
    )
    given = service.client.post("/training/evaluate", json={"org_id": "evaluated", "conversations": [CONVERSATION]})
    assert given.json()["metrics"]["scored_on"] == "given"


def test_an_estimate_stores_and_starts_nothing(service: RunningService) -> None:
    body = {"org_id": "estimates", "conversations": [CONVERSATION], "num_epochs": 2}
    answer = service.client.post("/training/estimate", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert {name: told[name] for name in ("tokens", "trained_tokens", "conversations", "epochs", "fits")} == {
        "tokens": 5,
        "trained_tokens": 4,
        "conversations": 1,
        "epochs": 2,
        "fits": True,
    }
    assert told["hyperparameters"]["num_train_epochs"] == 2
    assert service.client.get("/training/jobs/estimates").json() == {"jobs": []}
    assert not list(service.folder.glob("models/datasets/estimates*"))


def test_an_estimate_for_another_base_model_starts_no_host(service: RunningService) -> None:
    before = len(service.client.get("/health").json()["hosts"])
    body = {"org_id": "estimates", "conversations": [CONVERSATION], "base_model": "fake/too-large"}
    told = service.client.post("/training/estimate", json=body).json()
    assert told["fits"] is False
    assert told["advice"]
    assert len(service.client.get("/health").json()["hosts"]) == before


def test_an_estimate_for_a_base_model_out_of_reach_says_so_with_its_cure(service: RunningService) -> None:
    body = {"org_id": "estimates", "conversations": [CONVERSATION], "base_model": "meta-llama/unavailable"}
    answer = service.client.post("/training/estimate", json=body)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "base_model_unavailable"
    assert answer.json()["error"]["cure"]


def test_an_estimate_is_as_strict_as_a_start(service: RunningService) -> None:
    body = {"org_id": "estimates", "conversations": [CONVERSATION], "hyperparameters": {"lora_rank": 8}}
    answer = service.client.post("/training/estimate", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "unknown_field"


# Cancelling


@pytest.mark.fault("F21")
def test_a_running_job_is_cancelled_when_its_run_has_stopped(slow_service: RunningService) -> None:
    service = slow_service
    training_id = service.train("org")
    service.until(training_id, "running")
    cancelled = service.client.delete(f"/training/jobs/{training_id}")
    assert cancelled.status_code == 200
    assert cancelled.json() == {"message": "The training is cancelled.", "training_id": training_id}
    assert service.status(training_id)["status"] == "cancelled"
    eventually(lambda: service.client.get("/health").json()["hosts"][0]["runs"] == 0)
    assert service.client.delete(f"/training/jobs/{training_id}").status_code == 200


def test_a_queued_job_is_cancelled_at_once(slow_service: RunningService) -> None:
    service = slow_service
    running = service.train("first")
    service.until(running, "running")
    training_id = service.train("second")
    waiting = eventually(lambda: (job := service.status(training_id))["metadata"].get("waiting_for") and job)
    assert waiting["status"] == "queued"
    assert waiting["metadata"]["queue_position"] == 1
    assert waiting["started_at"] is None
    assert service.client.delete(f"/training/jobs/{training_id}").status_code == 200
    assert service.status(training_id)["status"] == "cancelled"
    assert service.status(running)["status"] == "running"
    service.client.delete(f"/training/jobs/{running}")


@pytest.mark.fault("F21")
def test_ended_jobs_cannot_be_cancelled(service: RunningService) -> None:
    completed = service.trained("cancels-late")
    failed = service.train("cancels-late", base_model="fake/fail")
    service.until(failed, "failed")
    for training_id in (completed, failed):
        answer = service.client.delete(f"/training/jobs/{training_id}")
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "job_terminal"
    assert service.status(completed)["status"] == "completed"


@pytest.mark.fault("F21")
def test_cancelling_at_any_moment_ends_in_one_state(service: RunningService) -> None:
    """Runs take 0.2 seconds here; the cancels come from before the claim to after the end."""
    for delay in range(8):
        training_id = service.train("races")
        time.sleep(delay * 0.04)
        answer = service.client.delete(f"/training/jobs/{training_id}")
        status = service.status(training_id)["status"]
        assert (answer.status_code, status) in ((200, "cancelled"), (409, "completed"))


# Generating


def test_a_reply_comes_with_its_model(service: RunningService) -> None:
    training_id = service.trained("replies")
    answer = service.client.post("/generate?org_id=replies", json={"message": "Hi"})
    assert answer.status_code == 200
    body = answer.json()
    assert body["response"] == f"Hello from {training_id}"
    assert body["finish_reason"] == "stop"
    usage = {"prompt_tokens": 1, "completion_tokens": 3, "dropped_messages": 0, "cached_tokens": 0}
    assert body["usage"] == usage | {"queue_seconds": 0.0}
    info = body["model_info"]
    assert (info["org_id"], info["model_id"], info["loaded"]) == ("replies", training_id, True)
    assert info["model_path"].endswith(f"finetuned/replies/{training_id}")
    assert info["metadata"]["base_perplexity"] > info["metadata"]["perplexity"]
    assert "report" not in info["metadata"]  # that is a page long; the models' own route gives it


def test_a_version_can_be_named_and_the_newest_answers_by_itself(service: RunningService) -> None:
    older, newer = service.trained("versions"), service.trained("versions")
    for asked, answers in ((older, older), (newer, newer), ("latest", newer)):
        reply = service.client.post("/generate?org_id=versions", json={"message": "Hi", "model_id": asked})
        assert reply.json()["response"] == f"Hello from {answers}"


@pytest.mark.fault("F25")
def test_a_promotion_in_the_middle_of_a_reply_changes_the_next_one_alone(service: RunningService) -> None:
    older = service.trained("promotes")
    long_one = {"message": "a long one", "max_tokens": 400, "stream": True}
    with service.client.stream("POST", "/generate?org_id=promotes", json=long_one) as response:
        lines = response.iter_lines()
        begin = [next(lines) for _ in range(6)]
        newer = service.trained("promotes")
        meanwhile = service.client.post("/generate?org_id=promotes", json={"message": "Hi"}).json()
        rest = list(lines)
    assert (meanwhile["response"], meanwhile["model_info"]["model_id"]) == (f"Hello from {newer}", newer)
    assert any(older in line for line in begin)
    end = next(json.loads(line.removeprefix("data: ")) for line in rest if '"done"' in line)
    assert end["model_info"]["model_id"] == older
    assert end["usage"]["completion_tokens"] == 400
    assert not any(newer in line for line in rest)


def test_an_earlier_version_can_be_promoted_again(service: RunningService) -> None:
    older, newer = service.trained("back"), service.trained("back")
    for version in (older, newer, older):
        answer = service.client.post(f"/models/promote?org_id=back&model_id={version}")
        assert answer.json()["model_info"]["model_id"] == version
        reply = service.client.post("/generate?org_id=back", json={"message": "Hi"}).json()
        assert (reply["response"], reply["model_info"]["model_id"]) == (f"Hello from {version}", version)
        assert service.client.get("/models/back/info").json()["model_id"] == version
    listed = service.client.get("/models/back/list").json()["models"]
    assert [one["model_id"] for one in listed if one["promoted"]] == [older]


def test_only_whole_versions_of_ones_own_can_be_promoted(service: RunningService) -> None:
    good, damaged, others = service.trained("owner"), service.trained("owner"), service.trained("other")
    service.client.post(f"/models/promote?org_id=owner&model_id={good}")
    info = service.client.get("/models/owner/list").json()["models"]
    assert {one["model_id"] for one in info} == {good, damaged}
    (service.folder / "models/finetuned/owner" / damaged / "MANIFEST.json").unlink()
    for model_id, refusal in (
        (others, (404, "model_not_found")),
        ("train_nowhere", (404, "model_not_found")),
        (damaged, (503, "adapter_damaged")),
        ("latest", (422, "invalid_input")),
        ("base", (422, "invalid_input")),
        (None, (422, "invalid_input")),
    ):
        answer = service.client.post("/models/promote", json={"org_id": "owner", "model_id": model_id})
        assert (answer.status_code, answer.json()["error"]["code"]) == refusal
    assert service.client.get("/models/owner/info").json()["model_id"] == good


def test_a_voice_whose_files_are_damaged_can_still_be_unloaded(service: RunningService) -> None:
    training_id = service.trained("damaged")
    loaded = service.client.post("/models/load?org_id=damaged").json()
    (service.folder / loaded["model_info"]["model_path"] / "MANIFEST.json").unlink()
    answer = service.client.post("/generate?org_id=damaged", json={"message": "Hi"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_damaged")
    unloaded = service.client.post("/models/unload", json={"org_id": "damaged", "model_id": training_id})
    assert unloaded.json()["message"] == "The model is no longer in memory."


def test_the_base_answers_only_when_asked_for(service: RunningService) -> None:
    silent = service.client.post("/generate?org_id=untrained", json={"message": "Hi"})
    assert silent.status_code == 404
    assert silent.json()["error"]["code"] == "model_not_found"
    assert "training/start" in silent.json()["error"]["cure"]
    base = service.client.post("/generate?org_id=untrained", json={"message": "Hi", "model_id": "base"})
    assert base.json()["response"] == "Hello from base"
    assert base.json()["model_info"]["model_path"] == "bundled/SmolLM2-135M-Instruct"


def test_a_model_of_another_organisation_is_not_found(service: RunningService) -> None:
    theirs = service.trained("owner")
    answer = service.client.post("/generate?org_id=thief", json={"message": "Hi", "model_id": theirs})
    assert answer.status_code == 404
    assert service.client.get("/models/thief/list").json() == {"org_id": "thief", "models": [], "count": 0}


def test_which_organisation_is_meant_where_none_is_named(start_service: Start) -> None:
    service = start_service().until_ready()
    nobody = service.client.post("/generate", json={"message": "Hi"})
    assert nobody.status_code == 422
    assert nobody.json()["error"]["param"] == "org_id"
    assert "none has a model" in nobody.json()["error"]["message"]
    only = service.trained("only")
    assert service.client.post("/generate", json={"message": "Hi"}).json()["response"] == f"Hello from {only}"
    service.trained("another")
    several = service.client.post("/generate", json={"message": "Hi"})
    assert "several have a model" in several.json()["error"]["message"]
    service.stop()
    service.environment["DEFAULT_ORG_ID"] = "only"
    service.start()
    service.until_ready()
    assert service.client.post("/generate", json={"message": "Hi"}).json()["response"] == f"Hello from {only}"


def test_a_reply_can_be_streamed(service: RunningService) -> None:
    training_id = service.trained("streams")
    body = {"message": "Hi", "stream": True}
    with service.client.stream("POST", "/generate?org_id=streams", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *texts, done, end = events_of(response)
    assert "".join(event["text"] for event in texts) == f"Hello from {training_id}"
    assert done["done"] is True
    assert done["finish_reason"] == "stop"
    assert done["usage"]["completion_tokens"] == 3
    assert done["model_info"]["model_id"] == training_id
    assert end == "[DONE]"


def test_what_is_refused_before_a_stream_begins_has_its_status(service: RunningService) -> None:
    answer = service.client.post("/generate?org_id=untrained", json={"message": "Hi", "stream": True})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.fault("F27")
@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_connection_stops_the_sequence(service: RunningService, stream: bool) -> None:
    def running() -> int:
        return int(sum(host["running"] for host in service.client.get("/health").json()["hosts"]))

    service.trained(f"leaves-{stream}")
    body = json.dumps({"message": "a long one", "max_tokens": 3000, "stream": stream}).encode()
    head = (
        f"POST /api/v1/generate?org_id=leaves-{stream} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body)
        eventually(lambda: running() == 1)
    eventually(lambda: running() == 0)  # left alone, it would go on for a minute


@pytest.mark.fault("F33")
def test_a_host_that_dies_while_replying_is_an_error_with_a_retry(service: RunningService) -> None:
    service.trained("dying", base_model="fake/mortal")
    answer = service.client.post("/generate?org_id=dying", json={"message": "die"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "host_unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert eventually(lambda: service.client.post("/generate?org_id=dying", json={"message": "Hi"}).is_success)


@pytest.mark.fault("F33")
def test_a_host_that_dies_within_a_stream_is_an_error_in_the_stream(service: RunningService) -> None:
    service.trained("dying-late", base_model="fake/frail")
    body = {"message": "a long one", "max_tokens": 3000, "stream": True}
    with service.client.stream("POST", "/generate?org_id=dying-late", json=body) as response:
        lines = response.iter_lines()
        assert "text" in next(lines)
        host = service.host_of("fake/frail")
        assert host is not None
        host.kill()
        last = [line for line in lines if line][-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "host_unavailable"
    assert error["request_id"] == response.headers["x-request-id"]


# Models


@pytest.mark.parametrize("how", ["query", "body"])
def test_models_are_loaded_and_unloaded(service: RunningService, how: str) -> None:
    org_id = f"loads-by-{how}"
    training_id = service.trained(org_id)

    def ask(what: str) -> dict[str, Any]:
        told: dict[str, Any] = {"params": {"org_id": org_id}} if how == "query" else {"json": {"org_id": org_id}}
        answer = service.client.post(f"/models/{what}", **told)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    loaded = ask("load")
    assert loaded["model_info"]["model_id"] == training_id
    assert loaded["model_info"]["loaded"] is True
    assert service.client.get(f"/models/{org_id}/info").json()["loaded"] is True
    assert ask("unload") == {"message": "The model is no longer in memory.", "org_id": org_id}
    assert service.client.get(f"/models/{org_id}/info").json()["loaded"] is False
    assert ask("unload") == {"message": "The model was not in memory.", "org_id": org_id}


def test_load_and_unload_need_no_body_where_the_organisation_is_clear(service: RunningService) -> None:
    service.trained("default_org")
    assert service.client.post("/models/load").json()["model_info"]["org_id"] == "default_org"
    assert service.client.post("/models/unload").json()["org_id"] == "default_org"


def test_models_are_described(service: RunningService) -> None:
    training_id = service.trained("described")
    info = service.client.get("/models/described/info").json()
    assert set(info) >= {"org_id", "model_path", "metadata", "loaded"}
    listed = service.client.get("/models/described/list").json()
    assert listed["count"] == 1
    (model,) = listed["models"]
    assert model["model_id"] == training_id
    assert model["promoted"] is True
    assert model["created_at"].endswith("Z")
    assert service.client.get("/models/untrained/info").json()["error"]["code"] == "model_not_found"


def test_several_base_models_serve_at_once(service: RunningService) -> None:
    here = service.trained("base-here")
    there = service.trained("base-there", base_model="fake/there")
    for org_id, training_id in (("base-here", here), ("base-there", there), ("base-here", here)):
        answer = service.client.post(f"/generate?org_id={org_id}", json={"message": "Hi"})
        assert answer.json()["response"] == f"Hello from {training_id}"


def test_a_model_whose_base_is_not_in_memory_is_loading(start_service: Start) -> None:
    service = start_service().until_ready()
    training_id = service.trained("org", base_model="fake/slow")
    service.stop()
    service.start()
    service.until_ready()
    loading = service.client.post("/generate?org_id=org", json={"message": "Hi"})
    assert loading.status_code == 503
    assert loading.json()["error"]["code"] == "model_loading"
    assert loading.headers["retry-after"] == "2"
    reply = eventually(
        lambda: (answer := service.client.post("/generate?org_id=org", json={"message": "Hi"})).is_success and answer
    )
    assert reply.json()["response"] == f"Hello from {training_id}"


# Health, and the process as a whole


def test_health_is_answered_while_the_host_starts(start_service: Start) -> None:
    began = time.monotonic()
    service = start_service(DEFAULT_BASE_MODEL="fake/slow")
    health = service.client.get("/health").json()
    seconds = time.monotonic() - began
    assert health["status"] == "starting"
    assert seconds < 5  # about 1 where the machine is idle
    assert service.until_ready().client.get("/health").json()["hosts"][0]["state"] == "ready"


def test_health_has_what_monitors_read(service: RunningService) -> None:
    health = service.client.get("/health").json()
    assert health["cuda_available"] is False
    assert health["cuda_device_count"] == 0
    assert isinstance(health["loaded_models"], int)
    assert health["mode"] == "open"
    assert set(health["jobs"]) == {"queued", "preparing", "running", "evaluating"}


def test_health_is_degraded_while_the_default_host_cannot_be(start_service: Start) -> None:
    service = start_service(DEFAULT_BASE_MODEL="fake/unavailable")
    health = eventually(lambda: (it := service.client.get("/health").json())["status"] == "degraded" and it)
    assert health["error"]["code"] == "base_model_unavailable"
    job = service.until(service.train("org"), "failed")
    assert job["error"]["code"] == "base_model_unavailable"
    base = service.client.post("/generate?org_id=org", json={"message": "Hi", "model_id": "base"})
    assert base.status_code == 503
    assert base.json()["error"]["code"] == "base_model_unavailable"


def test_open_mode_is_said_at_start(service: RunningService) -> None:
    assert '"event": "open: no API key is set up' in service.log


def test_the_service_never_imports_torch() -> None:
    """Nor anything else that takes seconds; it would not answer within one."""
    check = "import sys, repertory.service.api.app; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_logs_hold_nothing_that_users_wrote(service: RunningService) -> None:
    secret = "zanzibar-7731"
    conversation = {"messages": [{"role": "user", "content": secret}, {"role": "assistant", "content": secret}]}
    training_id = service.train("secrets", conversations=[conversation], system_prompt=secret)
    service.until(training_id, "completed")
    service.client.post("/generate?org_id=secrets", json={"message": secret, "history": []})
    service.client.post("/generate?org_id=secrets", json={"message": secret, "history": secret})
    assert secret not in service.log


def test_many_requests_at_once_are_all_answered(service: RunningService) -> None:
    training_id = service.trained("crowd")
    replies: list[str] = []

    def ask() -> None:
        with httpx.Client(base_url=f"{service.url}/api/v1", timeout=20, trust_env=False) as client:
            replies.append(client.post("/generate?org_id=crowd", json={"message": "Hi"}).json()["response"])

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [f"Hello from {training_id}"] * 16
