from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select

from repertory.contracts import BaseKey, RunEvent
from repertory.errors import Conflict, ErrorInfo
from repertory.service.jobs import Job, Jobs, Status
from repertory.service.lease import MAX_LOST_HOSTS, Lease, LeaseLost
from repertory.service.store import Store, job_events, metrics, model_versions, organisations

Submit = Callable[..., str]
KEY = BaseKey(base_model="fake/base", quantization="none", dtype="fp32")
ERROR = ErrorInfo(code="some_code", message="Something.", cure="Do something.")


def event(kind: Any, progress: float = 0.0, **data: Any) -> RunEvent:
    return RunEvent(kind=kind, progress=progress, data=data)


def kinds(store: Store, job_id: str) -> list[str]:
    with store.read() as connection:
        rows = connection.execute(select(job_events).where(job_events.c.job_id == job_id).order_by("seq")).all()
    return [row.kind for row in rows]


def steps(store: Store, job_id: str) -> list[int]:
    with store.read() as connection:
        return list(
            connection.execute(select(metrics.c.step).where(metrics.c.job_id == job_id).order_by("step")).scalars()
        )


@pytest.fixture
def job(jobs: Jobs, submit: Submit) -> Job:
    claimed = jobs.claim(submit(), "us")
    assert claimed is not None
    return claimed


@pytest.fixture
def lease(store: Store, job: Job) -> Lease:
    return Lease(store, job)


def test_a_story_moves_the_job_forwards_with_one_event_each(jobs: Jobs, store: Store, job: Job, lease: Lease) -> None:
    for told in (
        event("preparing"),
        event("running", 0.0, lora_r=16),
        event("step", 0.3, step=1, loss=3.0),
        event("heartbeat", 0.3),
        event("step", 0.6, step=2, loss=2.0),
        event("evaluating", 0.9, phase="measuring"),
    ):
        lease.record(told)
    present = jobs.get(job.id)
    assert (present.status, present.progress) == (Status.EVALUATING, 0.9)
    assert present.metadata == {"lora_r": 16, "step": 2, "loss": 2.0, "phase": "measuring", "warnings": []}
    lease.publish(KEY, {"report": {"perplexity": 9.5}})
    present = jobs.get(job.id)
    assert (present.status, present.progress) == (Status.COMPLETED, 1.0)
    assert present.metadata == {"lora_r": 16, "step": 2, "loss": 2.0, "report": {"perplexity": 9.5}, "warnings": []}
    assert kinds(store, job.id) == ["queued", "preparing", "running", "evaluating", "completed"]


def test_a_new_phase_of_the_same_status_is_no_transition(store: Store, job: Job, lease: Lease) -> None:
    lease.record(event("preparing", phase="reading"))
    assert lease.record(event("preparing", phase="measuring the base")).metadata["phase"] == "measuring the base"
    lease.record(event("evaluating", phase="scoring"))
    lease.record(event("evaluating", phase="writing replies"))
    assert kinds(store, job.id) == ["queued", "preparing", "evaluating"]


def test_publishing_shows_and_promotes_the_version(store: Store, job: Job, lease: Lease) -> None:
    lease.publish(KEY, {"report": {}})
    with store.read() as connection:
        version = connection.execute(select(model_versions)).one()
        promoted = connection.execute(select(organisations.c.promoted)).scalar_one()
    assert (version.training_id, version.org_id, version.base_model) == (job.id, job.org_id, "fake/base")
    assert promoted == job.id


