"""Takes jobs from the queue, fairly, and runs each on the host it belongs on."""

from __future__ import annotations

import secrets
import threading
from pathlib import Path
from time import monotonic

import structlog

from repertory.contracts import BaseKey, RunSpec
from repertory.errors import ErrorInfo, RepertoryError, Unavailable
from repertory.logs import without_text
from repertory.service.datasets import Datasets
from repertory.service.hosts import Host, Hosts
from repertory.service.jobs import Job, Jobs
from repertory.service.lease import Lease
from repertory.service.models import Models
from repertory.service.run import Run
from repertory.service.store import Store
from repertory.settings import Settings

log = structlog.get_logger()

LOOK_SECONDS = 0.5  # between two looks at the queue; a submit and the end of a run wake it earlier
CANCEL_SECONDS = 60.0
CANCEL_LOOK_SECONDS = 0.05


class Dispatcher:
    def __init__(
        self, settings: Settings, store: Store, jobs: Jobs, datasets: Datasets, models: Models, hosts: Hosts
    ) -> None:
        self._settings = settings
        self._store = store
        self._jobs = jobs
        self._datasets = datasets
        self._models = models
        self._hosts = hosts
        self._owner = secrets.token_hex(8)  # of the leases of this process
        self._runs: dict[str, Run] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._running_on: dict[BaseKey, int] = {}
        self._lock = threading.Lock()  # guards the three above
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._dispatch, name="dispatcher", daemon=True)

    def start(self) -> None:
        for training_id in self._jobs.recover(self._owner):
            log.info("job requeued, its service process is gone", training_id=training_id)
        self._thread.start()

    def wake(self) -> None:
        """There may be something to start."""
        self._woken.set()

    def stop(self) -> None:
        """Start nothing more. What runs goes on until its host ends; `join` waits for that."""
        self._stopping.set()
        self._woken.set()
        self._thread.join()

    def join(self) -> None:
        with self._lock:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join()

    def cancel(self, training_id: str) -> Job:
        """Returns when the job is cancelled and its run has really stopped.

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
                raise Unavailable(
                    "The service is stopping; the job is cancelled at its next start.", code="shutting_down"
                )
            job = self._jobs.cancel(training_id)
        return job

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
        try:
            key = self._hosts.key(job.base_model, job.config.hyperparameters)
            if self._is_full(key):
                raise Unavailable("Other trainings run on this base model, as many as MAX_CONCURRENT_TRAININGS allows.")
            host = self._hosts.acquire(key)
        except Unavailable as reason:
            self._jobs.wait(job, reason.message)
            return False
        except RepertoryError as error:
            log.error("job failed before it began", training_id=job.id, code=error.code)
            self._jobs.fail_queued(job.id, error.info)
            return False
        key = host.key or key  # with the commit that it has turned out to mean
        claimed: Job | None = None
        try:
            claimed = self._jobs.claim(job.id, self._owner, key.name)
        finally:
            if claimed is None:
                self._hosts.release(host)
        if claimed is None:
            return False
        self._run(claimed, key, host)
        return True

    def _is_full(self, key: BaseKey) -> bool:
        with self._lock:
            return self._running_on.get(key, 0) >= self._settings.max_concurrent_trainings

    def _run(self, job: Job, key: BaseKey, host: Host) -> None:
        log.info("run starts", training_id=job.id, org_id=job.org_id, host=host.name, attempt=job.attempts + 1)
        lease = Lease(self._store, job)
        run = Run(job, key, host, self._hosts, lease, self._stopping)
        thread = threading.Thread(
            target=self._follow, args=(job, key, host, run, lease), name=f"run-{job.id}", daemon=True
        )
        with self._lock:
            self._runs[job.id] = run
            self._threads[job.id] = thread
            self._running_on[key] = self._running_on.get(key, 0) + 1
        thread.start()

    def _follow(self, job: Job, key: BaseKey, host: Host, run: Run, lease: Lease) -> None:
        """In the run's own thread."""
        try:
            run.follow(self._spec(job, key))
        except RepertoryError as refusal:  # the version to go on from is gone or damaged
            lease.fail(refusal.info)
        except Exception as error:
            # A mistake of ours, or no disk. The job must not stay active without anybody running it.
            log.error("run ended by the service's fault", training_id=job.id, **without_text(error))
            if not self._stopping.is_set():
                lease.fail(_our_mistake(error))
        finally:
            self._hosts.release(host)
            with self._lock:
                del self._runs[job.id], self._threads[job.id]
                self._running_on[key] -= 1
            self.wake()

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
        )

    def _checkpoints(self, job: Job) -> Path:
        return self._settings.checkpoint_dir / job.org_id / job.id


def _our_mistake(error: Exception) -> ErrorInfo:
    return ErrorInfo(
        code="internal_error",
        message=f"The service made a mistake while it followed this run ({type(error).__name__}).",
        cure="Start the job again; the service log names the place.",
    )
