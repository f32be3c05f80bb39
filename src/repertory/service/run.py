"""One claimed job on its host, from the claim to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from repertory import manifest
from repertory.contracts import BaseKey, RunEvent, RunSpec
from repertory.errors import Conflict, ErrorInfo, JobFailed, RepertoryError, Unavailable
from repertory.service.host_client import HostLost
from repertory.service.hosts import Host, Hosts
from repertory.service.jobs import Job
from repertory.service.lease import Lease, LeaseLost
from repertory.service.store import NOT_NOW, reason

log = structlog.get_logger()

WRITE_RETRY_SECONDS = 1.0  # while the database is locked or its disk full

T = TypeVar("T")


class Run:
    """Follows the run's story and writes it down. If the service stops, the job simply stays for the next start."""

    def __init__(
        self, job: Job, key: BaseKey, host: Host, hosts: Hosts, lease: Lease, stopping: threading.Event
    ) -> None:
        self._job = job
        self._key = key
        self._host = host
        self._hosts = hosts
        self._lease = lease
        self._stopping = stopping

    def follow(self, spec: RunSpec) -> None:
        """Returns when the run has ended, one way or another, and the job's row says so."""
        try:
            for event in self._host.client.run(spec):
                if self._is_end(event, Path(spec.output_dir)):
                    return
            self._hosts.doubt(self._host)
            self._lost("the host ended the run without saying how")
        except HostLost as lost:
            if lost.is_hang:
                self._hosts.kill(self._host)
            self._hosts.doubt(self._host)
            self._lost(str(lost))
        except LeaseLost:
            log.warning("run abandoned, its job is no longer ours", training_id=self._job.id)
        except (Unavailable, Conflict) as not_now:
            self._lost(not_now.message)
        except RepertoryError as refusal:
            self._fail(refusal.info)

    def stop(self) -> None:
        """Returns once the host has stopped it. Its end is written by the thread that follows it."""
        try:
            self._host.client.stop_run(self._job.id)
        except HostLost as lost:
            log.warning("host lost while stopping a run", training_id=self._job.id, reason=str(lost))

    def _is_end(self, event: RunEvent, output_dir: Path) -> bool:
        match event.kind:
            case "completed":
                self._publish(event, output_dir)
            case "failed":
                error = event.error or JobFailed("The run failed without saying why.").info
                self._fail(error)
            case "cancelled":
                self._lost("the host stopped the run")
            case _:
                self._persist(lambda: self._lease.record(event))
                return False
        return True

    def _publish(self, event: RunEvent, output_dir: Path) -> None:
        damage = manifest.verify(output_dir)
        if damage is not None:
            error = ErrorInfo(
                code="adapter_damaged",
                message=f"The run has ended, but its files are not whole: {damage}.",
                cure="Check the disk that holds FINETUNED_MODEL_DIR, then start the job again.",
            )
            self._fail(error)
            return
        self._persist(lambda: self._lease.publish(self._key, event.data))
        log.info("model published", training_id=self._job.id, org_id=self._job.org_id)

    def _fail(self, error: ErrorInfo) -> None:
        log.error("run failed", training_id=self._job.id, code=error.code)
        self._persist(lambda: self._lease.fail(error))

    def _lost(self, reason: str) -> None:
        if self._stopping.is_set():
            return
        log.warning("run lost", training_id=self._job.id, reason=reason)
        self._persist(lambda: self._lease.host_lost(reason))

    def _persist(self, write: Callable[[], T]) -> T:
        """Nothing of the story gets lost because the database is locked or its disk full for a while."""
        while True:
            try:
                return write()
            except NOT_NOW as error:
                log.error("the database takes no writes", training_id=self._job.id, reason=reason(error))
                if self._stopping.wait(WRITE_RETRY_SECONDS):
                    raise
