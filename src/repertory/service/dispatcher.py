"""Takes jobs from the queue, fairly, and runs each on the host it belongs on."""

from __future__ import annotations

import secrets
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic

import structlog

from repertory import manifest
from repertory.contracts import BaseKey, RunSpec
from repertory.errors import ErrorInfo, NotFound, RepertoryError, Unavailable
from repertory.logs import without_text
from repertory.service.datasets import Datasets
from repertory.service.heartbeats import HEARTBEAT_SECONDS, Heartbeats
from repertory.service.hosts import Host, Hosts
from repertory.service.jobs import KIND, Job, Jobs, Pulse
from repertory.service.lease import Lease
from repertory.service.models import Models
from repertory.service.quotas import Quotas
from repertory.service.run import Run
from repertory.service.store import NOT_NOW, Store, reason
from repertory.settings import Settings

log = structlog.get_logger()

LOOK_SECONDS = 0.5  # between two looks at the queue; a submit and the end of a run wake it earlier
CANCEL_SECONDS = 60.0
CANCEL_LOOK_SECONDS = 0.05
INTERRUPT_SECONDS = 10.0  # for the step that a run is at, and its checkpoint, when the service stops


class Dispatcher:
    def __init__(
        self,
        settings: Settings,
        store: Store,
        jobs: Jobs,
        datasets: Datasets,
        models: Models,
        hosts: Hosts,
        quotas: Quotas,
    ) -> None:
        self._settings = settings
        self._store = store
        self._jobs = jobs
        self._datasets = datasets
        self._models = models
        self._hosts = hosts
        self._quotas = quotas
        self._owner = secrets.token_hex(8)  # of the leases of this process
        self._runs: dict[str, Run] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()  # guards the two above
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._woken = threading.Event()
        self._queue_thread = threading.Thread(target=self._dispatch, name="dispatcher", daemon=True)
        self._lease_thread = threading.Thread(target=self._keep_leases, name="leases", daemon=True)

    def start(self) -> None:
        is_alone = not self._store.is_shared
        if is_alone:
            for job in self._jobs.recover():
                log.info("job taken back, its service process is gone", training_id=job.id, status=job.status)
        self._jobs.sweep(is_alone=is_alone)
        self._sweep()
        self._queue_thread.start()
        self._lease_thread.start()

    def wake(self) -> None:
        """There may be something to start."""
        self._woken.set()

    def stop(self) -> None:
        """Start nothing more, and let every run end at a checkpoint. Those that take too long end with their hosts;
        `join` waits for that.
        """
        self._stopping.set()
        self._woken.set()
        self._queue_thread.join()
        with self._lock:
            runs, threads = list(self._runs.values()), list(self._threads.values())
        for run in runs:
            run.interrupt()
        deadline = monotonic() + INTERRUPT_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - monotonic()))

    def join(self) -> None:
        with self._lock:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join()
        self._ended.set()
        self._lease_thread.join()

    def cancel(self, training_id: str) -> Job:
        """Returns when the job is cancelled and its run has really stopped, whichever service process runs it.

        Raises Conflict if it has completed or failed, also in the meantime, and Unavailable if it takes too long.
        """
        deadline = monotonic() + CANCEL_SECONDS
        job = self._jobs.cancel(training_id)
        while not job.is_terminal:
            if monotonic() > deadline:
                raise Unavailable("The run has been told to stop and is still about to.", code="still_stopping")
            with self._lock:
                run = self._runs.get(training_id)
            if run is not None:
                run.stop()
            # The host has stopped it, or has not seen it yet; either way its thread has the next word.
            if self._stopping.wait(CANCEL_LOOK_SECONDS):
                raise Unavailable("The service is stopping; the job will be cancelled.", code="shutting_down")
            job = self._jobs.get(training_id)
        self._clear_up(job)
        return self._jobs.cancel(training_id)  # raises where it has come to another end

    # The leases' thread

    def _keep_leases(self) -> None:
        """Those of our runs are kept alive; those whose holders are gone are taken back."""
        heartbeats = Heartbeats()
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                with self._lock:
                    runs = list(self._runs.values())
                for run in runs:
                    run.beat()
                for pulse in heartbeats.lapsed(self._jobs.pulses()):
                    self._take_back(pulse)
            except NOT_NOW as error:
                log.error("no heartbeat, the database does not answer", reason=reason(error))
            except Exception as error:  # a mistake of ours; without this thread every lease would lapse
                log.error("a look at the leases failed", **without_text(error))

    def _take_back(self, pulse: Pulse) -> None:
        job = self._jobs.take_back(pulse, "the service that ran it was lost")
        if job is not None:
            log.warning("job taken back, its heart stopped", training_id=job.id, owner=pulse.lease_owner)
            self._clear_up(job)
            self.wake()

    # The queue's thread

    def _dispatch(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                while self._start_one():
                    pass
            except Exception as error:
                # A locked database, a full disk, a mistake of ours: whatever it is, the queue must go on later.
                log.error("a look at the queue failed", **without_text(error))
            self._woken.wait(LOOK_SECONDS)

    def _start_one(self) -> bool:
        """Start the first job in turn that can start. After each, turns are counted anew."""
        return any(self._start(job) for job in self._jobs.queue())

    def _start(self, job: Job) -> bool:
        host: Host | None = None
        try:
            self._jobs.check_turn(job)  # before a host is started for it
            key = self._hosts.key(job.base_model, job.config.hyperparameters)
            if self._is_full(key):
                raise Unavailable("Other trainings run on this base model, as many as MAX_CONCURRENT_TRAININGS allows.")
            if not self._hosts.is_downloading(key):  # else the run itself waits for it: the job is being prepared
                host = self._hosts.acquire(key)
        except Unavailable as not_now:
            self._jobs.wait(job, not_now.message)
            return False
        except RepertoryError as error:
            log.error("job failed before it began", training_id=job.id, code=error.code)
            self._jobs.fail_queued(job.id, error.info)
            self._clear_up(self._jobs.get(job.id))
            return False
        if host is not None:
            key = host.key or key  # with the commit that it has turned out to mean
        claimed: Job | None = None
        try:
            claimed = self._jobs.claim(job.id, self._owner, key.name)
        except Unavailable as not_now:  # another service process has just begun one of its organisation's
            self._jobs.wait(job, not_now.message)
        finally:
            if claimed is None and host is not None:
                self._hosts.release(host)
        if claimed is None:
            return False
        self._run(claimed, key, host)
        return True

    def _is_full(self, key: BaseKey) -> bool:
        with self._lock:
            running = sum(run.key == key for run in self._runs.values())
        return running >= self._settings.max_concurrent_trainings

    def _run(self, job: Job, key: BaseKey, host: Host | None) -> None:
        log.info("run starts", training_id=job.id, org_id=job.org_id, epoch=job.lease_epoch, attempt=job.attempts + 1)
        lease = Lease(self._store, job, self._quotas)
        run = Run(job, key, host, self._hosts, lease, self._stopping)
        thread = threading.Thread(target=self._follow, args=(job, run, lease), name=f"run-{job.id}", daemon=True)
        with self._lock:
            self._runs[job.id] = run
            self._threads[job.id] = thread
        thread.start()

    def _follow(self, job: Job, run: Run, lease: Lease) -> None:
        """In the run's own thread."""
        try:
            run.follow(lambda key: self._spec(job, key))
        except Exception as error:
            # A mistake of ours, or no disk. The job must not stay active without anybody running it.
            log.error("run ended by the service's fault", training_id=job.id, **without_text(error))
            if not self._stopping.is_set():
                lease.fail(_our_mistake(error))
        finally:
            with self._lock:
                del self._runs[job.id], self._threads[job.id]
            self.wake()
        with suppress(NotFound, *NOT_NOW):  # what stays is swept at the next start
            self._clear_up(self._jobs.get(job.id))

    def _spec(self, job: Job, key: BaseKey) -> RunSpec:
        current = self._models.promoted(job.org_id)
        config = job.config
        start = None if config.continue_from is None else self._models.find(job.org_id, config.continue_from)
        return RunSpec(
            org_id=job.org_id,
            training_id=job.id,
            base_model=job.base_model,
            conversations_path=str(self._datasets.conversations_path(job.org_id, job.id)),
            output_dir=str(self._models.folder(job.org_id, job.id).resolve()),
            checkpoint_dir=str(self._checkpoints(job).resolve()),
            hyperparameters=config.hyperparameters,
            validation_split=config.validation_split,
            system_prompt=config.system_prompt,
            current=current.adapter if current is not None and current.key == key else None,
            start=None if start is None else start.adapter,
            publish_anyway=config.publish_anyway,
            recorded_steps=self._jobs.recorded_steps(job.id),
        )

    # What a job that has ended, whichever way, leaves behind: checkpoints, and what its host was writing when it ended

    def _checkpoints(self, job: Job) -> Path:
        return self._settings.checkpoint_dir / job.org_id / job.id

    def _clear_up(self, job: Job) -> None:
        if job.is_terminal:
            shutil.rmtree(self._checkpoints(job), ignore_errors=True)
            manifest.remove_unfinished(self._models.folder(job.org_id, job.id))

    def _sweep(self) -> None:
        """After jobs that ended without anybody to clear up. Folders that no job here knows are not ours to touch."""
        folders = [*self._settings.checkpoint_dir.glob(f"*/{KIND}*")]
        folders += {path.parent for path in self._settings.finetuned_model_dir.glob(f"*/{KIND}*/.*.tmp")}
        for folder in folders:
            with suppress(NotFound):
                self._clear_up(self._jobs.get(folder.name))


def _our_mistake(error: Exception) -> ErrorInfo:
    return ErrorInfo(
        code="internal_error",
        message=f"The service made a mistake while it followed this run ({type(error).__name__}).",
        cure="Start the job again; the service log names the place.",
    )
