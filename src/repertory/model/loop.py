"""The loop that owns the device: one thread that serves and trains on one base model, serving first.

Other threads never touch the device; they leave a message. Training gets a share of the time while requests are being
answered and all of it otherwise (`timeshare`), in quanta of one forward or one backward pass, so that a request waits
for one such pass at the most.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psutil
import structlog
import torch

from repertory.contracts import Estimate, EstimateRequest, EvaluateRequest, Evaluation, RunEvent, RunSpec
from repertory.data.render import Renderer
from repertory.errors import (
    Conflict,
    ErrorInfo,
    InsufficientMemory,
    JobFailed,
    NotFound,
    RepertoryError,
    StorageFailed,
    Unavailable,
)
from repertory.logs import without_text
from repertory.model.adapter import Adapter
from repertory.model.base import Base, Outline, free_bytes, give_back_memory
from repertory.model.engine import MAX_ROWS, Engine
from repertory.model.estimate import estimate
from repertory.model.evaluation import evaluate
from repertory.model.memory import gib
from repertory.model.prefixes import Version
from repertory.model.probe import is_out_of_memory
from repertory.model.scheduler import Sequence
from repertory.model.slots import Slots
from repertory.model.timeshare import TimeShare
from repertory.model.training import TrainingRun
from repertory.model.voices import Voice, Voices

OUT_OF_MEMORY_RETRY_SECONDS = 10.0

log = structlog.get_logger()


@dataclass(eq=False)
class _Task:
    """Background work: something that is done in steps and may be given up between two of them."""

    name: str
    step: Callable[[], None]  # raises StopIteration at its end
    fail: Callable[[ErrorInfo], None]
    close: Callable[[], None]  # gives it up before its end
    is_midway: Callable[[], bool] = lambda: False  # it holds memory that no other task should need beside its own
    interrupt: Callable[[], bool] = lambda: False  # asks it to end soon; False: it may as well be given up now


class DeviceLoop:
    """Serving and training on `base`. `run_forever` is the device's thread; everything else may be called from any."""

    def __init__(
        self, base: Base, training_share: float, adapter_slots: int = MAX_ROWS, adapter_bytes: int | None = None
    ) -> None:
        """`adapter_bytes` of adapters stay in memory, and on a card as many there again; None: a tenth of each."""
        self.base = base
        self.engine = Engine(base, _slots(base, adapter_slots, adapter_bytes))
        self.voices = Voices(base, adapter_bytes or psutil.virtual_memory().total // 10, self._let_go_of)
        self._tasks: deque[_Task] = deque()  # the one whose turn it is comes first
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.timeshare = TimeShare(training_share)
        self._rate: float | None = None  # of `plan.Work`, as the last run had it

    # From any thread

    def submit(self, sequence: Sequence) -> None:
        self._inbox.put(lambda: self.engine.submit(sequence))

    def cancel(self, sequence: Sequence) -> None:
        self._inbox.put(lambda: None if sequence.is_finished else self.engine.cancel(sequence))

    def unload(self, org_id: str, training_id: str | None) -> None:
        """Forget a version (None: the bare base, for this organisation) everywhere. Sequences in flight keep its
        adapter until they finish.
        """
        self.voices.unload(Version(org_id, training_id))
        self._inbox.put(lambda: self.engine.forget(org_id, training_id))

    def start_run(self, spec: RunSpec, tell: Callable[[RunEvent], None]) -> None:
        """Begin a run; `tell` hears its events, ending with completed, failed or cancelled."""
        self._inbox.put(lambda: self._start_run(spec, tell))

    def stop_run(self, training_id: str) -> Future[None]:
        """Done once the run has stopped and its memory is free. NotFound if there is no such run."""
        stopped: Future[None] = Future()
        self._inbox.put(lambda: self._stop_run(training_id, stopped))
        return stopped

    def interrupt_run(self, training_id: str) -> Future[None]:
        """Done once the run knows that it is to end, with a checkpoint. NotFound if there is no such run."""
        told: Future[None] = Future()
        self._inbox.put(lambda: self._interrupt_run(training_id, told))
        return told

    def evaluate(self, voice: Voice, request: EvaluateRequest) -> Future[Evaluation]:
        result: Future[Evaluation] = Future()
        portions = evaluate(self.base, self.engine, voice, request)
        self._inbox.put(lambda: self._start_task(portions, result))
        return result

    def estimate(self, outline: Outline, renderer: Renderer | None, request: EstimateRequest) -> Future[Estimate]:
        """What a job on `outline` would take: this host's base model, or another one that would come in its place."""
        result: Future[Estimate] = Future()
        is_ours = outline is self.base
        available, rate = self.base.available_bytes, self._rate if is_ours else None
        portions = estimate(outline, renderer, request, available, rate)
        self._inbox.put(lambda: self._start_task(portions, result))
        return result

    def stop(self) -> None:
        self._inbox.put(None)

    def _let_go_of(self, adapter: Adapter) -> None:
        self._inbox.put(lambda: self.engine.let_go(adapter))

    @property
    def run_ids(self) -> list[str]:
        return [task.name for task in list(self._tasks) if task.name]

    @property
    def memory_bytes(self) -> int:
        """Of this process, or on CUDA of the device."""
        if self.base.device.type == "cuda":
            return torch.cuda.memory_allocated(self.base.device)
        return int(psutil.Process().memory_info().rss)

    # The device's thread

    def run_forever(self) -> None:
        """Until `stop`. Runs in progress are left as they are: they go on from their checkpoints another time."""
        while self._take_messages():
            turn = self.timeshare.next(requests=self.engine.has_work, training=bool(self._tasks))
            if turn is None:
                continue
            begin = time.monotonic()
            if turn == "serving":
                self._serve()
            else:
                self._train()
            self.timeshare.took(time.monotonic() - begin)

    def _take_messages(self) -> bool:
        """Do what the other threads ask for, waiting for it when there is nothing else to do. False: stop."""
        is_idle = not (self.engine.has_work or self._tasks)
        while True:
            try:
                message = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            if message is None:
                return False
            try:
                message()
            except Exception as error:  # the loop must go on; whoever asked has a future that will time out
                log.error("message failed", **without_text(error))
            is_idle = False

    def _serve(self) -> None:
        try:
            self.engine.step()
            return
        except Exception as error:  # whatever it was, the sequences must hear of it and the loop must go on
            log.error("generation failed", **without_text(error))
            info, ran_out = _info_of(error), is_out_of_memory(error)
        if ran_out:  # and the activations that the traceback held are gone
            give_back_memory(self.base.device)
            self.engine.shed(self._no_room().info)
        else:
            self.engine.fail_all(info)

    def _no_room(self) -> Unavailable:
        answered, free = len(self.engine.scheduler.running), gib(free_bytes(self.base.device.type))
        return Unavailable(
            f"memory ran out with {answered} requests being answered and {len(self.run_ids)} trainings running;"
            f" {free} are free, and this request was the last to come or the longest",
            code="out_of_memory",
            cure="Send it again when there is less to do, shorten its history, or ask for fewer max_tokens.",
            retry_after_seconds=OUT_OF_MEMORY_RETRY_SECONDS,
        )

    def _train(self) -> None:
        task = self._tasks[0]
        try:
            task.step()
            if not task.is_midway():
                self._tasks.rotate(-1)
            if self.base.device.type == "cuda":  # what was only begun would count as the time of the next step
                torch.cuda.synchronize(self.base.device)
        except StopIteration:
            self._let_go(task)
        except Exception as error:  # a run may fail in any way; the others and the requests go on
            if not isinstance(error, RepertoryError):
                log.error("task failed", task=task.name, **without_text(error))
            self._let_go(task)
            task.fail(_info_of(error))

    def _let_go(self, task: _Task) -> None:
        """Forget a task, and give the memory that it held back to the device or the system."""
        self._tasks.remove(task)
        give_back_memory(self.base.device)

    def _start_run(self, spec: RunSpec, tell: Callable[[RunEvent], None]) -> None:
        if spec.training_id in self.run_ids:
            error = Conflict(f"{spec.training_id} is running already", code="already_running")
            tell(RunEvent(kind="failed", progress=0, error=error.info))
            return
        run = TrainingRun(spec, self.base, self.engine)

        def step() -> None:
            event = run.step()
            self._rate = run.work.rate or self._rate
            if event is not None:
                tell(event)

        def fail(error: ErrorInfo) -> None:
            tell(RunEvent(kind="failed", progress=run.work.progress, error=error))

        def close() -> None:
            try:
                run.close()
            finally:  # it has stopped, even where closing its files failed
                tell(RunEvent(kind="cancelled", progress=run.work.progress))

        self._tasks.append(_Task(spec.training_id, step, fail, close, lambda: run.is_midway, run.interrupt))

    def _stop_run(self, training_id: str, stopped: Future[None]) -> None:
        task = next((task for task in self._tasks if task.name == training_id), None)
        if task is None:
            stopped.set_exception(NotFound(f"there is no run {training_id}", code="run_not_found"))
            return
        try:
            task.close()
        except OSError as error:
            log.error("a run's files could not be closed", task=task.name, **without_text(error))
        self._let_go(task)
        stopped.set_result(None)

    def _interrupt_run(self, training_id: str, told: Future[None]) -> None:
        if any(task.interrupt() for task in self._tasks if task.name == training_id):
            told.set_result(None)
        else:
            self._stop_run(training_id, told)

    def _start_task(self, work: Generator[None, None, Any], result: Future[Any]) -> None:
        """Until it is done, or until `result` is cancelled because nobody waits for it any more."""

        def fail(error: ErrorInfo) -> None:
            if result.set_running_or_notify_cancel():
                result.set_exception(RepertoryError.from_info(error))

        portions = _resulting(work, result)
        self._tasks.append(_Task(name="", step=lambda: next(portions), fail=fail, close=portions.close))


def _slots(base: Base, count: int, limit_bytes: int | None) -> Slots:
    """On a card a slot is a copy of the adapter there."""
    if base.device.type == "cpu":
        return Slots(count)
    memory = base.memory_limit_bytes or torch.cuda.get_device_properties(base.device).total_memory
    return Slots(count, limit_bytes or memory // 10, lambda adapter: adapter.to(base.device, base.dtype))


def _resulting(work: Generator[None, None, Any], result: Future[Any]) -> Generator[None, None, None]:
    with closing(work):
        while not result.cancelled():
            try:
                next(work)
            except StopIteration as end:
                if result.set_running_or_notify_cancel():
                    result.set_result(end.value)
                return
            yield


def _info_of(error: Exception) -> ErrorInfo:
    if isinstance(error, RepertoryError):
        return error.info
    if is_out_of_memory(error):
        return InsufficientMemory(
            f"the device ran out of memory: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ).info
    if isinstance(error, OSError):
        return StorageFailed.of(error).info
    return JobFailed(
        f"an internal error: {type(error).__name__}",
        code="internal_error",
        cure="The host's log holds the traceback; please report it.",
    ).info
