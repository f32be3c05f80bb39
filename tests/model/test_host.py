"""The host as a process, driven over its socket as the service drives it, with a tiny base model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from repertory.contracts import BUNDLED_MODEL, AdapterRef
from repertory_fixtures import MakeSpec, conversation
from running_host import DEADLINE_SECONDS, RunningHost, eventually, request
from running_service import lives


@pytest.fixture(scope="module")
def host(cache: Path) -> Iterator[RunningHost]:
    with tempfile.TemporaryDirectory() as folder:
        host = RunningHost(
            cache, Path(folder) / "h.sock", "tiny/llama-gqa", "--quantization", "none", "--dtype", "fp32"
        )
        assert host.until("ready", "failed")["state"] == "ready"
        yield host
        host.close()


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk.get("text", "") for chunk in chunks)


@pytest.mark.fault("F8")
def test_a_model_cache_that_cannot_be_is_the_hosts_error_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with tempfile.TemporaryDirectory() as folder:
        host = RunningHost(tmp_path / "cache", Path(folder) / "h.sock", BUNDLED_MODEL)
        try:
            error = host.until("failed", "ready")["error"]
        finally:
            host.close()
    assert error["code"] == "storage_failed"
    assert str(tmp_path / "cache") in error["message"]
    assert "permissions" in error["cure"]


def test_health_says_what_is_held(host: RunningHost) -> None:
    health = host.health()
    assert health["key"] == {"base_model": "tiny/llama-gqa", "revision": None, "quantization": "none", "dtype": "fp32"}
    assert health["device"]["kind"] in ("cpu", "cuda")
    assert health["parameters"] > 0
    assert health["memory_bytes"] > 0


def test_a_voice_is_trained_loaded_asked_evaluated_and_unloaded(host: RunningHost, make_spec: MakeSpec) -> None:
    spec = make_spec()
    events = list(host.run(spec))
    assert events[-1]["kind"] == "completed"
    eventually(lambda: host.health()["runs"] == [])
    ref = AdapterRef(org_id="org", training_id="train_1", path=spec.output_dir)
    assert host.client.post("/adapters/load", json=ref.model_dump()).status_code == 200
    assert host.health()["adapters"] == ["train_1"]
    said = host.generate(ref)
    assert said[-1]["finish_reason"] in ("stop", "length")
    assert said[-1]["usage"]["prompt_tokens"] > 0
    assert text_of(said) != text_of(host.generate(None))
    asked = {"org_id": "org", "adapter": ref.model_dump(), "conversations_path": spec.conversations_path}
    metrics = host.client.post("/evaluate", json=asked).json()
    assert metrics["perplexity"] == pytest.approx(events[-1]["data"]["report"]["perplexity"], rel=1e-5)
    assert metrics["perplexity"] < metrics["base_perplexity"]
    given = asked | {
        "conversations": [conversation(1, 7).model_dump(mode="json")],
        "test_prompts": [{"instruction": "ok"}],
    }
    on_given = host.client.post("/evaluate", json=given).json()
    assert on_given["scored_on"] == "given"
    assert [answer["instruction"] for answer in on_given["test_responses"]] == ["ok"]
    assert host.client.post("/adapters/unload", json=ref.model_dump()).status_code == 200
    assert host.health()["adapters"] == []
    assert host.client.post("/adapters/load", json=ref.model_dump()).status_code == 200
    gone = {"org_id": "org", "training_ids": ["train_1", "train_of_which_nothing_is_held"]}
    assert host.client.post("/forget", json=gone | {"org_id": "other"}).status_code == 200
    assert host.health()["adapters"] == ["train_1"]  # it is not theirs
    assert host.client.post("/forget", json=gone).status_code == 200
    assert host.health()["adapters"] == []


def test_requests_are_answered_while_a_run_trains(host: RunningHost, make_spec: MakeSpec) -> None:
    spec = make_spec(200, training_id="train_long", num_train_epochs=20)
    events: list[dict[str, Any]] = []
    following = threading.Thread(target=lambda: events.extend(host.run(spec)))
    following.start()
    eventually(lambda: host.health()["runs"] == ["train_long"])
    replies = [text_of(host.generate(None)) for _ in range(5)]
    assert len(set(replies)) == 1
    assert host.health()["runs"] == ["train_long"]  # it was still at it
    assert host.client.delete("/runs/train_long").status_code == 200
    following.join(DEADLINE_SECONDS)
    assert events[-1]["kind"] == "cancelled"
    assert host.health()["runs"] == []  # it has really stopped when the answer comes
    assert host.client.delete("/runs/train_long").status_code == 404


def test_a_run_cannot_be_started_twice_and_the_first_goes_on(host: RunningHost, make_spec: MakeSpec) -> None:
    spec = make_spec(200, training_id="train_twice", num_train_epochs=50)
    first = host.run(spec)
    next(first)
    eventually(lambda: host.health()["runs"] == ["train_twice"])
    again = host.client.post("/runs", json=spec.model_dump())
    assert again.status_code == 409
    assert next(first)["kind"] != "cancelled"
    assert host.client.delete("/runs/train_twice").status_code == 200
    first.close()


def test_a_run_that_nobody_follows_any_more_stops(host: RunningHost, make_spec: MakeSpec) -> None:
    events = host.run(make_spec(200, training_id="train_lonely", num_train_epochs=50))
    next(events)
    events.close()
    eventually(lambda: host.health()["runs"] == [])


@pytest.mark.fault("F27")
def test_a_reader_who_goes_away_frees_the_row(host: RunningHost) -> None:
    endless = request(None, max_tokens=900, temperature=1.0, seed=1)
    with host.client.stream("POST", "/generate", json=endless):
        eventually(lambda: host.health()["running"] == 1)  # the replies of the run before this may still be given up
    eventually(lambda: host.health()["running"] == 0)


def test_a_run_of_which_one_step_fails_says_why_and_the_host_goes_on(host: RunningHost, make_spec: MakeSpec) -> None:
    events = list(host.run(make_spec(training_id="train_bad", lora_r=999)))
    assert events[-1]["kind"] == "failed"
    assert "lora_r 999" in events[-1]["error"]["message"]
    assert text_of(host.generate(None))


@pytest.mark.fault("F10")
def test_a_damaged_adapter_is_an_error_for_that_voice_alone(
    host: RunningHost, make_spec: MakeSpec, tmp_path: Path
) -> None:
    ref = AdapterRef(org_id="org", training_id="train_gone", path=str(tmp_path / "nowhere"))
    answer = host.client.post("/generate", json=request(ref))
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "adapter_unusable"
    assert text_of(host.generate(None))


def test_what_is_no_request_is_refused(host: RunningHost) -> None:
    assert host.client.post("/generate", json={"org_id": "x"}).status_code == 422
    too_long = host.client.post("/generate", json=request(None, max_tokens=100_000))
    assert too_long.status_code == 422
    assert too_long.json()["error"]["param"] == "max_tokens"


def test_a_base_model_that_cannot_be_had_fails_with_its_name_the_reason_and_the_cure(
    cache: Path, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        host = RunningHost(cache, Path(folder) / "h.sock", "meta-llama/Llama-2-7b-chat-hf")
        error = host.until("failed", "ready")["error"]
        host.close()
    assert error["code"] == "base_model_unavailable"
    assert "meta-llama/Llama-2-7b-chat-hf" in error["message"]
    assert "MODEL_CACHE_DIR" in error["cure"]


@pytest.mark.fault("F19")
def test_no_host_outlives_its_service(cache: Path, tmp_path: Path) -> None:
    """The service is killed without a chance to close the control pipe: the kernel takes the host with it."""
    with tempfile.TemporaryDirectory() as folder:
        start_and_wait = (
            "import subprocess, sys, time\n"
            "host = subprocess.Popen([sys.executable, '-m', 'repertory.model.host', '--socket', sys.argv[1],"
            " '--base-model', 'tiny/llama'], stdin=subprocess.PIPE)\n"
            "print(host.pid, flush=True)\n"
            "time.sleep(600)\n"
        )
        socket = str(Path(folder) / "h.sock")
        service = subprocess.Popen(
            [sys.executable, "-c", start_and_wait, socket],
            stdout=subprocess.PIPE,
            env=os.environ | {"MODEL_CACHE_DIR": str(cache)},
        )
        assert service.stdout is not None
        host = psutil.Process(int(service.stdout.readline()))
        eventually(Path(socket).exists)
        service.kill()
        service.wait()
        service.stdout.close()
        eventually(lambda: not lives(host))
