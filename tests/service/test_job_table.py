"""A state machine over the job table: whatever happens in whatever order, the invariants hold, and SQLite and
PostgreSQL come through the same trace to the same states.

Two service processes share the table. Each may claim, follow, lose hosts and die; the survivor takes back what the dead
one held. The rules call what the processes call; a small model in plain Python says what must come of it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, text

from postgresql import Postgresql
from repertory.contracts import BaseKey, RunEvent
from repertory.errors import Conflict, ErrorInfo, InvalidInput
from repertory.service.datasets import Datasets
from repertory.service.heartbeats import HEARTBEAT_SECONDS, LEASE_SECONDS, Heartbeats
from repertory.service.jobs import ACTIVE, COMES_FROM, TERMINAL, Jobs, Pulse, Status
from repertory.service.lease import MAX_LOST_HOSTS, Lease, LeaseLost
from repertory.service.store import Store, jobs, metrics, model_versions
from unlimited import unlimited

from .conftest import submission

KEY = BaseKey(base_model="fake/base", quantization="none", dtype="fp32")
ERROR = ErrorInfo(code="some_code", message="Something.", cure="Do something.")
SERVICES = ["one", "two"]


@dataclass(eq=False)
class Side:
    """One database, with the ids that its jobs got."""

    store: Store
    jobs: Jobs
    ids: list[str] = field(default_factory=list)

    def number(self, job_id: str) -> int:
        return self.ids.index(job_id)

    def lease(self, number: int, epoch: int) -> Lease:
        job = self.jobs.get(self.ids[number])
        return Lease(self.store, replace(job, lease_epoch=epoch))


@dataclass(eq=False)
class Expected:
    """What the model knows of a job."""

    org_id: str
    status: Status = Status.QUEUED
    epoch: int = 0
    owner: str | None = None
    cancel_requested: bool = False
    attempts: int = 0
    checkpoint: int = 0
    step: int = 0
    metrics: set[int] = field(default_factory=set)
    story: list[str] = field(default_factory=lambda: ["queued"])

    def enter(self, status: Status) -> None:
        assert self.status in COMES_FROM[status]
        self.status = status
        self.story.append(status)
        if status not in ACTIVE:
            self.owner = None

    def back(self) -> None:
        self.enter(Status.CANCELLED if self.cancel_requested else Status.QUEUED)


class JobTable(RuleBasedStateMachine):
    sides: ClassVar[list[Side]]  # emptied before each trace

    claims = Bundle("claims")  # (job, epoch) of every claim that was ever made, also of those that lapsed

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[Expected] = []
        self.last_run: dict[str, int] = {}  # by the number of claims until then
        self.now = 0.0
        self.hearts = [Heartbeats(lambda: self.now) for _ in self.sides]

    def both(self, act: Callable[[Side], Any]) -> Any:
        """The one answer of both databases."""
        answers = [_answer(side, act) for side in self.sides]
        assert all(answer == answers[0] for answer in answers), answers
        return answers[0]

    # What may happen

    @rule(org_id=st.sampled_from("abc"), key=st.none() | st.sampled_from(["k1", "k2"]), request=st.sampled_from("xy"))
    def submit(self, org_id: str, key: str | None, request: str) -> None:
        def act(side: Side) -> tuple[bool, int]:
            accepted = side.jobs.submit(submission(org_id, request, key))
            if not accepted.is_replay:
                side.ids.append(accepted.job.id)
            return accepted.is_replay, side.number(accepted.job.id)

        answer = self.both(act)
        if isinstance(answer, tuple) and not answer[0]:
            assert answer[1] == len(self.expected)
            self.expected.append(Expected(org_id))

    @rule(target=claims, data=st.data(), service=st.sampled_from(SERVICES))
    def claim(self, data: st.DataObject, service: str) -> tuple[int, int]:
        number = self._any_job(data)
        if number is None:
            return (0, 0)
        job = self.expected[number]
        won = self.both(lambda side: (found := side.jobs.claim(side.ids[number], service)) and found.lease_epoch)
        assert (won is not None) == (job.status == Status.QUEUED)
        if won is not None:
            job.enter(Status.PREPARING)
            job.epoch, job.owner = won, service
            self.last_run[job.org_id] = sum(one.epoch for one in self.expected)
        return (number, job.epoch)

    @rule(claim=claims, kind=st.sampled_from(["running", "step", "checkpoint", "evaluating", "heartbeat"]))
    def hear(self, claim: tuple[int, int], kind: Any) -> None:
        """The host tells something of its run, to whoever follows it: also to one that lost its lease."""
        job, is_held = self._held(claim)
        if not self.expected:
            return
        data: dict[str, Any] = {}
        if kind == "running" and job.checkpoint:
            data = {"resumed_from_step": job.checkpoint}
        if kind == "step":
            data = {"step": job.step + 1, "loss": 1.0}
        if kind == "checkpoint":
            data = {"step": job.step}
        event = RunEvent(kind=kind, progress=0.5, data=data)
        assert self._write(claim, lambda lease: bool(lease.record(event))) == is_held
        if not is_held:
            return
        if kind == "running":
            job.step = job.checkpoint
            job.metrics = {step for step in job.metrics if step <= job.checkpoint}
            if job.status == Status.PREPARING:
                job.enter(Status.RUNNING)
        if kind == "step":
            job.step += 1
            job.metrics.add(job.step)
        if kind == "checkpoint" and job.step > job.checkpoint:
            job.checkpoint, job.attempts = job.step, 0
        if kind == "evaluating" and job.status != Status.EVALUATING:
            job.enter(Status.EVALUATING)

    @rule(claim=claims)
    def complete(self, claim: tuple[int, int]) -> None:
        job, is_held = self._held(claim)
        assert self._write(claim, lambda lease: lease.publish(KEY, {}) is None) == is_held
        if is_held:
            job.enter(Status.COMPLETED)

    @rule(claim=claims)
    def fail(self, claim: tuple[int, int]) -> None:
        job, is_held = self._held(claim)
        assert self._write(claim, lambda lease: lease.fail(ERROR) is None) == is_held
        if is_held:
            job.enter(Status.FAILED)

    @rule(claim=claims)
    def lose_the_host(self, claim: tuple[int, int]) -> None:
        job, is_held = self._held(claim)
        assert self._write(claim, lambda lease: lease.host_lost("gone") is None) == is_held
        if not is_held:
            return
        if not job.cancel_requested and job.attempts + 1 >= MAX_LOST_HOSTS:
            job.enter(Status.FAILED)
            return
        job.attempts += not job.cancel_requested
        job.back()

    @rule(claim=claims)
    def interrupt(self, claim: tuple[int, int]) -> None:
        job, is_held = self._held(claim)
        assert self._write(claim, lambda lease: lease.give_back("stopped") is None) == is_held
        if is_held:
            job.back()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = self._any_job(data)
        if number is None:
            return
        job = self.expected[number]
        answer = self.both(lambda side: side.jobs.cancel(side.ids[number]).status)
        if job.status not in TERMINAL:
            job.cancel_requested = True
        if job.status == Status.QUEUED:
            job.enter(Status.CANCELLED)
        assert answer == ("job_terminal" if job.status in (Status.COMPLETED, Status.FAILED) else job.status)

    @rule(dead=st.sets(st.sampled_from(SERVICES)))
    def time_passes(self, dead: set[str]) -> None:
        """The dead do not beat, and whoever still looks takes back what they held; all of it, and nothing else."""
        taken: set[int] = set()
        for _ in range(int(LEASE_SECONDS / HEARTBEAT_SECONDS) + 1):
            self.now += HEARTBEAT_SECONDS
            for number, job in enumerate(self.expected):
                if job.owner is not None and job.owner not in dead:
                    assert self._write((number, job.epoch), lambda lease: lease.beat() is not None)
            taken |= set(self.both(self._take_back))
        assert taken == {number for number, job in enumerate(self.expected) if job.owner in dead}
        for number in taken:
            self.expected[number].back()

    @rule()
    def restart_alone(self) -> None:
        """As a service on SQLite does at its start: it knows that nobody else is there."""
        self.both(lambda side: sorted(side.number(job.id) for job in side.jobs.recover()))
        for job in self.expected:
            if job.status in ACTIVE:
                job.back()

    # What must always be true

    @invariant()
    def rows_are_as_expected(self) -> None:
        assert self.both(_rows) == [
            (job.org_id, job.status, job.epoch, job.owner, job.cancel_requested, job.attempts) for job in self.expected
        ]

    @invariant()
    def each_transition_is_one_event(self) -> None:
        def stories(side: Side) -> list[list[tuple[int, str]]]:
            return [[(event.seq, event.kind) for event in side.jobs.events(job_id)] for job_id in side.ids]

        assert self.both(stories) == [list(enumerate(job.story, 1)) for job in self.expected]

    @invariant()
    def nothing_follows_an_end(self) -> None:
        for job in self.expected:
            assert not set(job.story[:-1]) & set(TERMINAL)

    @invariant()
    def each_metric_step_is_there_once(self) -> None:
        def steps(side: Side) -> list[list[int]]:
            with side.store.read() as connection:
                rows = connection.execute(select(metrics.c.job_id, metrics.c.step).order_by(metrics.c.step)).all()
            return [[step for job_id, step in rows if job_id == wanted] for wanted in side.ids]

        assert self.both(steps) == [sorted(job.metrics) for job in self.expected]

    @invariant()
    def versions_are_of_completed_jobs(self) -> None:
        def versions(side: Side) -> list[int]:
            with side.store.read() as connection:
                published = connection.execute(select(model_versions.c.training_id)).scalars().all()
            return sorted(side.number(training_id) for training_id in published)

        completed = [number for number, job in enumerate(self.expected) if job.status == Status.COMPLETED]
        assert self.both(versions) == completed

    @invariant()
    def who_ran_least_recently_is_next(self) -> None:
        """After what was interrupted: that has had its turn."""
        queued = [number for number, job in enumerate(self.expected) if job.status == Status.QUEUED]

        def turn(number: int) -> tuple[bool, int, int]:
            job = self.expected[number]
            return job.epoch == 0, self.last_run.get(job.org_id, 0), number

        assert self.both(lambda side: [side.number(job.id) for job in side.jobs.queue()]) == sorted(queued, key=turn)

    # With both sides

    def _any_job(self, data: st.DataObject) -> int | None:
        if not self.expected:
            return None
        return data.draw(st.integers(0, len(self.expected) - 1))

    def _held(self, claim: tuple[int, int]) -> tuple[Expected, bool]:
        number, epoch = claim
        if not self.expected:
            return Expected("none"), False
        job = self.expected[number]
        return job, epoch == job.epoch and job.status in ACTIVE

    def _write(self, claim: tuple[int, int], write: Callable[[Lease], bool]) -> bool:
        """Whether the lease of that claim could still write."""
        number, epoch = claim
        if not self.expected:
            return False
        return self.both(lambda side: write(side.lease(number, epoch))) is True

    def _take_back(self, side: Side) -> list[int]:
        heartbeats = self.hearts[self.sides.index(side)]
        lapsed: list[Pulse] = heartbeats.lapsed(side.jobs.pulses())
        found = [side.jobs.take_back(pulse, "lost") for pulse in lapsed]
        return sorted(side.number(job.id) for job in found if job is not None)


def _rows(side: Side) -> list[tuple[Any, ...]]:
    with side.store.read() as connection:
        rows = {row.id: row for row in connection.execute(select(jobs))}
    return [
        (row.org_id, row.status, row.lease_epoch, row.lease_owner, row.cancel_requested, row.attempts)
        for row in (rows[job_id] for job_id in side.ids)
    ]


def _answer(side: Side, act: Callable[[Side], Any]) -> Any:
    """What it returns, or the name of what it raises."""
    try:
        return act(side)
    except (Conflict, InvalidInput) as refused:
        return refused.code
    except LeaseLost:
        return "lease lost"


@pytest.fixture(scope="module")
def sides(postgresql_server: Postgresql) -> Iterator[list[Side]]:
    folder = Path(tempfile.mkdtemp())
    url = postgresql_server.new()
    made = []
    for at, database_url in enumerate([f"sqlite:///{folder}/repertory.db", url]):
        store = Store(database_url)
        store.migrate()
        made.append(Side(store, Jobs(store, Datasets(folder / f"datasets-{at}"), unlimited(store))))
    yield made
    for side in made:
        side.store.close()
    postgresql_server.drop(url)
    shutil.rmtree(folder)


def _emptied(side: Side) -> Side:
    with side.store.write() as connection:
        for table in ("metrics", "job_events", "model_versions", "jobs", "organisations"):
            connection.execute(text(f"DELETE FROM {table}"))
    return Side(side.store, side.jobs)


def _explore(sides: list[Side], examples: int, steps: int) -> None:
    class Explored(JobTable):
        def __init__(self) -> None:
            type(self).sides = [_emptied(side) for side in sides]
            super().__init__()

    run_state_machine_as_test(
        Explored,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_both_databases_come_through_the_same_trace_to_the_same_states(sides: list[Side]) -> None:
    _explore(sides, examples=5, steps=20)


@pytest.mark.slow
def test_so_they_do_through_many_traces(sides: list[Side]) -> None:
    _explore(sides, examples=60, steps=50)
