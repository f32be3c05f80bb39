from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from repertory.contracts import RunEvent
from repertory.errors import Conflict, ErrorInfo, InvalidInput, NotFound
from repertory.service.datasets import Datasets
from repertory.service.jobs import COMES_FROM, Job, Jobs, Status, enter, tell
from repertory.service.lease import Lease, LeaseLost
from repertory.service.store import Store, job_events

from .conftest import submission

Submit = Callable[..., str]
PATHS: dict[Status, list[Status]] = {  # to each status, from the queue
    Status.QUEUED: [],
    Status.PREPARING: [Status.PREPARING],
    Status.RUNNING: [Status.PREPARING, Status.RUNNING],
    Status.EVALUATING: [Status.PREPARING, Status.RUNNING, Status.EVALUATING],
    Status.COMPLETED: [Status.PREPARING, Status.COMPLETED],
    Status.FAILED: [Status.FAILED],
    Status.CANCELLED: [Status.CANCELLED],
}
ERROR = ErrorInfo(code="some_code", message="Something.", cure="Do something.")


def kinds(store: Store, job_id: str) -> list[str]:
    """Of a job's events, in order; their sequence numbers have no gaps."""
    with store.read() as connection:
        events = connection.execute(select(job_events).where(job_events.c.job_id == job_id).order_by("seq")).all()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.kind for event in events]


def claimed(jobs: Jobs, job_id: str) -> Job:
    job = jobs.claim(job_id, "us")
    assert job is not None
    return job


def test_a_submitted_job_is_queued_with_its_conversations_on_disk(jobs: Jobs, datasets: Datasets, store: Store) -> None:
    accepted = jobs.submit(submission("org"))
    assert accepted.job.status == Status.QUEUED
    assert accepted.job.progress == 0.0
    assert not accepted.is_replay
    lines = datasets.conversations_path("org", accepted.job.id).read_text().splitlines()
    assert lines == ['{"messages":[{"role":"assistant","content":"Hey!"}]}']
    assert kinds(store, accepted.job.id) == ["queued"]


def test_an_unknown_job_is_not_found(jobs: Jobs) -> None:
    with pytest.raises(NotFound) as missing:
        jobs.get("train_0000000000000000")
    assert missing.value.code == "training_not_found"


@pytest.mark.fault("F31")
def test_turns_go_to_the_organisation_that_ran_least_recently(jobs: Jobs, submit: Submit) -> None:
    greedy = [submit("greedy") for _ in range(3)]
    modest = submit("modest")
    assert [job.id for job in jobs.queue()] == [*greedy, modest]
    claimed(jobs, greedy[0])
    assert [job.id for job in jobs.queue()] == [modest, *greedy[1:]]
    claimed(jobs, modest)
    assert [job.id for job in jobs.queue()] == greedy[1:]
    assert jobs.queue_positions() == {greedy[1]: 1, greedy[2]: 2}


def test_an_interrupted_job_goes_first(jobs: Jobs, submit: Submit) -> None:
    interrupted, other = submit("a"), submit("b")
    claimed(jobs, interrupted)
    assert [job.id for job in jobs.recover()] == [interrupted]
    assert [job.id for job in jobs.queue()] == [interrupted, other]


def test_a_claim_leaves_the_queue_once(jobs: Jobs, submit: Submit) -> None:
    job_id = submit()
    job = claimed(jobs, job_id)
    assert (job.status, job.lease_epoch) == (Status.PREPARING, 1)
    assert job.started_at is not None
    assert jobs.claim(job_id, "them") is None


