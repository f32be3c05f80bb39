"""Imports: exports that were sent, on their way to datasets that voices are trained on.

    queued ─> preparing ─> needs_persona | ready | failed
       ^                        │             │      │
       └───────────── prepare ──┴─────────────┴──────┘

Reading and preparing is done by processes of their own (`repertory.data.preparation.worker`), two at once and of one
organisation one, the organisation next whose turn is longest ago: neither a long export nor a hundred of them keep
others waiting. They die with the service, and the next start runs them again: nothing of a dataset is used before its
manifest verifies.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
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
from repertory.data.imports import ImportEvent, ImportOptions, ImportOrder, ImportSummary, TokenReport
from repertory.data.preparation.identity import hashed
from repertory.errors import Conflict, ErrorInfo, NotFound
from repertory.logs import without_text
from repertory.manifest import write_durably
from repertory.service.datasets import CONVERSATIONS, FORGET, PREPARED, Datasets
from repertory.service.jobs import TERMINAL
from repertory.service.models import Models
from repertory.service.organisations import Organisations
from repertory.service.store import IMPORTS_LOCK, NOT_NOW, Store, datasets, jobs, now, reason

log = structlog.get_logger()

WORKER = "repertory.data.preparation.worker"
KIND = "data_"  # how the ids begin
MAX_KNOWN_TOKENS = 1000  # datasets of which the lengths in tokens are remembered: measuring takes seconds
AT_ONCE = 2  # processes, each of one core at most and of 200 MB
RETRY_SECONDS = 1.0  # while the database takes no writes
LOOK_SECONDS = 1.0  # between two looks at what other services have accepted


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


@dataclass
class _Work:
    """A process that prepares, from its start to its end."""

    dataset: Dataset
    process: subprocess.Popen[bytes]
    progress: float = 0.0  # of the export, as read


class Imports:
    def __init__(self, store: Store, files: Datasets, models: Models, organisations: Organisations) -> None:
        self._organisations = organisations
        self._models = models
        self._tokens: dict[tuple[str, str], TokenReport] = {}
        self._store = store
        self._files = files
        # Between a row and its folder: accepted, deleted or taken up by a worker; and whoever changes these two.
        self._lock = threading.Lock()
        self._working: dict[str, _Work] = {}  # by dataset id
        self._turns: dict[str, int] = {}  # of organisations, as they come
        self._woken = threading.Condition(self._lock)
        self._has_begun = False
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._work, name="imports", daemon=True) for _ in range(AT_ONCE)]

    def start(self) -> None:
        """Of several services on one database one does the work of all, and another when that one is gone."""
        self._begin()
        for thread in self._threads:
            thread.start()

    def _begin(self) -> None:
        """Take up again what the end of the last process has cut off, once this one does the work."""
        if self._has_begun or not self._store.hold(IMPORTS_LOCK):
            return
        with self._store.write() as connection:
            connection.execute(
                update(datasets).where(datasets.c.status == Status.PREPARING).values(status=Status.QUEUED)
            )
            accepted = connection.execute(select(datasets.c.id, datasets.c.org_id)).all()
        settled = [(row.id, self._files.settle(row.org_id, row.id)) for row in accepted]
        cut_off = [dataset_id for dataset_id, folder in settled if (folder / FORGET).exists()]
        with self._store.write() as connection:
            connection.execute(update(datasets).where(datasets.c.id.in_(cut_off)).values(status=Status.QUEUED))
        self._files.sweep(KIND, {row.id for row in accepted}.__contains__, is_alone=not self._store.is_shared)
        self._has_begun = True

    def stop(self) -> None:
        """What is being prepared is prepared again at the next start."""
        with self._lock:
            self._stopping.set()
            for work in self._working.values():
                work.process.kill()
            self._woken.notify_all()
        for thread in self._threads:
            thread.join()

    def accept(self, org_id: str, dataset_id: str, file_name: str, file_bytes: int, options: ImportOptions) -> Dataset:
        """Take over an upload. Once this returns, it survives any end of the process and a power cut."""
        with self._lock:
            self._files.claim_upload(org_id, dataset_id)
            try:
                with self._store.write() as connection:
                    self._organisations.hold(connection, org_id)
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
            self._woken.notify()
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
        self._wake()
        return self.get(dataset_id, org_id)

    def get(self, dataset_id: str, org_id: str | None) -> Dataset:
        """The dataset, if it is this organisation's (None: anybody's). Raises NotFound."""
        row = self._store.find(datasets, dataset_id, org_id)
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
        work = self._working.get(dataset.id)
        return 1.0 if work is None else work.progress

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

    def unrecorded(self, org_id: str) -> list[str]:
        """The training ids of jobs that brought conversations without saying whose words are in them."""
        return self._files.unrecorded(org_id)

    def forget(self, org_id: str, author: str) -> tuple[dict[str, int], dict[str, int], list[str]]:
        """Delete an author's words from all of an organisation's datasets and from what its jobs were trained on.

        `author` is an id of the export. Returns what `with_words_of` did before, and the datasets that could never be
        read, of which nobody knows. The datasets are written anew by the worker, which goes on after any end of the
        process; the versions that learned from the words are marked. If this is cut off, the same call does the rest.
        Raises Conflict while a dataset is being prepared or a job on the words has not ended.
        """
        with self._lock:
            held = self.of_organisation(org_id)
            busy = next((dataset for dataset in held if dataset.status in BUSY), None)
            if busy is not None:
                raise _not_yet(busy)
            of_datasets, of_jobs = self.with_words_of(org_id, author)
            self._refuse_unended(of_jobs)
            spoken_in = [one for one in held if one.id in of_datasets or self._is_among_authors(one, author)]
            for dataset in spoken_in:
                folder = self._files.folder(org_id, dataset.id)
                write_durably(folder / FORGET, json.dumps([author]).encode())
            with self._store.write() as connection:
                ids = [dataset.id for dataset in spoken_in]
                connection.execute(update(datasets).where(datasets.c.id.in_(ids)).values(status=Status.QUEUED))
            for dataset in spoken_in:  # from here on no job can be started on it
                shutil.rmtree(self._files.folder(org_id, dataset.id) / PREPARED, ignore_errors=True)
            of_jobs |= self.with_words_of(org_id, author)[1]
            self._refuse_unended(of_jobs)
            self._models.mark(of_jobs, hashed(author, org_id))
            for training_id in of_jobs:
                self._files.forget(org_id, training_id, hashed(author, org_id))
            self._woken.notify_all()
        unread = [one.id for one in held if one not in spoken_in and self._read(one, "authors.json") is None]
        return {dataset.id: of_datasets.get(dataset.id, 0) for dataset in spoken_in}, of_jobs, unread

    def _refuse_unended(self, training_ids: Iterable[str]) -> None:
        with self._store.read() as connection:
            found = connection.execute(select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(training_ids))).all()
        ended = {row.id for row in found if row.status in TERMINAL}
        for training_id in sorted(set(training_ids) - ended):
            raise Conflict(
                f"The job {training_id} is learning from these words.",
                code="words_in_use",
                cure="Cancel it with DELETE /api/v1/training/jobs/{training_id}, or wait for its end; then ask again.",
                param="author",
            )

    def _is_among_authors(self, dataset: Dataset, author: str) -> bool:
        about = self._read(dataset, "authors.json")
        if about is None:
            return False
        listed = {one["id"] for one in about["authors"]}
        return author in listed or about["count"] > len(listed)  # of very many not all are listed

    def authors(self, dataset: Dataset) -> dict[str, Any]:
        """Who speaks in it. Raises Conflict until it is read."""
        about = self._read(dataset, "authors.json")
        if about is None:
            raise _not_yet(dataset)
        return about

    def report(self, dataset: Dataset) -> dict[str, Any] | None:
        """What each stage did; None until it is prepared."""
        return self._read(dataset, f"{PREPARED}/report.json") if dataset.status == Status.READY else None

    def known_tokens(self, dataset: Dataset, base_model: str) -> TokenReport | None:
        """What was measured of it since it was prepared last."""
        return self._tokens.get((self._prepared_at(dataset), base_model))

    def know_tokens(self, dataset: Dataset, base_model: str, measured: TokenReport) -> None:
        self._tokens[self._prepared_at(dataset), base_model] = measured
        while len(self._tokens) > MAX_KNOWN_TOKENS:
            del self._tokens[next(iter(self._tokens))]

    def _prepared_at(self, dataset: Dataset) -> str:
        try:
            return f"{dataset.id} {self.conversations_path(dataset).stat().st_mtime_ns}"
        except FileNotFoundError:
            return dataset.id

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
            work = self._working.get(dataset_id)
            if work is not None:
                work.process.kill()
                work.process.wait()  # nothing is written into the folder any more
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

    # The workers' threads

    def _wake(self) -> None:
        with self._lock:
            self._woken.notify()

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self._prepare_next()
            except Exception as error:  # a locked database, a full disk, a mistake of ours: the queue must go on later
                log.error("a look at the imports failed", **without_text(error))
                self._stopping.wait(RETRY_SECONDS)

    def _prepare_next(self) -> None:
        with self._lock:
            self._begin()
            dataset = self._claim() if self._has_begun else None
            if dataset is None:
                if not self._stopping.is_set():
                    self._woken.wait(LOOK_SECONDS if self._store.is_shared else None)
                return
            folder = self._files.folder(dataset.org_id, dataset.id)
            # Started by the thread that waits for it: the kernel ends it with that thread.
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # an order that nobody took must not be written once more when the pipe is closed
                process_group=0,
            )
            work = self._working[dataset.id] = _Work(dataset, process)
            self._turns[dataset.org_id] = max(self._turns.values(), default=0) + 1
        log.info("import starts", dataset_id=dataset.id, org_id=dataset.org_id, pid=process.pid)
        try:
            end = self._follow(work, ImportOrder(org_id=dataset.org_id, options=dataset.options))
        except Exception as error:  # a mistake of ours; the dataset must not stay as if somebody worked on it
            log.error("an import failed", dataset_id=dataset.id, **without_text(error))
            end = _died("what it told could not be read")
        if not self._stopping.is_set():  # else it is left as it is, for the next start
            self._finish(dataset, end)
        with self._lock:
            del self._working[dataset.id]
            self._woken.notify()  # the organisation's next one may have waited for this one

    def _claim(self) -> Dataset | None:
        """The oldest of the organisation whose turn is longest ago, and none of which is being prepared."""
        queued = select(datasets).where(datasets.c.status == Status.QUEUED)
        busy = [work.dataset.org_id for work in self._working.values()]
        with self._store.read() as connection:
            first_of = queued.where(datasets.c.org_id.not_in(busy)).order_by(datasets.c.created_at, datasets.c.id)
            rows = connection.execute(first_of).all()
        if not rows or self._stopping.is_set():
            return None
        row = min(rows, key=lambda row: self._turns.get(row.org_id, 0))  # of equal ones the first
        with self._store.write() as connection:
            still_queued = (datasets.c.id == row.id) & (datasets.c.status == Status.QUEUED)
            taken = connection.execute(update(datasets).where(still_queued).values(status=Status.PREPARING))
        return Dataset.from_row(row) if taken.rowcount else None

    def _follow(self, work: _Work, order: ImportOrder) -> ImportEvent:
        """Until it has ended. A process that does not say how is a failed import."""
        process = work.process
        assert process.stdin is not None
        assert process.stdout is not None
        end: ImportEvent | None = None
        with process:
            with suppress(BrokenPipeError):  # it has ended already; its exit status says how
                process.stdin.write(order.model_dump_json().encode() + b"\n")
            for event in _events(process):
                work.progress = event.progress
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