def test_an_ended_job_takes_no_more_writes(jobs: Jobs, store: Store, job: Job, lease: Lease) -> None:
    lease.fail(ERROR)
    for write in (
        lambda: lease.record(event("step", 0.5, step=1)),
        lambda: lease.publish(KEY, {}),
        lambda: lease.host_lost("gone"),
        lambda: lease.fail(ERROR),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert jobs.get(job.id).status == Status.FAILED
    assert kinds(store, job.id) == ["queued", "preparing", "failed"]
    with store.read() as connection:
        assert connection.execute(select(model_versions)).all() == []


@pytest.mark.fault("F12")
def test_a_run_that_was_taken_over_can_change_nothing(jobs: Jobs, store: Store, job: Job, lease: Lease) -> None:
    jobs.recover()
    taken_over = jobs.claim(job.id, "another process")
    assert taken_over is not None
    with pytest.raises(LeaseLost):
        lease.record(event("step", 0.5, step=1))
    with pytest.raises(LeaseLost):
        lease.publish(KEY, {})
    assert steps(store, job.id) == []
    Lease(store, taken_over).record(event("step", 0.5, step=1))
    assert steps(store, job.id) == [1]


def test_progress_never_falls_within_an_attempt_and_is_1_only_at_the_end(lease: Lease) -> None:
    lease.record(event("running", 0.0))
    assert lease.record(event("step", 0.5, step=1)).progress == 0.5
    assert lease.record(event("heartbeat", 0.0)).progress == 0.5
    assert lease.record(event("evaluating", 1.0)).progress == 0.999


def test_resuming_forgets_the_steps_past_the_checkpoint(jobs: Jobs, store: Store, job: Job, lease: Lease) -> None:
    lease.record(event("running", 0.0))
    for step in range(1, 8):
        lease.record(event("step", step / 10, step=step))
    jobs.recover()
    again = jobs.claim(job.id, "us again")
    assert again is not None
    resumed = Lease(store, again).record(event("running", 0.5, resumed_from_step=5))
    assert steps(store, job.id) == [1, 2, 3, 4, 5]
    assert resumed.progress == 0.5
    assert resumed.metadata["resumed_from_step"] == 5


def test_beginning_anew_forgets_all_steps(jobs: Jobs, store: Store, job: Job, lease: Lease) -> None:
    lease.record(event("step", 0.1, step=1))
    lease.record(event("running", 0.0))
    assert steps(store, job.id) == []


def test_a_step_told_twice_is_kept_once(store: Store, job: Job, lease: Lease) -> None:
    lease.record(event("step", 0.1, step=1, loss=3.0))
    lease.record(event("step", 0.1, step=1, loss=2.0))
    assert steps(store, job.id) == [1]


def test_warnings_gather_and_each_is_an_event(store: Store, job: Job, lease: Lease) -> None:
    lease.record(event("running", 0.0, warnings=["short", "odd"]))
    assert lease.record(event("running", 0.0, warnings=["odd", "new"])).metadata["warnings"] == ["short", "odd", "new"]
    assert kinds(store, job.id).count("warning") == 4


def test_numbers_that_json_does_not_have_are_stored_as_null(lease: Lease) -> None:
    stored = lease.record(event("step", 0.1, step=1, loss=float("nan"), norms=[float("inf")]))
    assert stored.metadata["loss"] is None
    assert stored.metadata["norms"] == [None]


def test_a_lost_host_requeues_the_job_until_it_is_hopeless(jobs: Jobs, store: Store, job: Job) -> None:
    present: Job | None = job
    for _ in range(MAX_LOST_HOSTS):
        assert present is not None
        Lease(store, present).host_lost("the connection was lost")
        present = jobs.claim(job.id, "us")
    failed = jobs.get(job.id)
    assert failed.status == Status.FAILED
    assert failed.error is not None
    assert failed.error.code == "host_crashed"


def test_a_new_checkpoint_gives_new_hope(jobs: Jobs, store: Store, job: Job) -> None:
    present: Job | None = job
    for checkpoint in (5, 10, 15, 20):
        assert present is not None
        lease = Lease(store, present)
        lease.record(event("checkpoint", 0.5, step=checkpoint))
        lease.host_lost("the connection was lost")
        present = jobs.claim(job.id, "us")
    assert present is not None


def test_an_old_checkpoint_gives_none(store: Store, jobs: Jobs, job: Job) -> None:
    lease = Lease(store, job)
    lease.record(event("checkpoint", 0.5, step=5))
    lease.host_lost("the connection was lost")
    again = jobs.claim(job.id, "us")
    assert again is not None
    assert Lease(store, again).record(event("checkpoint", 0.5, step=5)).attempts == 1


def test_an_interrupted_run_goes_back_without_blame(jobs: Jobs, store: Store, job: Job, lease: Lease) -> None:
    lease.record(event("checkpoint", 0.5, step=5))
    lease.give_back("the service was stopped")
    present = jobs.get(job.id)
    assert (present.status, present.attempts, present.progress) == (Status.QUEUED, 0, 0.5)
    assert [one.data for one in jobs.events(job.id)][-1] == {"reason": "the service was stopped"}
    with pytest.raises(LeaseLost):
        lease.beat()


def test_an_interrupted_run_that_was_to_be_cancelled_is(jobs: Jobs, job: Job, lease: Lease) -> None:
    jobs.cancel(job.id)
    assert lease.beat().cancel_requested
    lease.give_back("the service was stopped")
    assert jobs.get(job.id).status == Status.CANCELLED


def test_the_commit_is_kept_once_it_is_known(jobs: Jobs, job: Job, lease: Lease) -> None:
    lease.pin("fake/base@0123")
    lease.give_back("the service was stopped")
    assert jobs.get(job.id).base_model == "fake/base@0123"


def test_a_host_lost_while_cancelling_means_cancelled(jobs: Jobs, job: Job, lease: Lease) -> None:
    jobs.cancel(job.id)
    lease.host_lost("the host stopped the run")
    assert jobs.get(job.id).status == Status.CANCELLED


@pytest.mark.fault("F21")
def test_cancel_racing_completion_ends_in_one_state(jobs: Jobs, store: Store, submit: Submit) -> None:
    for _ in range(25):
        claimed = jobs.claim(submit(), "us")
        assert claimed is not None
        job, lease = claimed, Lease(store, claimed)
        answers: list[str] = []

        def cancel(job: Job = job, answers: list[str] = answers) -> None:
            try:
                answers.append(jobs.cancel(job.id).status)
            except Conflict:
                answers.append("refused")

        cancelling = threading.Thread(target=cancel)
        cancelling.start()
        lease.publish(KEY, {})
        cancelling.join()
        assert jobs.get(job.id).status == Status.COMPLETED
        assert answers in (["preparing"], ["refused"])  # asked in time but too late to stop it, or refused
        assert kinds(store, job.id) == ["queued", "preparing", "completed"]
