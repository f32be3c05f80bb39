"""Training jobs as rows: how they are accepted, read, taken and cancelled.

    queued ─> preparing ─> running ─> evaluating ─> completed
       ^          └───────────┴────────────┴──────> failed | cancelled
       └── requeued when the host or the service ended

Between `claim` and its end, a job's row is written only through its `Lease`, or by whoever finds that the lease has
lapsed. `enter` is the one place where a status changes: along these arrows, with one event.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Row, Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from repertory.contracts import Hyperparameters
from repertory.data.conversations import Conversation
from repertory.errors import Conflict, ErrorInfo, InvalidInput, NotFound, RepertoryError
from repertory.service.datasets import Datasets
from repertory.service.quotas import Quotas
from repertory.service.store import Store, job_events, jobs, metrics, now, organisations

KIND = "train_"  # how the ids begin
COUNTS = "jobs that have not ended"  # by status, as a question to the store
FEW_CONVERSATIONS = 100  # below this a voice is seldom caught, and the job says so


class Status(StrEnum):
    QUEUED = "queued"  #: waits for its turn, or for a host
    PREPARING = "preparing"  #: a host has it and reads its conversations
    RUNNING = "running"  #: it learns
    EVALUATING = "evaluating"  #: the voice is measured against the base
    COMPLETED = "completed"  #: the version is published
    FAILED = "failed"  #: `error` says why and what to do
    CANCELLED = "cancelled"  #: stopped on request


ACTIVE = (Status.PREPARING, Status.RUNNING, Status.EVALUATING)  # some process holds the lease
_BY_STATUS = select(jobs.c.status, func.count()).group_by(jobs.c.status)
TERMINAL = (Status.COMPLETED, Status.FAILED, Status.CANCELLED)  # never left again
COMES_FROM: Mapping[Status, tuple[Status, ...]] = MappingProxyType(
    {
        Status.QUEUED: ACTIVE,  # or from nowhere: a new job
        Status.PREPARING: (Status.QUEUED,),
        Status.RUNNING: (Status.PREPARING,),
        Status.EVALUATING: (Status.PREPARING, Status.RUNNING),
        Status.COMPLETED: ACTIVE,
        Status.FAILED: (Status.QUEUED, *ACTIVE),
        Status.CANCELLED: (Status.QUEUED, *ACTIVE),
    }
)


class JobConfig(BaseModel):
    """What was asked for, frozen at the submit: later changes of the settings do not change a job half-way."""

    model_config = ConfigDict(frozen=True)

    hyperparameters: Hyperparameters  # the caller's, and where unset the operator's
    validation_split: float
    system_prompt: str | None = None
    continue_from: str | None = None  # training id of the version that the run goes on from
    publish_anyway: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    id: str
    org_id: str
    base_model: str
    config: JobConfig
    status: Status
    progress: float
    metadata: dict[str, Any]  # grows as the run tells its story
    error: ErrorInfo | None
    waiting_for: str | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    lease_epoch: int
    attempts: int
    cancel_requested: bool

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL

    @staticmethod
    def from_row(row: Row[Any]) -> Job:
        return Job(
            id=row.id,
            org_id=row.org_id,
            base_model=row.base_model,
            config=JobConfig.model_validate(row.config),
            status=Status(row.status),
            progress=row.progress,
            metadata=row.metadata,
            error=None if row.error is None else ErrorInfo.model_validate(row.error),
            waiting_for=row.waiting_for,
            created_at=row.created_at,
            started_at=row.started_at,
            completed_at=row.completed_at,
            lease_epoch=row.lease_epoch,
            attempts=row.attempts,
            cancel_requested=row.cancel_requested,
        )


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A validated request for a job."""

    org_id: str
    base_model: str
    config: JobConfig
    conversations: Sequence[Conversation] | None
    metadata: dict[str, Any]  # what the status shows from the start
    findings: Mapping[str, Any] = field(default_factory=dict)  # about `conversations`
    dataset_id: str | None = None  # whose conversations the job gets, in place of `conversations`
    request_hash: str  # sha256 of the request, to tell a repetition from another request under the same key
    idempotency_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """What happened to a job: a transition, or a warning."""

    seq: int  # 1, 2, 3 … within the job
    at: datetime
    kind: str  # the status entered, or "warning"
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """A sign of life of an active job. Whoever holds its lease makes `heartbeat` grow."""

    job_id: str
    lease_owner: str
    lease_epoch: int
    heartbeat: int


@dataclass(frozen=True, kw_only=True)
class Accepted:
    job: Job
    is_replay: bool  # an earlier request with the same idempotency key had made it


