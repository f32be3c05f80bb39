"""What each limit of an organisation refuses, or has wait."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from repertory.contracts import RunEvent
from repertory.errors import JobFailed, TooManyRequests, Unavailable
from repertory.service.datasets import Datasets
from repertory.service.jobs import Job, Jobs, Status
from repertory.service.lease import Lease
from repertory.service.organisations import Limits, Organisations
from repertory.service.quotas import GIB, Quotas
from repertory.service.store import Store, now
from repertory.service.store import jobs as table

from .conftest import submission

Submit = Callable[..., str]
Limit = Callable[..., None]


@pytest.fixture
def limit(organisations: Organisations) -> Limit:
    def limit(org_id: str = "org", **limits: Any) -> None:
        if org_id not in [one.org_id for one in organisations.list()]:
            organisations.create(org_id)
        organisations.set_limits(org_id, Limits(**limits))

    return limit


@pytest.fixture
def run(jobs: Jobs, store: Store, quotas: Quotas) -> Callable[[str], tuple[Job, Lease]]:
    """Claims a job."""

    def run(job_id: str) -> tuple[Job, Lease]:
        job = jobs.claim(job_id, "us")
        assert job is not None
        return job, Lease(store, job, quotas)

    return run


def begin(lease: Lease, tokens: int, epochs: int = 1) -> None:
    data = {"training_tokens": tokens, "hyperparameters": {"num_train_epochs": epochs}}
    lease.record(RunEvent(kind="running", progress=0.0, data=data))


def test_the_queue_of_an_organisation_has_an_end(jobs: Jobs, submit: Submit, limit: Limit, run: Any) -> None:
    limit(queued_jobs=2)
    first, _ = submit(), submit()
    with pytest.raises(TooManyRequests) as refused:
        submit()
    assert (refused.value.status, refused.value.code) == (429, "queue_quota_exceeded")
    assert refused.value.retry_after_seconds is not None
    submit("other")
    run(first)
    submit()  # one has left the queue
    assert len(jobs.of_organisation("org")) == 3


def test_what_was_refused_leaves_nothing(submit: Submit, limit: Limit, datasets: Datasets, tmp_path: Path) -> None:
    limit(queued_jobs=0)
    with pytest.raises(TooManyRequests):
        submit()
    assert list((tmp_path / "datasets/org").iterdir()) == []


def test_a_repeated_request_is_no_further_job(submit: Submit, limit: Limit) -> None:
    limit(queued_jobs=1)
    first = submit("org", "request", "key")
    assert submit("org", "request", "key") == first


def test_as_many_run_as_may_and_the_others_say_why_they_wait(
    jobs: Jobs, submit: Submit, limit: Limit, run: Any, store: Store
) -> None:
    limit(running_jobs=1)
    running, waiting = submit(), submit()
    _, lease = run(running)
    with pytest.raises(Unavailable, match="1 jobs of this organisation run"):
        jobs.check_turn(jobs.get(waiting))
    with pytest.raises(Unavailable):
        jobs.claim(waiting, "us")
    untouched = jobs.get(waiting)
    assert (untouched.status, untouched.lease_epoch) == (Status.QUEUED, 0)
    other = submit("other")
    jobs.check_turn(jobs.get(other))
    lease.fail(JobFailed("over").info)
    jobs.check_turn(jobs.get(waiting))
    assert jobs.claim(waiting, "us") is not None


def test_tokens_of_a_day_are_counted_with_their_epochs(submit: Submit, limit: Limit, run: Any, jobs: Jobs) -> None:
    limit(training_tokens_per_day=1000)
    first, second = submit(), submit()
    _, lease = run(first)
    begin(lease, tokens=500, epochs=2)
    with pytest.raises(TooManyRequests) as refused:
        submit()
    assert refused.value.code == "training_quota_exceeded"
    assert refused.value.retry_after_seconds == pytest.approx(86_400, abs=60)
    with pytest.raises(Unavailable, match="trained on 1000 tokens"):
        jobs.check_turn(jobs.get(second))


def test_a_run_that_ended_early_counts_as_far_as_it_came(submit: Submit, limit: Limit, run: Any, jobs: Jobs) -> None:
    limit(training_tokens_per_day=1000)
    _, lease = run(submit())
    begin(lease, tokens=500, epochs=2)
    lease.record(RunEvent(kind="step", progress=0.1, data={"step": 1, "epoch": 0.5}))
    lease.fail(JobFailed("over").info)
    _, next_lease = run(submit())
    begin(next_lease, tokens=750)  # 250 are used
    with pytest.raises(TooManyRequests):
        submit()


def test_a_run_that_is_too_large_for_the_day_fails_before_its_first_step(
    submit: Submit, limit: Limit, run: Any, jobs: Jobs
) -> None:
    limit(training_tokens_per_day=1000)
    job, lease = run(submit())
    with pytest.raises(JobFailed) as refused:
        begin(lease, tokens=501, epochs=2)
    assert refused.value.code == "training_quota_exceeded"
    assert "1002 tokens" in refused.value.message
    assert jobs.get(job.id).status == Status.PREPARING  # whoever follows the run writes its end


def test_yesterday_does_not_count(submit: Submit, limit: Limit, run: Any, store: Store) -> None:
    limit(training_tokens_per_day=1000)
    job, lease = run(submit())
    begin(lease, tokens=1000)
    with store.write() as connection:
        yesterday = now() - timedelta(hours=24, seconds=1)
        connection.execute(update(table).where(table.c.id == job.id).values(started_at=yesterday))
    submit()


def test_exports_and_conversations_fill_their_room(
    submit: Submit, limit: Limit, quotas: Quotas, tmp_path: Path
) -> None:
    first = submit()
    stored = sum(path.stat().st_size for path in (tmp_path / "datasets/org" / first).iterdir())
    limit(dataset_gb=stored * 2 / GIB)
    submit()
    with pytest.raises(TooManyRequests) as refused:
        submit()
    assert refused.value.code == "storage_quota_exceeded"
    assert len(list((tmp_path / "datasets/org").iterdir())) == 2
    with pytest.raises(TooManyRequests):
        quotas.check_datasets("org")
    quotas.check_datasets("org", 0)


def test_a_file_under_two_names_counts_once(limit: Limit, quotas: Quotas, tmp_path: Path) -> None:
    folder = tmp_path / "datasets/org/data_1"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"x" * 100)
    (folder / "b").hardlink_to(folder / "a")
    limit(dataset_gb=150 / GIB)
    quotas.check_datasets("org", 50)
    with pytest.raises(TooManyRequests):
        quotas.check_datasets("org", 51)


def test_voices_fill_their_room(submit: Submit, limit: Limit, tmp_path: Path) -> None:
    folder = tmp_path / "finetuned/org/train_1"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    limit(model_gb=101 / GIB)
    submit()
    limit(model_gb=100 / GIB)
    with pytest.raises(TooManyRequests) as refused:
        submit()
    assert refused.value.code == "storage_quota_exceeded"
    assert "voices" in refused.value.message


def test_everybodys_limit_holds_where_none_is_set(store: Store, datasets: Datasets, tmp_path: Path) -> None:
    everybody = Organisations(store, Limits(queued_jobs=1))
    jobs = Jobs(store, datasets, Quotas(store, everybody, tmp_path / "datasets", tmp_path / "finetuned"))
    jobs.submit(submission("org"))
    with pytest.raises(TooManyRequests):
        jobs.submit(submission("org"))
    everybody.set_limits("org", Limits(queued_jobs=None))
    jobs.submit(submission("org"))
