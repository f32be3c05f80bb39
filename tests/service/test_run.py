"""A run's thread against the real database and a real (fake) host, when something goes wrong on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from repertory.contracts import RunEvent
from repertory.errors import Unavailable
from repertory.service import dispatcher, host_client, hosts, run
from repertory.service.jobs import Job, Status
from repertory.service.lease import Lease
from repertory.service.service import Service
from repertory.settings import Settings
from running_service import eventually

from .conftest import submission

# httpcore drops a Unix socket that could not connect without closing it; reference counting closes it at once.
pytestmark = pytest.mark.filterwarnings("ignore:.*<socket.socket.*family=1:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def start(clean_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    started: list[Service] = []

    def make(steps: int = 10) -> Service:
        monkeypatch.setenv("FAKE_HOST_STEPS", str(steps))
        service = Service(clean_settings.model_copy(update={"default_base_model": "fake/base"}))
        service.start()
        started.append(service)
        return service

    yield make
    for service in started:
        service.stop()


def submitted(service: Service) -> str:
    job_id = service.jobs.submit(submission()).job.id
    service.dispatcher.wake()
    return job_id


def until(service: Service, job_id: str, *statuses: Status) -> Job:
    job: Job = eventually(lambda: (present := service.jobs.get(job_id)).status in statuses and present)
    return job


@pytest.mark.fault("F18")
def test_a_hanging_host_is_killed_and_the_run_resumed(
    start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_client, "SILENCE_SECONDS", 0.5)
    service = start(steps=60)
    job_id = submitted(service)
    eventually(lambda: service.jobs.get(job_id).metadata.get("checkpoint_step"))
    (host,) = service.hosts.ready()
    assert host.process is not None
    os.kill(host.process.pid, signal.SIGSTOP)
    job = until(service, job_id, Status.COMPLETED, Status.FAILED)
    assert job.status == Status.COMPLETED
    assert job.metadata["resumed_from_step"] >= 5


@pytest.mark.fault("F13")
def test_a_database_that_takes_no_writes_for_a_while_costs_nothing(
    start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "WRITE_RETRY_SECONDS", 0.01)
    record, refusals = Lease.record, iter(range(20))

    def refuse_at_first(lease: Lease, event: RunEvent) -> Job:
        if event.kind == "step" and next(refusals, None) is not None:
            raise OperationalError("UPDATE", {}, Exception("database is locked"))
        return record(lease, event)

    monkeypatch.setattr(Lease, "record", refuse_at_first)
    service = start()
    job = until(service, submitted(service), Status.COMPLETED, Status.FAILED)
    assert (job.status, job.metadata["step"]) == (Status.COMPLETED, 10)
    assert next(refusals, None) is None


def test_a_mistake_of_ours_ends_the_job_and_says_nothing_of_its_text(
    start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stumble(_lease: Lease, _event: RunEvent) -> Job:
        raise ZeroDivisionError("over what the user wrote")

    monkeypatch.setattr(Lease, "record", stumble)
    service = start()
    job = until(service, submitted(service), Status.FAILED)
    assert job.error is not None
    assert job.error.code == "internal_error"
    assert "what the user wrote" not in job.error.message + capsys.readouterr().out


def test_a_run_taken_over_by_somebody_else_stops_on_the_host(start: Callable[..., Service]) -> None:
    service = start(steps=10_000)
    job_id = submitted(service)
    until(service, job_id, Status.RUNNING)
    service.jobs.recover()  # as another process would, that finds ours dead
    service.jobs.cancel(job_id)
    (host,) = service.hosts.ready()

    def runs() -> int:
        health = host.client.health()
        return len(health.runs) if health is not None else 1

    eventually(lambda: runs() == 0)
    assert service.jobs.get(job_id).status == Status.CANCELLED


def test_a_cancel_that_takes_too_long_says_so(start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "CANCEL_SECONDS", 0.1)
    monkeypatch.setattr(host_client.HostClient, "stop_run", lambda *_: None)
    service = start(steps=10_000)
    job_id = submitted(service)
    until(service, job_id, Status.RUNNING)
    with pytest.raises(Unavailable) as later:
        service.dispatcher.cancel(job_id)
    assert later.value.code == "still_stopping"


def test_trainings_on_one_base_model_are_limited(start: Callable[..., Service]) -> None:
    service = start(steps=10_000)
    first, second = submitted(service), submitted(service)
    until(service, first, Status.RUNNING)
    waiting = eventually(lambda: (job := service.jobs.get(second)).waiting_for and job)
    assert waiting.status == Status.QUEUED
    assert "MAX_CONCURRENT_TRAININGS" in waiting.waiting_for


def test_a_job_waits_for_memory_with_its_reason(start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    service = start(steps=10_000)
    first = submitted(service)
    until(service, first, Status.RUNNING)
    large = service.jobs.submit(submission("another", base_model="fake/large")).job.id
    eventually(lambda: "waiting for memory" in (service.jobs.get(large).waiting_for or ""))
    service.dispatcher.cancel(first)
    assert until(service, large, Status.RUNNING)
    assert [host.base_model for host in service.hosts.all()] == ["fake/large"]


def test_the_queue_goes_on_after_a_mistake(start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    service = start()
    acquire = hosts.Hosts.acquire
    mistakes = iter([ZeroDivisionError()])

    def stumble_once(self: hosts.Hosts, *about: Any) -> hosts.Host:
        for mistake in mistakes:
            raise mistake
        return acquire(self, *about)

    monkeypatch.setattr(hosts.Hosts, "acquire", stumble_once)
    assert until(service, submitted(service), Status.COMPLETED)