class Jobs:
    def __init__(self, store: Store, datasets: Datasets, quotas: Quotas) -> None:
        self._store = store
        self._datasets = datasets
        self._quotas = quotas

    def submit(self, submission: Submission) -> Accepted:
        """Once this returns, the job survives whatever happens to the process or the machine's power.

        Raises TooManyRequests where the organisation may not have it.
        """
        about = (submission.org_id, submission.idempotency_key, submission.request_hash)
        earlier = self.earlier(*about)
        if earlier is not None:
            return earlier
        self._quotas.check_models(submission.org_id)
        job_id = f"{KIND}{secrets.token_hex(8)}"
        if submission.conversations is not None:
            self._datasets.write_pending(submission.org_id, job_id, submission.conversations, submission.findings)
        else:
            assert submission.dataset_id is not None
            self._datasets.link_pending(submission.org_id, job_id, submission.dataset_id)
        try:
            self._quotas.check_datasets(submission.org_id, coming_bytes=0)  # with what was just written
            with self._store.write() as connection:
                self._quotas.admit(connection, submission.org_id)
                if not self._datasets.is_pending(submission.org_id, job_id):
                    raise Conflict("This organisation was deleted in this moment.", code="organisation_deleted")
                _insert_job(connection, job_id, submission)
                tell(connection, job_id, Status.QUEUED, {})
        except IntegrityError:
            self._datasets.discard_pending(submission.org_id, job_id)
            earlier = self.earlier(*about)  # the same request came twice at once, and the other one was faster
            if earlier is None:
                raise
            return earlier
        except RepertoryError:
            self._datasets.discard_pending(submission.org_id, job_id)
            raise
        self._datasets.conversations_path(submission.org_id, job_id)
        return Accepted(job=self.get(job_id), is_replay=False)

    def get(self, job_id: str, org_id: str | None = None) -> Job:
        """The job, if it is this organisation's (None: anybody's). Raises NotFound."""
        row = self._store.find(jobs, job_id, org_id)
        if row is None:
            raise NotFound(
                "There is no such training job.",
                code="training_not_found",
                cure="List the jobs of the organisation with GET /api/v1/training/jobs/{org_id}.",
                param="training_id",
            )
        return Job.from_row(row)

    def exists(self, job_id: str) -> bool:
        with self._store.read() as connection:
            return connection.execute(select(jobs.c.id).where(jobs.c.id == job_id)).one_or_none() is not None

    def events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        """Those with a greater `seq`, in order."""
        later = select(job_events).where(job_events.c.job_id == job_id, job_events.c.seq > after)
        with self._store.read() as connection:
            rows = connection.execute(later.order_by(job_events.c.seq)).all()
        return [JobEvent(seq=row.seq, at=row.at, kind=row.kind, data=row.data) for row in rows]

    def of_organisation(self, org_id: str) -> list[Job]:
        """Newest first."""
        newest_first = select(jobs).where(jobs.c.org_id == org_id).order_by(jobs.c.created_at.desc(), jobs.c.id.desc())
        with self._store.read() as connection:
            return [Job.from_row(row) for row in connection.execute(newest_first)]

    def queue(self) -> list[Job]:
        """The queued jobs in the order of their turns."""
        with self._store.read() as connection:
            return [Job.from_row(row) for row in connection.execute(_in_turn(select(jobs)))]

    def queue_positions(self) -> dict[str, int]:
        """Of each queued job; 1 is next."""
        with self._store.read() as connection:
            ids = connection.execute(_in_turn(select(jobs.c.id))).scalars().all()
        return {job_id: position for position, job_id in enumerate(ids, start=1)}

    def recorded_steps(self, job_id: str) -> int:
        """How many steps of its run have their metrics here: these, one after the other from the first."""
        with self._store.read() as connection:
            return connection.scalar(select(func.max(metrics.c.step)).where(metrics.c.job_id == job_id)) or 0

    def counts(self) -> dict[str, int]:
        """How many jobs are in each status that is not terminal."""
        return self._store.remembered(COUNTS, _counts)

    def are_counted(self) -> bool:
        """Whether `counts` knows it without a look into the database."""
        return self._store.remembers(COUNTS)

    def counts_of_all(self) -> dict[str, int]:
        """How many jobs are in each status."""
        with self._store.read() as connection:
            return _counted(connection, _BY_STATUS, tuple(Status))

    def tokens_per_second(self) -> float:
        """Of all runs that learn now together, each at its last step."""
        learning = select(jobs.c.metadata).where(jobs.c.status == Status.RUNNING)
        with self._store.read() as connection:
            speeds = [metadata.get("tokens_per_second") or 0.0 for metadata in connection.execute(learning).scalars()]
        return float(sum(speeds))

    def claim(self, job_id: str, owner: str, base_model: str | None = None) -> Job | None:
        """Take a queued job, or None if it is no longer there to be taken. Its new `lease_epoch` is the claim's.

        Raises Unavailable where the organisation may not run it now.

        `base_model` is its name with the commit, as far as that is known: a resumed run is on the same weights.
        """
        with self._store.write() as connection:
            taken = connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, jobs.c.status == Status.QUEUED, jobs.c.cancel_requested.is_(False))
                .values(
                    lease_epoch=jobs.c.lease_epoch + 1,
                    lease_owner=owner,
                    heartbeat=jobs.c.heartbeat + 1,
                    waiting_for=None,
                    base_model=func.coalesce(base_model, jobs.c.base_model),
                )
                .returning(jobs)
            ).one_or_none()
            if taken is None:
                return None
            connection.execute(
                update(organisations).where(organisations.c.org_id == taken.org_id).values(last_run_at=now())
            )  # which holds the organisation, so what it runs is counted once at a time
            self._quotas.check_turn(connection, taken.org_id, job_id)
            enter(connection, job_id, Status.PREPARING, started_at=taken.started_at or now())
            return Job.from_row(connection.execute(select(jobs).where(jobs.c.id == job_id)).one())

    def check_turn(self, job: Job) -> None:
        """Raises Unavailable with the reason why its organisation may not run it yet."""
        with self._store.read() as connection:
            self._quotas.check_turn(connection, job.org_id, job.id)

    def wait(self, job: Job, reason: str) -> None:
        """Say why a queued job does not run yet."""
        if job.waiting_for == reason:
            return
        with self._store.write() as connection:
            connection.execute(
                update(jobs).where(jobs.c.id == job.id, jobs.c.status == Status.QUEUED).values(waiting_for=reason)
            )

    def fail_queued(self, job_id: str, error: ErrorInfo) -> None:
        """End a job that no host can ever run."""
        with self._store.write() as connection:
            queued = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.status == Status.QUEUED).with_for_update()
            if connection.execute(queued).one_or_none() is not None:
                fail(connection, job_id, error)

    def cancel(self, job_id: str) -> Job:
        """Cancel a queued job at once; of an active one, ask that its run be stopped.

        Raises Conflict if the job has completed or failed. Cancelling a cancelled job changes nothing.
        """
        with self._store.write() as connection:
            found = connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update()).one_or_none()
            if found is not None and found.status == Status.QUEUED:
                enter(connection, job_id, Status.CANCELLED, cancel_requested=True)
            elif found is not None and found.status in ACTIVE:
                connection.execute(update(jobs).where(jobs.c.id == job_id).values(cancel_requested=True))
        job = self.get(job_id)
        if job.status in (Status.COMPLETED, Status.FAILED):
            raise Conflict(
                f"The job has {job.status} already and cannot be cancelled.",
                code="job_terminal",
                cure="Nothing is left to stop. A completed model stays until it is replaced by a newer one.",
                param="training_id",
            )
        return job

    def pulses(self) -> list[Pulse]:
        """Of all active jobs, whoever runs them."""
        active = select(jobs.c.id, jobs.c.lease_owner, jobs.c.lease_epoch, jobs.c.heartbeat)
        with self._store.read() as connection:
            rows = connection.execute(active.where(jobs.c.status.in_(ACTIVE))).all()
        return [
            Pulse(job_id=id, lease_owner=owner, lease_epoch=epoch, heartbeat=beat) for id, owner, epoch, beat in rows
        ]

    def take_back(self, last: Pulse, reason: str) -> Job | None:
        """End the lease of a job whose heart has not beaten since `last`: back into the queue, or cancelled if that
        was asked for. No attempt is burnt: the job is not to blame. None if it has beaten.
        """
        with self._store.write() as connection:
            same = (jobs.c.lease_epoch == last.lease_epoch) & (jobs.c.heartbeat == last.heartbeat)
            lapsed = select(jobs).where(jobs.c.id == last.job_id, same, jobs.c.status.in_(ACTIVE)).with_for_update()
            row = connection.execute(lapsed).one_or_none()
            if row is None:
                return None
            if row.cancel_requested:
                enter(connection, row.id, Status.CANCELLED, note={"reason": reason})
            else:
                requeue(connection, row.id, reason)
        return self.get(last.job_id)

    def sweep(self, *, is_alone: bool) -> int:
        """Remove what submits that never came to an answer have left on disk. Returns how many those were."""
        return self._datasets.sweep(KIND, self.exists, is_alone=is_alone)

    def recover(self) -> list[Job]:
        """At start, by a process that is alone on the database: every lease is of a process that is gone."""
        reason = "the service was restarted"
        return [job for pulse in self.pulses() if (job := self.take_back(pulse, reason)) is not None]

    def ended(self) -> list[Job]:
        """Those that nothing can go on with."""
        with self._store.read() as connection:
            return [Job.from_row(row) for row in connection.execute(select(jobs).where(jobs.c.status.in_(TERMINAL)))]

    def earlier(self, org_id: str, idempotency_key: str | None, request_hash: str) -> Accepted | None:
        """The job that an earlier request with the same idempotency key has made.

        Raises InvalidInput if that was another request.
        """
        if idempotency_key is None:
            return None
        with self._store.read() as connection:
            row = connection.execute(
                select(jobs).where(jobs.c.org_id == org_id, jobs.c.idempotency_key == idempotency_key)
            ).one_or_none()
        if row is None:
            return None
        if row.request_hash != request_hash:
            raise InvalidInput(
                "This Idempotency-Key was used with another request before.",
                code="idempotency_key_reused",
                cure="Use a new key for a new request, and the old one only to repeat the old request unchanged.",
                param="Idempotency-Key",
            )
        return Accepted(job=Job.from_row(row), is_replay=True)