@pytest.mark.fault("F11")
def test_of_many_claimers_at_once_exactly_one_wins_each_job(jobs: Jobs, submit: Submit) -> None:
    ids = [submit(f"org{number}") for number in range(12)]
    won: list[str] = []

    def take_all() -> None:
        won.extend(job_id for job_id in ids if jobs.claim(job_id, "claimer") is not None)

    threads = [threading.Thread(target=take_all) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(ids)


def test_the_reason_for_waiting_is_kept_until_the_claim(jobs: Jobs, submit: Submit) -> None:
    job_id = submit()
    jobs.wait(jobs.get(job_id), "The base model is loading.")
    assert jobs.get(job_id).waiting_for == "The base model is loading."
    assert claimed(jobs, job_id).waiting_for is None


def test_a_queued_job_without_hope_fails_with_its_error(jobs: Jobs, submit: Submit, store: Store) -> None:
    job_id = submit()
    jobs.fail_queued(job_id, ERROR)
    job = jobs.get(job_id)
    assert (job.status, job.error) == (Status.FAILED, ERROR)
    assert job.completed_at is not None
    assert kinds(store, job_id) == ["queued", "failed"]


def test_cancelling_a_queued_job_ends_it_at_once(jobs: Jobs, submit: Submit, store: Store) -> None:
    job_id = submit()
    assert jobs.cancel(job_id).status == Status.CANCELLED
    assert jobs.claim(job_id, "us") is None
    assert kinds(store, job_id) == ["queued", "cancelled"]


def test_cancelling_again_changes_nothing(jobs: Jobs, submit: Submit, store: Store) -> None:
    job_id = submit()
    first = jobs.cancel(job_id)
    assert jobs.cancel(job_id) == first
    assert kinds(store, job_id) == ["queued", "cancelled"]


def test_cancelling_an_active_job_asks_for_it(jobs: Jobs, submit: Submit) -> None:
    job_id = submit()
    claimed(jobs, job_id)
    job = jobs.cancel(job_id)
    assert (job.status, job.cancel_requested) == (Status.PREPARING, True)


def test_a_failed_job_cannot_be_cancelled(jobs: Jobs, submit: Submit) -> None:
    job_id = submit()
    jobs.fail_queued(job_id, ERROR)
    with pytest.raises(Conflict) as refused:
        jobs.cancel(job_id)
    assert refused.value.code == "job_terminal"
    assert jobs.get(job_id).status == Status.FAILED


def test_recovery_requeues_what_was_active(jobs: Jobs, submit: Submit, store: Store) -> None:
    dead, waiting = submit(), submit()
    claimed(jobs, dead)
    assert [job.id for job in jobs.recover()] == [dead]
    assert [jobs.get(each).status for each in (dead, waiting)] == ["queued", "queued"]
    assert kinds(store, dead) == ["queued", "preparing", "queued"]
    assert jobs.get(dead).attempts == 0  # it is not to blame
    assert jobs.recover() == []


def test_only_a_lease_whose_heart_has_stopped_is_taken_back(jobs: Jobs, submit: Submit, store: Store) -> None:
    alive, dead = submit(), submit()
    of_alive, of_dead = Lease(store, claimed(jobs, alive)), Lease(store, claimed(jobs, dead))
    before = {pulse.job_id: pulse for pulse in jobs.pulses()}
    of_alive.beat()
    assert jobs.take_back(before[alive], "lost") is None
    taken = jobs.take_back(before[dead], "lost")
    assert taken is not None
    assert (taken.status, jobs.get(alive).status) == ("queued", "preparing")
    assert jobs.take_back(before[dead], "lost") is None
    with pytest.raises(LeaseLost):
        of_dead.beat()
    assert jobs.events(dead)[-1].data == {"reason": "lost"}


def warn_and_enter(store: Store, job_id: str, status: Status) -> None:
    with store.write() as connection:
        tell(connection, job_id, "warning", {})
        enter(connection, job_id, status)


def test_a_status_changes_along_its_arrows_only(store: Store, jobs: Jobs, submit: Submit) -> None:
    """Whatever a caller believes: a transition that no arrow allows takes its whole transaction back."""
    for status in Status:
        job_id = submit()
        for arrow in PATHS[status]:
            with store.write() as connection:
                enter(connection, job_id, arrow)
        for other in Status:
            if status in COMES_FROM[other]:
                continue
            with pytest.raises(RuntimeError):
                warn_and_enter(store, job_id, other)
        assert jobs.get(job_id).status == status
        assert kinds(store, job_id) == ["queued", *PATHS[status]]


def test_recovery_ends_what_was_being_cancelled(jobs: Jobs, submit: Submit) -> None:
    job_id = submit()
    claimed(jobs, job_id)
    jobs.cancel(job_id)
    jobs.recover()
    assert jobs.get(job_id).status == Status.CANCELLED


def test_an_interrupted_job_keeps_its_start_and_gets_a_new_epoch(jobs: Jobs, submit: Submit) -> None:
    job_id = submit()
    first = claimed(jobs, job_id)
    jobs.recover()
    second = claimed(jobs, job_id)
    assert second.started_at == first.started_at
    assert second.lease_epoch == 2


def test_the_same_request_under_the_same_key_makes_one_job(jobs: Jobs) -> None:
    first = jobs.submit(submission(key="k"))
    second = jobs.submit(submission(key="k"))
    assert second.is_replay
    assert second.job == first.job
    assert len(jobs.of_organisation("org")) == 1


def test_another_request_under_the_same_key_is_refused(jobs: Jobs) -> None:
    jobs.submit(submission(key="k"))
    with pytest.raises(InvalidInput) as refused:
        jobs.submit(submission(request="another", key="k"))
    assert refused.value.code == "idempotency_key_reused"


def test_keys_of_two_organisations_do_not_meet(jobs: Jobs) -> None:
    jobs.submit(submission("a", key="k"))
    assert not jobs.submit(submission("b", request="another", key="k")).is_replay


@pytest.mark.fault("F22")
def test_the_same_request_many_times_at_once_makes_one_job(jobs: Jobs, tmp_path: Path) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(jobs.submit(submission(key="k")).job.id)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1
    assert [folder.name for folder in (tmp_path / "datasets/org").iterdir()] == [made[0]]


def test_what_an_unfinished_submit_left_is_swept(
    jobs: Jobs, datasets: Datasets, submit: Submit, tmp_path: Path
) -> None:
    kept = submit("org")
    datasets.write_pending("org", "train_never_accepted", [], {})
    jobs.sweep(is_alone=False)  # a submit of another service may be going on
    assert len(list((tmp_path / "datasets/org").iterdir())) == 2
    jobs.sweep(is_alone=True)
    assert [folder.name for folder in (tmp_path / "datasets/org").iterdir()] == [kept]
    datasets.write_pending("org", "train_never_accepted", [], {})
    abandoned = tmp_path / "datasets/org/train_never_accepted.pending"
    os.utime(abandoned, (0, 0))
    jobs.sweep(is_alone=False)
    assert not abandoned.exists()


@pytest.mark.fault("F22")
def test_a_crash_between_row_and_rename_loses_nothing(
    jobs: Jobs, datasets: Datasets, submit: Submit, tmp_path: Path
) -> None:
    job_id = submit("org")
    folder = tmp_path / "datasets/org"
    (folder / job_id).rename(folder / f"{job_id}.pending")  # as if the process had died before
    jobs.sweep(is_alone=True)
    assert datasets.conversations_path("org", job_id).read_text()
    assert [each.name for each in folder.iterdir()] == [job_id]


def test_counts_are_of_jobs_that_have_not_ended(jobs: Jobs, submit: Submit) -> None:
    submit()
    jobs.cancel(submit())
    running = submit()
    Lease(jobs._store, claimed(jobs, running)).record(RunEvent(kind="running", progress=0.0))
    assert jobs.counts() == {"queued": 1, "preparing": 0, "running": 1, "evaluating": 0}
