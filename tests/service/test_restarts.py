"""The service as a process: how it starts, crashes, stops, and goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from repertory.service.datasets import Datasets
from repertory.service.jobs import Job, Jobs
from repertory.service.store import Store
from running_service import RunningService, eventually, lives
from unlimited import unlimited

Start = Callable[..., RunningService]
SLOW = {"FAKE_HOST_STEPS": "1000", "FAKE_HOST_STEP_SECONDS": "0.05"}  # runs that no test waits for


@contextmanager
def jobs_of(service: RunningService, database_url: str) -> Iterator[Jobs]:
    """The job table of a service that has ended, looked at from outside."""
    store = Store(database_url)
    yield Jobs(store, Datasets(service.folder / "models/datasets"), unlimited(store))
    store.close()


def left_behind(service: RunningService, database_url: str, training_id: str) -> Job:
    with jobs_of(service, database_url) as jobs:
        return jobs.get(training_id)


# Crashes


def test_a_dead_host_is_started_again(start_service: Start) -> None:
    service = start_service().until_ready()
    dead = service.host_of("bundled/SmolLM2-135M-Instruct")
    assert dead is not None
    dead.kill()
    eventually(lambda: (now := service.host_of("bundled/SmolLM2-135M-Instruct")) and now.pid != dead.pid)
    service.until_ready()


@pytest.mark.fault("F3")
def test_after_kill_9_and_a_restart_nothing_is_lost(start_service: Start) -> None:
    service = start_service(FAKE_HOST_STEPS="25", FAKE_HOST_STEP_SECONDS="0.04").until_ready()
    failed = service.train("failed", base_model="fake/fail")
    service.until(failed, "failed")
    running = service.train("running")
    eventually(lambda: service.status(running)["metadata"].get("checkpoint_step"))
    before = service.status(running)
    queued = service.train("queued")
    service.kill()
    service.start()
    after = service.until(running, "completed", "failed")
    assert after["status"] == "completed"
    assert after["metadata"]["resumed_from_step"] >= before["metadata"]["checkpoint_step"]
    assert after["started_at"] == before["started_at"]
    events = service.client.get(f"/training/{running}/events").json()["events"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    kinds = [event["kind"] for event in events if event["kind"] != "warning"]
    assert kinds == ["queued", "preparing", "running", "queued", "preparing", "running", "evaluating", "completed"]
    assert service.status(failed)["status"] == "failed"
    assert service.until(queued, "completed")


@pytest.mark.fault("F19")
def test_kill_9_leaves_no_host(start_service: Start) -> None:
    service = start_service().until_ready()
    hosts = service.hosts()
    assert hosts
    service.kill()
    eventually(lambda: not any(lives(host) for host in hosts))


# Stops


@pytest.mark.fault("F6")
def test_a_stop_keeps_what_was_learned_and_requeues_the_job(start_service: Start, database_url: str) -> None:
    service = start_service(DATABASE_URL=database_url, **SLOW).until_ready()
    training_id = service.train("org")
    eventually(lambda: service.status(training_id)["metadata"].get("step", 0) >= 3)
    seen = service.status(training_id)["metadata"]["step"]
    assert service.stop() == 0
    job = left_behind(service, database_url, training_id)
    assert (job.status, job.attempts) == ("queued", 0)
    assert job.metadata["checkpoint_step"] == job.metadata["step"] >= seen
    service.start()
    service.until_ready()
    resumed = eventually(lambda: service.status(training_id)["metadata"].get("resumed_from_step"))
    assert resumed == job.metadata["checkpoint_step"]


def test_a_stop_is_clean_and_soon_and_takes_the_hosts_along(start_service: Start) -> None:
    service = start_service(**SLOW).until_ready()
    training_id = service.train("org")
    service.until(training_id, "running")
    hosts = service.hosts()
    began = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - began < 10
    assert not any(host.is_running() for host in hosts)


@pytest.mark.fault("F6")
def test_a_second_sigterm_ends_it_at_once(start_service: Start) -> None:
    """The first is waiting for a reply that takes a minute."""
    service = start_service().until_ready()
    hosts = service.hosts()
    body = {"message": "a long one", "max_tokens": 3000, "stream": True, "model_id": "base"}
    with service.client.stream("POST", "/generate?org_id=org", json=body) as response:
        assert "text" in next(response.iter_lines())
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: "told to stop" in service.log)
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(20) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 2
    eventually(lambda: not any(lives(host) for host in hosts))


def test_ctrl_c_is_a_stop(start_service: Start) -> None:
    service = start_service()
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(20) == 0


def test_a_stop_does_not_wait_for_a_long_reply(start_service: Start) -> None:
    service = start_service().until_ready()
    body = {"message": "a long one", "max_tokens": 3000, "stream": True, "model_id": "base"}
    with service.client.stream("POST", "/generate?org_id=org", json=body) as response:
        assert "text" in next(response.iter_lines())
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(15) == 0


# Starts that cannot be


def refused_start(folder: Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "repertory.cli", "serve"],
        cwd=folder,
        env={
            "HOST_MODULE": "repertory.service.fake_host",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=20,
    )
    return done.returncode, done.stderr


def test_a_port_in_use_is_one_line_with_the_cure(service: RunningService, tmp_path: Path) -> None:
    code, said = refused_start(tmp_path, PORT=service.url.rpartition(":")[2])
    assert code == 1
    assert said.count("\n") == 1
    assert "PORT=" in said
    assert list(tmp_path.iterdir()) == []


def test_a_database_in_use_is_one_line_with_the_cure(service: RunningService) -> None:
    code, said = refused_start(service.folder, PORT="0")
    assert code == 1
    assert said.splitlines()[-1].startswith("repertory: Another Repertory service")
    assert "DATABASE_URL" in said


def test_contradicting_settings_are_refused_at_start(tmp_path: Path) -> None:
    code, said = refused_start(tmp_path, PORT="0", USE_4BIT="true", USE_8BIT="true")
    assert code == 1
    assert "use_4bit and use_8bit are both true" in said
    code, said = refused_start(tmp_path, PORT="eighty")
    assert (code, "PORT" in said) == (1, True)


def test_a_dotenv_that_is_no_text_is_refused_at_start_and_by_commands(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"PORT=0\nDEFAULT_ORG_ID=caf\xe9\n")  # as an editor on Windows may save it
    code, said = refused_start(tmp_path)
    assert (code, said.count("\n")) == (1, 1), said
    assert f"{tmp_path / '.env'} cannot be read" in said
    assert "UTF-8" in said
    command = [sys.executable, "-m", "repertory.cli", "models", "list"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (listed.returncode, "Cure: Save it as UTF-8" in listed.stderr, "Traceback" in listed.stderr) == (
        5,
        True,
        False,
    )


@pytest.mark.fault("F8")
def test_a_folder_that_cannot_be_made_is_one_line_with_its_cure(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    code, said = refused_start(tmp_path, PORT="0")
    assert code == 1
    assert "Traceback" not in said
    assert "models" in said.splitlines()[-1]
    assert "permissions" in said.splitlines()[-1]


@pytest.mark.parametrize("host", ["a..b", "203.0.113.7"])
def test_an_address_that_is_not_of_this_machine_is_one_line_with_its_cure(tmp_path: Path, host: str) -> None:
    code, said = refused_start(tmp_path, PORT="0", HOST=host)
    assert (code, said.count("\n")) == (1, 1), said
    assert "Set HOST" in said
    assert "PORT=8301" not in said  # nothing is running there
