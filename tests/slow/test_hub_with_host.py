"""Jobs on base models of a hub, with real service and hosts: each ends in a voice, or in an error with its cure.

tests/model/test_hub.py has the same errors without service, host and job.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from fake_hub import TOKEN, FakeHub, unreachable_url
from hub_service import JOB, service_beside
from repertory import base_models
from repertory.errors import Conflict
from repertory.settings import Settings
from running_service import RunningService, eventually

pytestmark = pytest.mark.slow

CANARY = "hf_canaryThatMustNotBeSeenAnywhere"


@pytest.fixture(scope="module")
def service(hub: FakeHub, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with service_beside(
        hub, original, tmp_path_factory.mktemp("service"), HF_HUB_DOWNLOAD_TIMEOUT="2", HUGGINGFACE_TOKEN=CANARY
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def sound_again(hub: FakeHub) -> Iterator[None]:
    """Each test finds a hub that behaves."""
    yield
    hub.cut_after, hub.cuts, hub.stall_after, hub.bytes_per_second = None, 10**9, None, None


def failure(service: RunningService, base_model: str) -> dict[str, Any]:
    training_id = service.train("failing", base_model=base_model, **JOB)
    job = service.until(training_id, "failed", "completed")
    assert job["status"] == "failed", job
    error: dict[str, Any] = job["error"]
    assert base_model.partition("@")[0] in error["message"]
    return error


def test_a_voice_stays_on_its_commit_when_the_hub_moves_on(
    service: RunningService, hub: FakeHub, original: Path, tmp_path: Path
) -> None:
    old = hub.add("acme/moving", original)
    first = service.trained("moving", base_model="acme/moving", **JOB)
    new = hub.add("acme/moving", tiny.make_model(tmp_path / "newer", "llama-gqa", seed=1), v2=original)
    again = service.trained("moving", base_model="acme/moving", **JOB)
    tagged = service.trained("moving", base_model=f"acme/moving@{new}", **JOB)
    revisions = [service.status(training_id)["metadata"]["revision"] for training_id in (first, again, tagged)]
    assert revisions == [old, old, new]
    for training_id in (first, tagged):
        asked = {"message": "Hello!", "model_id": training_id, "max_tokens": 4}
        answer = eventually(lambda asked=asked: ready(service.client.post("/generate?org_id=moving", json=asked)))
        assert answer.json()["model_info"]["metadata"]["revision"] in (old, new)


def ready(answer: Any) -> Any:
    return answer if answer.status_code == 200 else None


def test_a_model_registered_while_the_service_runs_becomes_a_voice_and_is_then_needed(
    service: RunningService, original: Path
) -> None:
    settings = Settings(
        _env_file=None,
        model_cache_dir=service.folder / "cache",
        finetuned_model_dir=service.folder / "models" / "finetuned",
    )
    base_models.register("parrot", original, settings, print)
    service.trained("registered", base_model="local/parrot", **JOB)
    with pytest.raises(Conflict, match="1 voices stand on local/parrot"):
        base_models.remove("local/parrot", settings, print)


def test_a_download_that_is_cut_once_goes_on(service: RunningService, hub: FakeHub, tmp_path: Path) -> None:
    hub.add("acme/cut-once", tiny.make_model(tmp_path / "model", "llama-gqa"))
    hub.cut_after, hub.cuts = 100_000, 1
    service.trained("cut", base_model="acme/cut-once", **JOB)
    ranges = [seen.range for seen in hub.downloads("model.safetensors") if seen.is_storage]
    assert ranges[-2:] == [None, "bytes=100000-"]


def test_a_gated_model_with_a_token_without_access_fails_with_the_cure(
    service: RunningService, hub: FakeHub, original: Path
) -> None:
    hub.add("acme/gated", original, is_gated=True)
    error = failure(service, "acme/gated")
    assert error["code"] == "base_model_gated"
    assert "has no access" in error["message"]
    assert "Accept its licence" in error["cure"]


def test_a_hub_that_stalls_fails_the_job_in_the_end(service: RunningService, hub: FakeHub, original: Path) -> None:
    hub.add("acme/stalls", original)
    hub.stall_after = 100
    error = failure(service, "acme/stalls")
    assert "nothing to speak of for 2 seconds" in error["message"]
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in error["cure"]


def test_a_hub_that_cuts_for_ever_fails_the_job_in_the_end(
    service: RunningService, hub: FakeHub, original: Path
) -> None:
    hub.add("acme/cuts", original)
    hub.cut_after = 10
    error = failure(service, "acme/cuts")
    assert "was cut 5 times in a row" in error["message"]
    assert "is kept" in error["cure"]


def test_a_download_shows_its_progress_delays_nobody_and_stops_with_its_job(
    service: RunningService, hub: FakeHub, original: Path
) -> None:
    commit = hub.add("acme/slow", original)
    hub.bytes_per_second = 6_000  # some seventy seconds in all
    training_id = service.train("slow", base_model="acme/slow", **JOB)

    def progress() -> dict[str, Any] | None:
        return service.status(training_id)["metadata"].get("download")

    first = eventually(lambda: (now := progress()) and now["bytes_per_second"] > 0 and now)
    assert first["bytes_total"] == sum(path.stat().st_size for path in original.iterdir())
    assert first["revision"] == commit
    assert first["eta_seconds"] > 0
    later = eventually(lambda: (now := progress()) and now["bytes_done"] > first["bytes_done"] and now)
    assert 0 <= first["percent"] <= later["percent"] < 100
    job = service.until(training_id, "preparing")
    assert job["started_at"] is not None
    eventually(lambda: "downloading acme/slow" in service.status(training_id)["metadata"].get("phase", ""))
    hosts = {host["base_model"]: host for host in service.client.get("/health").json()["hosts"]}
    assert hosts["acme/slow"]["download"]["bytes_total"] == first["bytes_total"]
    assert '"event": "download"' in service.log

    killed = service.host_of("tiny/default")
    assert killed is not None
    killed.kill()  # it comes back while the other one is still downloading
    eventually(lambda: (host := service.host_of("tiny/default")) and host.pid != killed.pid)
    service.until_ready()
    answer = service.client.post("/generate?org_id=nobody", json={"message": "Hi", "model_id": "base", "max_tokens": 2})
    assert answer.status_code == 200, answer.text
    assert progress() is not None

    began = time.monotonic()
    assert service.client.delete(f"/training/jobs/{training_id}").status_code == 200
    assert service.status(training_id)["status"] == "cancelled"
    eventually(lambda: service.host_of("acme/slow") is None)
    assert time.monotonic() - began < 15
    partial = service.folder / "cache/hub/acme/slow" / f"{commit}.partial"
    assert partial.is_dir(), "what has come is kept"
    hub.bytes_per_second = None
    service.trained("slow", base_model="acme/slow", **JOB)


def test_without_a_hub_what_is_here_goes_on_and_what_is_not_says_how_to_get_it(
    service: RunningService, hub: FakeHub, original: Path
) -> None:
    hub.add("acme/sharded", original)
    service.trained("sharded", base_model="acme/sharded", **JOB)
    service.stop()
    service.environment |= {"HF_ENDPOINT": unreachable_url()}
    del service.environment["HUGGINGFACE_TOKEN"]
    service.start()
    service.until_ready()
    answer = eventually(
        lambda: ready(service.client.post("/generate?org_id=sharded", json={"message": "Hello!", "max_tokens": 4}))
    )
    assert answer.json()["model_info"]["loaded"]
    service.trained("sharded", base_model="acme/sharded", **JOB)
    error = failure(service, "acme/elsewhere")
    assert error["code"] == "base_model_unavailable"
    assert "cannot be reached" in error["message"]
    assert "repertory models register" in error["cure"]


def test_a_gated_model_without_a_token_and_then_with_one(service: RunningService, hub: FakeHub, original: Path) -> None:
    hub.add("acme/licensed", original, is_gated=True)
    service.stop()
    service.environment |= {"HF_ENDPOINT": hub.url}
    service.start()
    error = failure(service.until_ready(), "acme/licensed")
    assert error["code"] == "base_model_gated"
    assert "no token is set" in error["message"]
    assert "HUGGINGFACE_TOKEN" in error["cure"]
    service.stop()
    service.environment |= {"HUGGINGFACE_TOKEN": TOKEN}
    service.start()
    service.until_ready().trained("licensed", base_model="acme/licensed", **JOB)


def test_no_token_is_found_anywhere(service: RunningService, hub: FakeHub) -> None:
    """After all of the above: not in logs, rows, events or files, and sent to the hub alone."""
    with sqlite3.connect(service.folder / "models" / "repertory.db") as database:
        rows = "\n".join(database.iterdump())
    assert "acme/licensed" in rows
    files = [
        path for path in service.folder.rglob("*") if path.is_file() and path.suffix in (".json", ".log", ".jsonl")
    ]
    assert service.log_path in files
    seen = [rows, *(path.read_text() for path in files)]
    for token in (CANARY, TOKEN):
        assert not any(token in text for text in seen)
        assert any(request.authorization == f"Bearer {token}" for request in hub.requests)
    assert all(request.authorization is None for request in hub.requests if request.is_storage)
