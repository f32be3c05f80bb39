"""The right to write the story of one run.

A claim gives the job a new epoch. Every write here first takes the row where it still has that epoch and is active,
and is refused with `LeaseLost` otherwise: a run that somebody else has taken over can change nothing any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, delete, insert, update

from repertory.contracts import BaseKey, RunEvent
from repertory.errors import ErrorInfo
from repertory.service.jobs import ACTIVE, Job, Status, enter, fail, requeue, tell
from repertory.service.quotas import Quotas
from repertory.service.store import Store, jobs, metrics, model_versions, now, organisations

MAX_LOST_HOSTS = 3  # without a new checkpoint in between; then it is the job that kills them
HIGHEST_UNFINISHED_PROGRESS = 0.999  # only publishing makes it 1.0
ONLY_WHILE_RUNNING = ("phase", "eta_seconds")  # metadata that says nothing once the job has ended


class LeaseLost(Exception):
    """The job ended or was taken over; whoever still runs it must stop."""


class Lease:
    def __init__(self, store: Store, claimed: Job, quotas: Quotas | None = None) -> None:
        self._store = store
        self._quotas = quotas  # None: whatever the run turns out to be, it may be
        self._job_id = claimed.id
        self._epoch = claimed.lease_epoch

    def record(self, event: RunEvent) -> Job:
        """Write down one event that does not end the run. Returns the job as it now is.

        Raises JobFailed where the run turns out to be more than its organisation may train today.
        """
        data = _finite(event.data)
        with self._held() as (connection, job):
            metadata = dict(job.metadata)
            changes: dict[str, Any] = {"progress": max(job.progress, event.progress)}
            match event.kind:
                case "preparing":
                    metadata["phase"] = data.get("phase", "preparing")
                case "running":
                    # A resumed run begins at its checkpoint, which may lie behind where the lost one was.
                    changes["progress"] = event.progress
                    _forget_metrics_after(connection, job.id, data.get("resumed_from_step") or 0)
                    metadata |= data
                    metadata["phase"] = data.get("phase", "training")
                    if self._quotas is not None:
                        self._quotas.check_run(connection, job.org_id, job.id, metadata)
                    if job.status == Status.PREPARING:
                        enter(connection, job.id, Status.RUNNING)
                case "step":
                    _write_metrics(connection, job.id, data)
                    metadata |= data
                case "checkpoint":
                    if data["step"] > metadata.get("checkpoint_step", 0):
                        metadata["checkpoint_step"] = data["step"]
                        changes["attempts"] = 0
                case "evaluating":
                    metadata["phase"] = data.get("phase", "evaluating")
                    if job.status != Status.EVALUATING:
                        enter(connection, job.id, Status.EVALUATING)
                case _:
                    pass
            for warning in data.get("warnings", []):
                tell(connection, job.id, "warning", {"message": warning})
            metadata = _with_warnings(metadata | {"warnings": data.get("warnings", [])}, job.metadata)
            changes["progress"] = min(changes["progress"], HIGHEST_UNFINISHED_PROGRESS)
            row = connection.execute(
                update(jobs).where(jobs.c.id == job.id).values(metadata=metadata, **changes).returning(jobs)
            ).one()
            return Job.from_row(row)

    def publish(self, key: BaseKey, metadata: dict[str, Any]) -> None:
        """The end of a good run: its version is visible, promoted, and the job completed, all or nothing."""
        report = _finite(metadata)
        with self._held() as (connection, job):
            connection.execute(
                insert(model_versions).values(
                    training_id=job.id,
                    org_id=job.org_id,
                    created_at=now(),
                    **key.model_dump(),
                    metadata=report,
                )
            )
            connection.execute(
                update(organisations).where(organisations.c.org_id == job.org_id).values(promoted=job.id)
            )
            enter(
                connection,
                job.id,
                Status.COMPLETED,
                progress=1.0,
                metadata=_with_warnings(_settled(job.metadata) | report, job.metadata),
            )

    def fail(self, error: ErrorInfo) -> None:
        with self._held() as (connection, job):
            fail(connection, job.id, error, metadata=_settled(job.metadata))

    def host_lost(self, reason: str) -> None:
        """The run is gone without an end: the job goes back into the queue and will resume, unless it is hopeless."""
        with self._held() as (connection, job):
            if job.cancel_requested:
                _cancelled(connection, job)
            elif job.attempts + 1 >= MAX_LOST_HOSTS:
                error = ErrorInfo(
                    code="host_crashed",
                    message=f"The host was lost {MAX_LOST_HOSTS} times in a row during this job: {reason}.",
                    cure="Probably memory ran out: lower BATCH_SIZE or MAX_SEQ_LENGTH, set USE_4BIT=true or choose"
                    " a smaller base model. The service log shows the host's last words.",
                )
                fail(connection, job.id, error, metadata=_settled(job.metadata))
            else:
                requeue(connection, job.id, reason, attempts=job.attempts + 1)

    def give_back(self, reason: str) -> None:
        """The run was interrupted and keeps its checkpoint; it is not to blame."""
        with self._held() as (connection, job):
            if job.cancel_requested:
                _cancelled(connection, job)
            else:
                requeue(connection, job.id, reason)

    def pin(self, base_model: str) -> None:
        """The commit has become known; a run that is resumed is on the same weights."""
        with self._held() as (connection, job):
            connection.execute(update(jobs).where(jobs.c.id == job.id).values(base_model=base_model))

    def beat(self) -> Job:
        """A sign of life. Returns the job as it now is: somebody may want it cancelled."""
        with self._held() as (_, job):
            return job

    @contextmanager
    def _held(self) -> Iterator[tuple[Connection, Job]]:
        """A transaction that holds the job's row, or LeaseLost."""
        with self._store.write() as connection:
            row = connection.execute(
                update(jobs)
                .where(jobs.c.id == self._job_id, jobs.c.lease_epoch == self._epoch, jobs.c.status.in_(ACTIVE))
                .values(heartbeat=jobs.c.heartbeat + 1)
                .returning(jobs)
            ).one_or_none()
            if row is None:
                raise LeaseLost(self._job_id)
            yield connection, Job.from_row(row)


def _cancelled(connection: Connection, job: Job) -> None:
    enter(connection, job.id, Status.CANCELLED, metadata=_settled(job.metadata))


def _settled(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in ONLY_WHILE_RUNNING}


def _with_warnings(metadata: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Warnings gather, each once; they never replace one another."""
    warnings = [*earlier.get("warnings", []), *metadata.get("warnings", [])]
    return metadata | {"warnings": list(dict.fromkeys(warnings))}


def _write_metrics(connection: Connection, job_id: str, data: dict[str, Any]) -> None:
    step = data["step"]
    connection.execute(delete(metrics).where(metrics.c.job_id == job_id, metrics.c.step == step))
    connection.execute(insert(metrics).values(job_id=job_id, step=step, at=now(), data=data))


def _forget_metrics_after(connection: Connection, job_id: str, step: int) -> None:
    connection.execute(delete(metrics).where(metrics.c.job_id == job_id, metrics.c.step > step))


def _finite(value: Any) -> Any:
    """NaN and the infinities are no JSON: a database refuses them or stores something else."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