def enter(
    connection: Connection, job_id: str, status: Status, *, note: dict[str, Any] | None = None, **values: Any
) -> None:
    """One transition: the row and its event, in one transaction. Whoever calls holds the row.

    Raises RuntimeError, and so takes the whole transaction back, where no arrow leads from the present status there.
    """
    if status in TERMINAL:
        values |= {"completed_at": now(), "lease_owner": None, "waiting_for": None}
    may_leave = jobs.c.status.in_(COMES_FROM[status])
    entered = connection.execute(update(jobs).where(jobs.c.id == job_id, may_leave).values(status=status, **values))
    if entered.rowcount != 1:
        raise RuntimeError(f"{job_id} cannot become {status}")
    tell(connection, job_id, status, note or {})


def fail(connection: Connection, job_id: str, error: ErrorInfo, **values: Any) -> None:
    about = error.model_dump(mode="json")
    enter(connection, job_id, Status.FAILED, note={"code": error.code, "message": error.message}, error=about, **values)


def requeue(connection: Connection, job_id: str, reason: str, **values: Any) -> None:
    enter(connection, job_id, Status.QUEUED, note={"reason": reason}, lease_owner=None, **values)


def tell(connection: Connection, job_id: str, kind: str, data: dict[str, Any]) -> None:
    """Add an event. Sequence numbers have no gaps because whoever calls holds the job's row."""
    last = select(func.coalesce(func.max(job_events.c.seq), 0)).where(job_events.c.job_id == job_id)
    seq = connection.execute(last).scalar_one() + 1
    connection.execute(insert(job_events).values(job_id=job_id, seq=seq, at=now(), kind=kind, data=data))


