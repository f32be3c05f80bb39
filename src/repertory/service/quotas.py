"""What organisations have used of their limits, and what is therefore refused or has to wait."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from repertory.errors import JobFailed, TooManyRequests, Unavailable
from repertory.service.organisations import Organisations
from repertory.service.store import Store, jobs, now

DAY = timedelta(hours=24)
QUEUE_RETRY_SECONDS = 30.0  # when a job will leave the queue nobody knows
GIB = 1 << 30

IS_RUNNING = jobs.c.lease_owner.is_not(None)
IS_QUEUED = jobs.c.lease_owner.is_(None) & jobs.c.completed_at.is_(None)


class Quotas:
    def __init__(self, store: Store, organisations: Organisations, dataset_root: Path, model_root: Path) -> None:
        self._store = store
        self._organisations = organisations
        self._dataset_root = dataset_root
        self._model_root = model_root

    def check_datasets(self, org_id: str, coming_bytes: int = 1) -> None:
        """Raises TooManyRequests if there is no room for as many bytes more of exports and conversations."""
        limit_gb = self._organisations.limits(org_id).dataset_gb
        if limit_gb is not None:
            _check_bytes("exports and conversations", self._dataset_root / org_id, limit_gb, coming_bytes)

    def check_models(self, org_id: str) -> None:
        """Raises TooManyRequests if the voices fill their room. How large the next one will be nobody knows yet."""
        limit_gb = self._organisations.limits(org_id).model_gb
        if limit_gb is not None:
            _check_bytes("voices", self._model_root / org_id, limit_gb, 1)

    def admit(self, connection: Connection, org_id: str) -> None:
        """Within the transaction that puts a job into the queue. Raises TooManyRequests, or Conflict (see `hold`)."""
        limits = self._organisations.hold(connection, org_id)
        queued = _count(connection, org_id, IS_QUEUED)
        if limits.queued_jobs is not None and queued >= limits.queued_jobs:
            raise TooManyRequests(
                f"{queued} jobs of this organisation wait, and its limit is {limits.queued_jobs}.",
                code="queue_quota_exceeded",
                cure="Wait until one of them has left the queue, cancel one, or ask the operator for a higher limit.",
                retry_after_seconds=QUEUE_RETRY_SECONDS,
            )
        limit = limits.training_tokens_per_day
        if limit is None:
            return
        used = _trained_tokens(connection, org_id)
        if used >= limit:
            raise TooManyRequests(
                f"This organisation has trained on {used} tokens in 24 hours, and its limit is {limit}.",
                code="training_quota_exceeded",
                cure="Wait for the time in Retry-After, or ask the operator for a higher limit.",
                retry_after_seconds=_seconds_until_room(connection, org_id),
            )

    def check_turn(self, connection: Connection, org_id: str, training_id: str) -> None:
        """Raises Unavailable with the reason why a queued job of the organisation has to wait."""
        limits = self._organisations.limits_of(connection, org_id)
        running = _count(connection, org_id, IS_RUNNING & (jobs.c.id != training_id))
        if limits.running_jobs is not None and running >= limits.running_jobs:
            raise Unavailable(f"{limits.running_jobs} jobs of this organisation run, as many as its limit allows.")
        limit = limits.training_tokens_per_day
        if limit is not None and (used := _trained_tokens(connection, org_id)) >= limit:
            raise Unavailable(f"This organisation has trained on {used} tokens in 24 hours, and its limit is {limit}.")

    def check_run(self, connection: Connection, org_id: str, training_id: str, metadata: dict[str, Any]) -> None:
        """Once a run knows its tokens. Raises JobFailed if they are more than the organisation has left today."""
        limit = self._organisations.limits_of(connection, org_id).training_tokens_per_day
        if limit is None:
            return
        planned = _planned_tokens(metadata)
        used = _trained_tokens(connection, org_id, but=training_id)
        if used + planned > limit:
            raise JobFailed(
                f"This job would train on {planned} tokens. The organisation's limit is {limit} in 24 hours, of which"
                f" {used} are used.",
                code="training_quota_exceeded",
                cure="Train for fewer epochs or on fewer conversations, start it again tomorrow, or ask the operator"
                " for a higher limit.",
            )


def _count(connection: Connection, org_id: str, which: ColumnElement[bool]) -> int:
    counted = select(func.count()).select_from(jobs).where(jobs.c.org_id == org_id, which)
    return int(connection.execute(counted).scalar_one())


def _of_the_day(connection: Connection, org_id: str) -> list[Any]:
    """The jobs that began in the last 24 hours, oldest first."""
    of_the_day = jobs.c.started_at > now() - DAY
    columns = select(jobs.c.id, jobs.c.started_at, jobs.c.completed_at, jobs.c.metadata)
    found = columns.where(jobs.c.org_id == org_id, of_the_day).order_by(jobs.c.started_at)
    return list(connection.execute(found).all())


def _trained_tokens(connection: Connection, org_id: str, but: str | None = None) -> int:
    """What has ended counts as far as it came, what runs to its end."""
    return sum(
        _planned_tokens(row.metadata) if row.completed_at is None else _done_tokens(row.metadata)
        for row in _of_the_day(connection, org_id)
        if row.id != but
    )


def _planned_tokens(metadata: dict[str, Any]) -> int:
    epochs = metadata.get("hyperparameters", {}).get("num_train_epochs", 1)
    return int(metadata.get("training_tokens", 0) * epochs)


def _done_tokens(metadata: dict[str, Any]) -> int:
    return int(metadata.get("training_tokens", 0) * metadata.get("epoch", 0))


def _seconds_until_room(connection: Connection, org_id: str) -> float:
    """Until the first job that counts leaves the 24 hours."""
    counting = [row for row in _of_the_day(connection, org_id) if row.metadata.get("training_tokens")]
    return max(1.0, (counting[0].started_at + DAY - now()).total_seconds()) if counting else DAY.total_seconds()


def _check_bytes(what: str, folder: Path, limit_gb: float, coming_bytes: int) -> None:
    used = _bytes_in(folder)
    if used + coming_bytes > limit_gb * GIB:
        raise TooManyRequests(
            f"The {what} of this organisation take {used / GIB:.3f} GiB, and its limit is {limit_gb:g} GiB.",
            code="storage_quota_exceeded",
            cure="Delete what is no longer needed, or ask the operator for a higher limit.",
        )


def _bytes_in(folder: Path) -> int:
    """Each file once: a job on a dataset has its conversations under a second name."""
    sizes: dict[tuple[int, int], int] = {}
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                stat = (Path(where) / name).stat(follow_symlinks=False)
            except FileNotFoundError:  # deleted or renamed since
                continue
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())
