"""Two service processes on one PostgreSQL, with the folders of ./models shared: side by side, and when one fails."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from running_service import RunningService, eventually

pytestmark = pytest.mark.slow

BUSY = ("queued", "preparing")
STEPS = {"FAKE_HOST_STEPS": "60", "FAKE_HOST_STEP_SECONDS": "0.1"}  # six seconds for a run, a checkpoint every half


class Pair:
    def __init__(self, folder: Path, database_url: str) -> None:
        self._environment = {
            "DATABASE_URL": database_url,
            "FINETUNED_MODEL_DIR": str(folder / "finetuned"),
            "CHECKPOINT_DIR": str(folder / "checkpoints"),
            "DATASET_DIR": str(folder / "datasets"),
            "API_KEY_SECRET_FILE": str(folder / "api_key_secret"),
            **STEPS,
        }
        self.folder = folder
        self.one, self.other = (self._start(name) for name in ("one", "other"))
        for service in (self.one, self.other):
            service.until_ready()

    def _start(self, name: str) -> RunningService:
        (self.folder / name).mkdir()
        return RunningService(self.folder / name, **self._environment)

    def runner_of(self, training_id: str) -> RunningService:
        """The service that runs the job now."""
        found: RunningService = eventually(
            lambda: next((each for each in (self.one, self.other) if _starts(each, training_id)), None)
        )
        return found

    def beside(self, service: RunningService) -> RunningService:
        return self.other if service is self.one else self.one


def kinds(service: RunningService, training_id: str) -> list[str]:
    """Of the job's events, but for warnings; numbered without gaps."""
    events = service.client.get(f"/training/{training_id}/events").json()["events"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    return [event["kind"] for event in events if event["kind"] != "warning"]


@pytest.fixture
def pair(tmp_path: Path, migrated_postgresql: str) -> Iterator[Pair]:
    made = Pair(tmp_path, migrated_postgresql)
    yield made
    for service in (made.one, made.other):
        service.process.send_signal(signal.SIGCONT)
        service.kill()


def _starts(service: RunningService, training_id: str) -> int:
    return len(re.findall(rf'"training_id": "{training_id}".*"event": "run starts"', service.log))


def _midway(service: RunningService, training_id: str) -> None:
    eventually(lambda: service.status(training_id)["metadata"].get("checkpoint_step"))


def test_jobs_are_shared_out_and_each_is_run_once(pair: Pair) -> None:
    ids = [(pair.one if number % 2 else pair.other).train(f"org-{number}") for number in range(4)]
    for training_id in ids:
        assert pair.one.until(training_id, "completed", "failed")["status"] == "completed"
        assert kinds(pair.other, training_id) == ["queued", "preparing", "running", "evaluating", "completed"]
        assert _starts(pair.one, training_id) + _starts(pair.other, training_id) == 1
    assert all(any(_starts(service, one) for one in ids) for service in (pair.one, pair.other))
    for service in (pair.one, pair.other):  # a voice answers wherever it was trained
        reply = service.client.post("/generate?org_id=org-0", json={"message": "Hi"})
        assert reply.json()["response"] == f"Hello from {ids[0]}"


def test_a_job_is_cancelled_through_the_service_that_does_not_run_it(pair: Pair) -> None:
    training_id = pair.one.train("org")
    runner = pair.runner_of(training_id)
    began = time.monotonic()
    answer = pair.beside(runner).client.delete(f"/training/jobs/{training_id}")
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - began < 5
    assert runner.status(training_id)["status"] == "cancelled"
    eventually(lambda: not list(pair.folder.glob("checkpoints/*/*")))


def test_an_export_is_prepared_by_one_of_them_and_by_the_other_when_that_is_gone(pair: Pair) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi, you."}, {"role": "assistant", "content": "Hello there."}]}
    export = f"{json.dumps(chat)}\n".encode()

    def prepared(service: RunningService) -> str:
        sent = service.client.post("/datasets", data={"org_id": "org"}, files={"file": ("export.jsonl", export)})
        assert sent.status_code == 202, sent.text
        url = f"/datasets/{sent.json()['dataset_id']}"
        status = eventually(lambda: (now := service.client.get(url).json()["status"]) not in BUSY and now)
        assert status in ("ready", "needs_persona"), service.client.get(url).json()
        return str(sent.json()["dataset_id"])

    for service in (pair.one, pair.other):
        prepared(service)
    assert ["import starts" in service.log for service in (pair.one, pair.other)] == [True, False]
    pair.one.kill()
    prepared(pair.other)
    assert "import starts" in pair.other.log


@pytest.mark.fault("F1", "F3", "F5")
def test_what_a_killed_service_was_running_is_gone_on_with_by_the_other(pair: Pair) -> None:
    training_id = pair.one.train("org")
    runner = pair.runner_of(training_id)
    _midway(runner, training_id)
    checkpoint = runner.status(training_id)["metadata"]["checkpoint_step"]
    runner.kill()
    job = pair.beside(runner).until(training_id, "completed", "failed")
    assert job["status"] == "completed"
    assert job["metadata"]["resumed_from_step"] >= checkpoint
    assert kinds(pair.beside(runner), training_id) == [
        *("queued", "preparing", "running"),
        *("queued", "preparing", "running", "evaluating", "completed"),
    ]


@pytest.mark.fault("F12")
def test_a_service_that_was_frozen_past_its_lease_can_change_nothing(pair: Pair) -> None:
    training_id = pair.one.train("org")
    zombie = pair.runner_of(training_id)
    _midway(zombie, training_id)
    frozen = [psutil.Process(zombie.process.pid), *zombie.hosts()]
    for process in frozen:
        process.suspend()
    survivor = pair.beside(zombie)
    assert survivor.until(training_id, "completed", "failed")["status"] == "completed"
    adapter = pair.folder / "finetuned/org" / training_id / "MANIFEST.json"
    sealed = adapter.read_bytes()
    for process in frozen:
        process.resume()
    eventually(lambda: "run abandoned, its job is no longer ours" in zombie.log)
    assert survivor.status(training_id)["status"] == zombie.status(training_id)["status"] == "completed"
    assert kinds(zombie, training_id).count("completed") == 1
    assert adapter.read_bytes() == sealed
    reply = zombie.client.post("/generate?org_id=org", json={"message": "Hi"})  # it goes on as if nothing had been
    assert reply.json()["response"] == f"Hello from {training_id}"


def test_a_service_that_stops_hands_its_job_over_at_once(pair: Pair) -> None:
    training_id = pair.one.train("org")
    runner = pair.runner_of(training_id)
    _midway(runner, training_id)
    began = time.monotonic()
    assert runner.stop() == 0
    survivor = pair.beside(runner)
    eventually(lambda: _starts(survivor, training_id))
    assert time.monotonic() - began < 10  # and not after the time of a lease besides
    assert survivor.until(training_id, "completed", "failed")["status"] == "completed"
