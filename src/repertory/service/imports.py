"""Imports: exports that were sent, on their way to datasets that voices are trained on.

    queued ─> preparing ─> needs_persona | ready | failed
       ^                        │             │      │
       └───────────── prepare ──┴─────────────┴──────┘

Reading and preparing is done by a process of its own (`repertory.data.preparation.worker`), one at a time. It dies with
the service, and the next start runs it again: nothing of a dataset is used before its manifest verifies.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Row, delete, insert, select, update

from repertory.data.conversations import Conversation
from repertory.data.imports import ImportEvent, ImportOptions, ImportOrder, ImportSummary
from repertory.data.preparation.identity import hashed
from repertory.errors import Conflict, ErrorInfo, NotFound
from repertory.logs import without_text
from repertory.service.datasets import CONVERSATIONS, PREPARED, Datasets
from repertory.service.store import NOT_NOW, Store, datasets, ensure_organisation, jobs, now, reason

log = structlog.get_logger()

WORKER = "repertory.data.preparation.worker"
KIND = "data_"  # how the ids begin
RETRY_SECONDS = 1.0  # while the database takes no writes


class Status(StrEnum):
    QUEUED = "queued"  #: waits for its turn
    PREPARING = "preparing"  #: is read and prepared
    NEEDS_PERSONA = "needs_persona"  #: read; somebody has to say whose voice it is
    READY = "ready"  #: can be trained on
    FAILED = "failed"  #: `error` says why and what to do


BUSY = (Status.QUEUED, Status.PREPARING)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    id: str
    org_id: str
    created_at: datetime
    status: Status
    file_name: str  # of the export, as it was sent
    file_bytes: int
    options: ImportOptions
    summary: ImportSummary | None
    error: ErrorInfo | None

    @staticmethod
    def from_row(row: Row[Any]) -> Dataset:
        return Dataset(
            id=row.id,
            org_id=row.org_id,
            created_at=row.created_at,
            status=Status(row.status),
            file_name=row.file_name,
            file_bytes=row.file_bytes,
            options=ImportOptions.model_validate(row.options),
            summary=None if row.summary is None else ImportSummary.model_validate(row.summary),
            error=None if row.error is None else ErrorInfo.model_validate(row.error),
        )


class Imports:
    def __init__(self, store: Store, files: Datasets) -> None:
        self._store = store
        self._files = files
        self._lock = threading.Lock()  # between a row and its folder: accepted, deleted or taken up by the worker
        self._working_on: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._progress = 0.0
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._work, name="imports", daemon=True)

    def start(self) -> None:
        """Take up again what the end of the last process has cut off."""
        with self._store.write() as connection:
            connection.execute(
                update(datasets).where(datasets.c.status == Status.PREPARING).values(status=Status.QUEUED)
            )
            accepted = connection.execute(select(datasets.c.id, datasets.c.org_id)).all()
        for row in accepted:
            self._files.settle(row.org_id, row.id)
        self._files.sweep(KIND, {row.id for row in accepted}.__contains__)
        self._thread.start()

    def stop(self) -> None:
        """What is being prepared is prepared again at the next start."""
        with self._lock:
            self._stopping.set()
            if self._process is not None:
                self._process.kill()
        self._woken.set()
        self._thread.join()

    def accept(self, org_id: str, dataset_id: str, file_name: str, file_bytes: int, options: ImportOptions) -> Dataset:
        """Take over an upload. Once this returns, it survives any end of the process and a power cut."""
        with self._lock:
            self._files.claim_upload(org_id, dataset_id)
            try:
                with self._store.write() as connection:
                    ensure_organisation(connection, org_id)
                    connection.execute(
                        insert(datasets).values(
                            id=dataset_id,
                            org_id=org_id,
                            created_at=now(),
                            status=Status.QUEUED,
                            file_name=file_name,
                            file_bytes=file_bytes,
                            options=options.model_dump(mode="json", exclude_defaults=True),
                        )
                    )
            except Exception:
                self._files.discard_pending(org_id, dataset_id)
                raise
            self._files.settle(org_id, dataset_id)
        self._woken.set()
        return self.get(dataset_id, org_id)

    def prepare(self, dataset_id: str, org_id: str | None, options: ImportOptions) -> Dataset:
        """Prepare it (again) with these options. Raises Conflict while it is being prepared."""
        dataset = self.get(dataset_id, org_id)
        with self._store.write() as connection:
            changed = connection.execute(
                update(datasets)
                .where(datasets.c.id == dataset_id, datasets.c.status.not_in(BUSY))
                .values(
                    status=Status.QUEUED, options=options.model_dump(mode="json", exclude_defaults=True), error=None
                )
            )
        if not changed.rowcount:
            raise _not_yet(dataset)
        self._woken.set()
        return self.get(dataset_id, org_id)

    def get(self, dataset_id: str, org_id: str | None) -> Dataset:
        """The dataset, if it is this organisation's (None: anybody's). Raises NotFound."""
        wanted = select(datasets).where(datasets.c.id == dataset_id)
        if org_id is not None:
            wanted = wanted.where(datasets.c.org_id == org_id)
        with self._store.read() as connection:
            row = connection.execute(wanted).one_or_none()
        if row is None:
            raise NotFound(
                "There is no such dataset.",
                code="dataset_not_found",
                cure="List the datasets of the organisation with GET /api/v1/datasets?org_id=….",
                param="dataset_id",
            )
        return Dataset.from_row(row)

    def ready(self, dataset_id: str, org_id: str | None) -> tuple[Dataset, ImportSummary]:
        """The dataset and what it came to, if it can be trained on. Raises Conflict if it cannot, saying why."""
        dataset = self.get(dataset_id, org_id)
        if dataset.status != Status.READY or dataset.summary is None:
            raise _not_yet(dataset)
        return dataset, dataset.summary

    def of_organisation(self, org_id: str) -> list[Dataset]:
        """Newest first."""
        newest_first = (
            select(datasets)
            .where(datasets.c.org_id == org_id)
            .order_by(datasets.c.created_at.desc(), datasets.c.id.desc())
        )
        with self._store.read() as connection:
            return [Dataset.from_row(row) for row in connection.execute(newest_first)]

    def progress(self, dataset: Dataset) -> float:
        """How much of the export is read, 0 to 1."""
        if dataset.status == Status.QUEUED:
            return 0.0
        return self._progress if dataset.id == self._working_on else 1.0

    def trained(self, dataset: Dataset) -> list[str]:
        """The training ids of the jobs that were started on it, oldest first."""
        on_it = select(jobs.c.id).where(
            jobs.c.org_id == dataset.org_id, jobs.c.metadata["dataset_id"].as_string() == dataset.id
        )
        with self._store.read() as connection:
            return list(connection.execute(on_it.order_by(jobs.c.created_at, jobs.c.id)).scalars())

    def with_words_of(self, org_id: str, author: str) -> tuple[dict[str, int], dict[str, int]]:
        """In which datasets and in which jobs' conversations of the organisation there are words of an author.

        `author` is an id of the export. Of each: in how many conversations. Jobs are found after their dataset is gone.
        """
        found = self._files.with_words_of(org_id, hashed(author, org_id))
        of_datasets = {name: count for name, count in found.items() if name.startswith(KIND)}
        return of_datasets, {name: count for name, count in found.items() if name not in of_datasets}

    def authors(self, dataset: Dataset) -> dict[str, Any]:
        """Who speaks in it. Raises Conflict until it is read."""
        about = self._read(dataset, "authors.json")
        if about is None:
            raise _not_yet(dataset)
        return about

    def report(self, dataset: Dataset) -> dict[str, Any] | None:
        """What each stage did; None until it is prepared."""
        return self._read(dataset, f"{PREPARED}/report.json") if dataset.status == Status.READY else None

    def conversations(self, dataset: Dataset, count: int) -> list[Conversation]:
        """Some of them, evenly spread."""
        _, summary = self.ready(dataset.id, dataset.org_id)
        path = self.conversations_path(dataset)
        step = max(1, (summary.conversations or 1) // count)
        try:
            with path.open(encoding="utf-8") as lines:
                return [Conversation.model_validate_json(line) for line in islice(lines, 0, step * count, step)]
        except FileNotFoundError:  # deleted, or prepared again, since
            raise _not_yet(self.get(dataset.id, dataset.org_id)) from None

    def conversations_path(self, dataset: Dataset) -> Path:
        return self._files.folder(dataset.org_id, dataset.id) / PREPARED / CONVERSATIONS

    def delete(self, dataset_id: str, org_id: str | None) -> None:
        """Remove the export and everything made of it. Jobs that were started on it keep their conversations."""
        with self._lock:
            dataset = self.get(dataset_id, org_id)
            if self._working_on == dataset_id and self._process is not None:
                self._process.kill()
                self._process.wait()  # nothing is written into the folder any more
            self._files.withdraw(dataset.org_id, dataset_id)
            with self._store.write() as connection:
                connection.execute(delete(datasets).where(datasets.c.id == dataset_id))
        self._files.discard_pending(dataset.org_id, dataset_id)

    def _read(self, dataset: Dataset, name: str) -> dict[str, Any] | None:
        try:
            content = (self._files.folder(dataset.org_id, dataset.id) / name).read_bytes()
        except FileNotFoundError:
            return None
        return dict(json.loads(content))

    # The worker's thread

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                while not self._stopping.is_set() and self._prepare_next():
                    pass
            except Exception as error:  # a locked database, a full disk, a mistake of ours: the queue must go on later
                log.error("a look at the imports failed", **without_text(error))
                self._stopping.wait(RETRY_SECONDS)
                continue
            self._woken.wait()

    def _prepare_next(self) -> bool:
        with self._lock:
            dataset = self._claim()
            if dataset is None:
                return False
            folder = self._files.folder(dataset.org_id, dataset.id)
            # Started by the thread that waits for it: the kernel ends it with that thread.
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # an order that nobody took must not be written once more when the pipe is closed
                process_group=0,
            )
            self._process, self._working_on, self._progress = process, dataset.id, 0.0
        log.info("import starts", dataset_id=dataset.id, org_id=dataset.org_id, pid=process.pid)
        try:
            end = self._follow(process, ImportOrder(org_id=dataset.org_id, options=dataset.options))
        except Exception as error:  # a mistake of ours; the dataset must not stay as if somebody worked on it
            log.error("an import failed", dataset_id=dataset.id, **without_text(error))
            end = _died("what it told could not be read")
        with self._lock:
            self._process = self._working_on = None
        if not self._stopping.is_set():  # else it is left as it is, for the next start
            self._finish(dataset, end)
        return True

    def _claim(self) -> Dataset | None:
        queued = select(datasets).where(datasets.c.status == Status.QUEUED)
        with self._store.read() as connection:
            row = connection.execute(queued.order_by(datasets.c.created_at, datasets.c.id).limit(1)).one_or_none()
        if row is None or self._stopping.is_set():
            return None
        with self._store.write() as connection:
            connection.execute(update(datasets).where(datasets.c.id == row.id).values(status=Status.PREPARING))
        return Dataset.from_row(row)

    def _follow(self, process: subprocess.Popen[bytes], order: ImportOrder) -> ImportEvent:
        """Until it has ended. A process that does not say how is a failed import."""
        assert process.stdin is not None
        assert process.stdout is not None
        end: ImportEvent | None = None
        with process:
            with suppress(BrokenPipeError):  # it has ended already; its exit status says how
                process.stdin.write(order.model_dump_json().encode() + b"\n")
            for event in _events(process):
                self._progress = event.progress
                if event.is_end:
                    end = event
            code = process.wait()
        if code == 0 and end is not None:
            return end
        return _died(f"killed by signal {-code}" if code < 0 else f"exit status {code}")

    def _finish(self, dataset: Dataset, end: ImportEvent) -> None:
        """Nothing changes where the dataset was deleted in the meantime."""
        log.info("import ended", dataset_id=dataset.id, status=end.status, code=end.error.code if end.error else None)
        values = {
            "status": end.status,
            "summary": None if end.summary is None else end.summary.model_dump(mode="json"),
            "error": None if end.error is None else end.error.model_dump(mode="json"),
        }
        preparing = (datasets.c.id == dataset.id) & (datasets.c.status == Status.PREPARING)
        while not self._stopping.is_set():
            try:
                with self._store.write() as connection:
                    connection.execute(update(datasets).where(preparing).values(**values))
                return
            except NOT_NOW as error:
                log.error("the database takes no writes", dataset_id=dataset.id, reason=reason(error))
                self._stopping.wait(RETRY_SECONDS)


def new_id() -> str:
    return f"{KIND}{secrets.token_hex(8)}"


def _events(process: subprocess.Popen[bytes]) -> Iterator[ImportEvent]:
    assert process.stdout is not None
    for line in process.stdout:
        if not line.endswith(b"\n"):
            return  # its last word was cut off
        yield ImportEvent.model_validate_json(line)


def _died(how: str) -> ImportEvent:
    error = ErrorInfo(
        code="preparation_died",
        message=f"The process that read and prepared this export ended unexpectedly ({how}).",
        cure="Most often memory is short: import a part of the history. The service log shows its last words."
        " POST /api/v1/datasets/{dataset_id}/prepare tries it again.",
    )
    return ImportEvent(status="failed", error=error)


def _not_yet(dataset: Dataset) -> Conflict:
    cures = {
        Status.NEEDS_PERSONA: "Choose one from GET /api/v1/datasets/{dataset_id}/authors, and send it to"
        " POST /api/v1/datasets/{dataset_id}/prepare.",
        Status.FAILED: "GET /api/v1/datasets/{dataset_id} says why.",
    }
    return Conflict(
        f"The dataset is {dataset.status.replace('_', ' ')}.",
        code="dataset_not_ready",
        cure=cures.get(dataset.status, "Wait until GET /api/v1/datasets/{dataset_id} has another status."),
        param="dataset_id",
    )