def _counts(connection: Connection) -> dict[str, int]:
    return _counted(connection, _BY_STATUS.where(jobs.c.status.not_in(TERMINAL)), (Status.QUEUED, *ACTIVE))


def _counted(connection: Connection, query: Select[Any], statuses: Sequence[Status]) -> dict[str, int]:
    found = {row[0]: row[1] for row in connection.execute(query)}
    return {status: found.get(status, 0) for status in statuses}


def request_hash(canonical_request: str) -> str:
    return hashlib.sha256(canonical_request.encode()).hexdigest()


def _in_turn(query: Select[Any]) -> Select[Any]:
    """Interrupted jobs first, since they have had their turn; then the organisation that ran least recently."""
    return (
        query.join(organisations, organisations.c.org_id == jobs.c.org_id)
        .where(jobs.c.status == Status.QUEUED)
        .order_by(
            jobs.c.started_at.is_(None),
            organisations.c.last_run_at.asc().nulls_first(),
            jobs.c.created_at,
            jobs.c.id,
        )
    )


def _insert_job(connection: Connection, job_id: str, submission: Submission) -> None:
    connection.execute(
        insert(jobs).values(
            id=job_id,
            org_id=submission.org_id,
            base_model=submission.base_model,
            config=submission.config.model_dump(mode="json", exclude_none=True),
            status=Status.QUEUED,
            progress=0.0,
            metadata=submission.metadata,
            created_at=now(),
            lease_epoch=0,
            heartbeat=0,
            attempts=0,
            cancel_requested=False,
            idempotency_key=submission.idempotency_key,
            request_hash=submission.request_hash,
        )
    )
