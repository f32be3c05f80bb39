"""One claimed job, from the claim to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
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
LOOK_SECONDS = 0.5  # between two looks whether the host is ready

T = TypeVar("T")


class Run:
    """Follows the run's story and writes it down.

    Its methods may be called from any thread; `follow` is the thread of the run.
    """

    def __init__(
        self, job: Job, key: BaseKey, host: Host | None, hosts: Hosts, lease: Lease, stopping: threading.Event
    ) -> None:
        """`host` is acquired and will be released here; None: it downloads its base model, and will be waited for."""
        self.key = key  # with the commit, once that is known
        self._job = job
        self._host = host
        self._hosts = hosts
        self._lease = lease
        self._stopping = stopping  # the whole service
        self._unwanted = threading.Event()  # this run

    def follow(self, spec: Callable[[BaseKey], RunSpec]) -> None:
        """Returns when the run has ended, one way or another, and the job's row says so.

        Raises what `spec` does, and whatever the database says after the service was told to stop.
        """
        try:
            self._host = self._host or self._until_ready()
            if self._host is None:
                self._give_back("it was stopped before its base model was there")
            else:
                self._follow(self._host, spec(self.key))
        except LeaseLost:
            log.warning("run abandoned, its job is no longer ours", training_id=self._job.id)
        except (Unavailable, Conflict) as not_now:
            self._lost(not_now.message)
        except RepertoryError as refusal:
            self._fail(refusal.info)
        finally:
            if self._host is not None:
                self._hosts.release(self._host)

    def beat(self) -> None:
        """A sign of life. Stops the run if somebody wants that, or if the job is no longer ours."""
        try:
            is_wanted = not self._lease.beat().cancel_requested
        except LeaseLost:
            is_wanted = False
        if not is_wanted and not self._unwanted.is_set():
            self._unwanted.set()
            # Stopping may take as long as two micro-steps, and other runs' hearts must beat meanwhile.
            threading.Thread(target=self.stop, name=f"stop-{self._job.id}", daemon=True).start()

    def stop(self) -> None:
        """Returns once the host has stopped it. Its end is written by the thread that follows it."""
        self._unwanted.set()
        self._ask(lambda host: host.client.stop_run(self._job.id))

    def interrupt(self) -> None:
        """Let it end soon, with a checkpoint."""
        self._unwanted.set()
        self._ask(lambda host: host.client.interrupt_run(self._job.id))

    def _ask(self, ask: Callable[[Host], None]) -> None:
        if self._host is None:
            return
        try:
            ask(self._host)
        except HostLost as lost:
            log.warning("host lost while stopping a run", training_id=self._job.id, reason=str(lost))

    def _until_ready(self) -> Host | None:
        """The host, once its base model is there. None if the run is to end before."""
        said = None
        while not self._unwanted.is_set():
            try:
                host = self._hosts.acquire(self.key)
            except Unavailable as not_yet:
                if not_yet.message != said:
                    said = not_yet.message
                    event = RunEvent(kind="preparing", progress=0, data={"phase": said})
                    self._persist(partial(self._lease.record, event))
                self._unwanted.wait(LOOK_SECONDS)
            else:
                self.key = host.key or self.key
                self._persist(lambda: self._lease.pin(self.key.name))
                return host
        return None

    def _follow(self, host: Host, spec: RunSpec) -> None:
        try:
            for event in host.client.run(spec):
                if self._is_end(event, Path(spec.output_dir)):
                    return
            self._hosts.doubt(host)
            self._lost("the host ended the run without saying how")
        except HostLost as lost:
            if lost.is_hang:
                self._hosts.kill(host)
            self._hosts.doubt(host)
            self._lost(str(lost))

    def _is_end(self, event: RunEvent, output_dir: Path) -> bool:
        match event.kind:
            case "completed":
                self._publish(event, output_dir)
            case "failed":
                error = event.error or JobFailed("The run failed without saying why.").info
                self._fail(error)
            case "cancelled" | "interrupted":
                self._give_back("the service was stopped" if self._stopping.is_set() else "the host stopped the run")
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
        self._persist(lambda: self._lease.publish(self.key, event.data))
        log.info("model published", training_id=self._job.id, org_id=self._job.org_id)

    def _fail(self, error: ErrorInfo) -> None:
        log.error("run failed", training_id=self._job.id, code=error.code)
        self._persist(lambda: self._lease.fail(error))

    def _lost(self, reason: str) -> None:
        if self._stopping.is_set():
            self._give_back("the service was stopped")
            return
        log.warning("run lost", training_id=self._job.id, reason=reason)
        self._persist(lambda: self._lease.host_lost(reason))

    def _give_back(self, reason: str) -> None:
        log.info("run given back", training_id=self._job.id, reason=reason)
        self._persist(lambda: self._lease.give_back(reason))

    def _persist(self, write: Callable[[], T]) -> T:
        """Nothing of the story gets lost because the database is locked or its disk full for a while."""
        while True:
            try:
                return write()
            except NOT_NOW as error:
                log.error("the database takes no writes", training_id=self._job.id, reason=reason(error))
                if self._stopping.wait(WRITE_RETRY_SECONDS):
                    raise
