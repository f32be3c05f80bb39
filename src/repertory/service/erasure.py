"""The deletion of organisations: rows, files, slots and caches.

It is asked for in the organisation's row. From then on its keys are refused and nothing new is accepted; what runs is
cancelled, then everything goes, the row last. So a deletion that is cut off goes on at the next start.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import structlog
from sqlalchemy import delete, select, update

from repertory.contracts import Forgetting
from repertory.errors import Conflict, Unavailable
from repertory.logs import without_text
from repertory.service.hosts import Hosts
from repertory.service.imports import Imports
from repertory.service.jobs import Job, Jobs
from repertory.service.keys import organisation_not_found
from repertory.service.models import Models
from repertory.service.store import (
    NOT_NOW,
    Store,
    api_keys,
    jobs,
    model_versions,
    now,
    organisations,
    reason,
    tables,
)

log = structlog.get_logger()

HUSK: dict[str, Any] = {"org_id": None, "name": "", "scopes": [], "digest": "", "last_used_at": None}
LOOK_SECONDS = 1.0  # between two looks at what is asked for, also by another process
WAIT_SECONDS = 60.0
WAIT_LOOK_SECONDS = 0.05


class Erasure:
    def __init__(
        self,
        store: Store,
        jobs: Jobs,
        imports: Imports,
        models: Models,
        hosts: Hosts,
        cancel: Callable[[str], Job],
        roots: tuple[Path, ...],
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._imports = imports
        self._models = models
        self._hosts = hosts
        self._cancel = cancel  # returns when the run has really stopped
        self._roots = roots  # each has a folder of the organisation
        self._erased: str | None = None  # whose turn it is
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._work, name="erasure", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more. What the end of dispatcher and hosts cuts off goes on at the next start."""
        self._stopping.set()
        self._woken.set()

    def join(self) -> None:
        self._thread.join()

    def delete(self, org_id: str) -> None:
        """Returns when nothing of it is left. Raises NotFound, or Unavailable if it takes long; it goes on then."""
        ask(self._store, org_id)
        self._woken.set()
        deadline = monotonic() + WAIT_SECONDS
        while is_there(self._store, org_id) or self._erased == org_id:  # its rows go before their traces
            if monotonic() > deadline or self._stopping.wait(WAIT_LOOK_SECONDS):
                raise Unavailable("The organisation is still being deleted.", code="still_deleting")

    def erase(self, org_id: str) -> None:
        """Everything. May be done again and again, from wherever it was cut off."""
        for job in self._jobs.of_organisation(org_id):
            if not job.is_terminal:
                self._end(job)
        for dataset in self._imports.of_organisation(org_id):
            self._imports.delete(dataset.id, org_id)
        with self._store.write() as connection:  # first, so that no new request finds a voice
            connection.execute(delete(model_versions).where(model_versions.c.org_id == org_id))
        for root in self._roots:
            folder = root / org_id
            if folder.exists():
                shutil.rmtree(folder)
        self._unload(org_id)  # after the files, so that no request that had found a voice brings it back into memory
        self._models.forget(org_id)
        self._delete_rows(org_id)
        self._store.scrub()

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                with self._store.read() as connection:
                    asked = select(organisations.c.org_id).where(organisations.c.deletion_asked_at.is_not(None))
                    waiting = connection.execute(asked).scalars().all()
            except NOT_NOW as error:
                log.error("no look at deletions, the database does not answer", reason=reason(error))
                waiting = []
            for org_id in waiting:
                self._erased = org_id
                try:
                    self.erase(org_id)
                    log.info("organisation deleted")
                except Exception as error:  # a run that is slow to stop, a disk that refuses: it is tried again
                    log.error("a deletion was cut off and will go on", **without_text(error))
                self._erased = None
            self._woken.wait(LOOK_SECONDS)

    def _end(self, job: Job) -> None:
        with suppress(Conflict):  # it has come to another end
            self._cancel(job.id)

    def _unload(self, org_id: str) -> None:
        training_ids = [job.id for job in self._jobs.of_organisation(org_id)]
        for host in self._hosts.ready():
            host.client.forget(Forgetting(org_id=org_id, training_ids=training_ids))

    def _delete_rows(self, org_id: str) -> None:
        theirs = select(jobs.c.id).where(jobs.c.org_id == org_id)
        with self._store.write() as connection:
            for table in reversed(tables.sorted_tables):
                if table is api_keys:
                    # An empty table would open the service to everybody, so an anonymous husk stays of each key.
                    connection.execute(update(table).where(table.c.org_id == org_id).values(HUSK))
                elif "org_id" in table.c:
                    connection.execute(delete(table).where(table.c.org_id == org_id))
                else:
                    connection.execute(delete(table).where(table.c.job_id.in_(theirs)))


def ask(store: Store, org_id: str) -> None:
    """Have it deleted by the service that is running, or else by the next that starts. Raises NotFound."""
    with store.write() as connection:
        found = connection.execute(
            update(organisations).where(organisations.c.org_id == org_id).values(deletion_asked_at=now())
        )
        if not found.rowcount:
            raise organisation_not_found()
        connection.execute(
            update(api_keys)
            .where(api_keys.c.org_id == org_id, api_keys.c.revoked_at.is_(None))
            .values(revoked_at=now())
        )


def is_there(store: Store, org_id: str) -> bool:
    with store.read() as connection:
        found = connection.execute(select(organisations.c.org_id).where(organisations.c.org_id == org_id))
        return found.one_or_none() is not None
