from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from repertory.contracts import EstimateRequest, Hyperparameters, RunEvent, TokenChunk
from repertory.errors import NotFound, RepertoryError, Unavailable
from repertory.model import loop as loop_module
from repertory.model.base import Base
from repertory.model.host import Host, make_app
from repertory.model.loop import DeviceLoop
from repertory.model.training import TrainingRun
from repertory_fixtures import MakeSpec, conversation, greedy

DEADLINE_SECONDS = 60.0


@pytest.fixture
def loop(base: Base) -> Iterator[DeviceLoop]:
    loop = DeviceLoop(base, training_share=0.2)
    device = threading.Thread(target=loop.run_forever, daemon=True)
    device.start()
    yield loop
    loop.stop()
    device.join(DEADLINE_SECONDS)
    assert not device.is_alive()


class Told:
    """Events of a run, and a way to wait for one."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []
        self._arrived = threading.Condition()

    def __call__(self, event: RunEvent) -> None:
        with self._arrived:
            self.events.append(event)
            self._arrived.notify_all()

    def until(self, kind: str) -> RunEvent:
        with self._arrived:
            assert self._arrived.wait_for(lambda: any(e.kind == kind for e in self.events), DEADLINE_SECONDS)
        return next(event for event in self.events if event.kind == kind)


def test_a_cancelled_run_stops_within_two_portions_and_lets_go_of_its_memory(
    loop: DeviceLoop, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    portions: list[float] = []
    runs: list[weakref.ref[TrainingRun]] = []
    step = TrainingRun.step

    def counted(run: TrainingRun) -> RunEvent | None:
        portions.append(time.monotonic())
        if not runs:
            runs.append(weakref.ref(run))
        return step(run)

    monkeypatch.setattr(TrainingRun, "step", counted)
    told = Told()
    loop.start_run(make_spec(100, num_train_epochs=50), told)
    told.until("step")
    asked_at = time.monotonic()
    loop.stop_run("train_1").result(DEADLINE_SECONDS)
    assert sum(at > asked_at for at in portions) <= 2
    assert told.events[-1].kind == "cancelled"
    assert loop.run_ids == []
    gc.collect()
    assert runs[0]() is None  # with it went adapter, optimizer and activations


@pytest.mark.fault("F6")
@pytest.mark.parametrize("at", ["preparing", "step", "evaluating"])
def test_an_interrupted_run_keeps_its_steps_and_ends_as_if_nothing_had_happened(
    loop: DeviceLoop, make_spec: MakeSpec, at: str
) -> None:
    """No checkpoint but the interruption's own falls into the steps."""

    def losses(*runs: Told) -> dict[int, float]:
        return {one.data["step"]: one.data["loss"] for run in runs for one in run.events if one.kind == "step"}

    options = {"save_steps": 100, "lora_dropout": 0.1}
    whole = Told()
    loop.start_run(make_spec(16, training_id="train_whole", **options), whole)
    report = whole.until("completed").data["report"]

    spec = make_spec(16, training_id="train_cut", **options)
    before, after = Told(), Told()
    loop.start_run(spec, before)
    before.until(at)
    loop.interrupt_run(spec.training_id).result(DEADLINE_SECONDS)
    before.until("interrupted" if at == "step" else "cancelled")
    done = losses(before)
    kept = [one.data["step"] for one in before.events if one.kind == "checkpoint"]
    assert kept == ([max(done)] if done else [])
    loop.start_run(spec.model_copy(update={"recorded_steps": max(done, default=0)}), after)
    assert after.until("completed").data["report"]["val_nll"] == report["val_nll"]
    assert after.until("running").data.get("resumed_from_step", 0) == max(done, default=0)
    assert losses(before, after) == losses(whole)
    assert not losses(before).keys() & losses(after).keys()


def test_stopping_a_run_that_is_not_there_says_so(loop: DeviceLoop) -> None:
    with pytest.raises(NotFound):
        loop.stop_run("train_x").result(DEADLINE_SECONDS)


def test_a_run_cannot_be_started_twice_at_once(loop: DeviceLoop, make_spec: MakeSpec) -> None:
    spec = make_spec(100, num_train_epochs=50)
    first, second = Told(), Told()
    loop.start_run(spec, first)
    loop.start_run(spec, second)
    error = second.until("failed").error
    assert error is not None
    assert error.code == "already_running"
    loop.stop_run(spec.training_id).result(DEADLINE_SECONDS)


def test_two_runs_and_requests_share_the_device(loop: DeviceLoop, make_spec: MakeSpec) -> None:
    first, second = Told(), Told()
    loop.start_run(make_spec(training_id="train_1"), first)
    loop.start_run(make_spec(training_id="train_2"), second)
    assert ask(loop, max_tokens=30).finish_reason == "length"
    one, other = first.until("completed"), second.until("completed")
    assert one.data["report"]["val_nll"] == other.data["report"]["val_nll"]  # the same job beside each other


def test_no_run_goes_on_while_another_holds_the_activations_of_a_micro_batch(
    loop: DeviceLoop, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each was measured by itself to fit the memory."""
    turns: list[tuple[str, bool]] = []
    step = TrainingRun.step

    def noted(run: TrainingRun) -> RunEvent | None:
        try:
            return step(run)
        finally:
            turns.append((run.spec.training_id, run.is_midway))

    monkeypatch.setattr(TrainingRun, "step", noted)
    told = [Told(), Told()]
    for number, one in enumerate(told):
        loop.start_run(make_spec(8, training_id=f"train_{number}", num_train_epochs=1), one)
    for one in told:
        one.until("completed")
    assert {training_id for training_id, is_midway in turns if is_midway} == {"train_0", "train_1"}
    assert all(after == before for (before, is_midway), (after, _) in itertools.pairwise(turns) if is_midway)
    assert any(after != before for (before, _), (after, _) in itertools.pairwise(turns))


def test_a_broken_forward_pass_is_told_and_the_loop_goes_on(loop: DeviceLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(type(loop.engine), "step", lambda engine: 1 / 0)
        error = ask(loop).error
    assert error is not None
    assert error.code == "internal_error"
    assert ask(loop).error is None


ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ...")


@pytest.mark.fault("F16")
@pytest.mark.parametrize("error", [ON_CUDA, ON_CPU, MemoryError()])
@pytest.mark.parametrize("where", ["hidden", "logits"])
def test_out_of_memory_in_serving_gives_up_the_newest_and_not_the_others(
    loop: DeviceLoop, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    """Two are being answered when a third one's prompt is too much for the device, before or behind the blocks."""
    expected = ask_later(loop, max_tokens=80)()[1]
    hidden, too_many = Base.hidden, 60

    def short(base: Base, ids: torch.Tensor, *about: torch.Tensor) -> torch.Tensor:
        if len(ids) > too_many:
            monkeypatch.setattr(Base, "logits", logits_that_fail)
            if where == "hidden":
                raise error
        return hidden(base, ids, *about)

    logits = Base.logits

    def logits_that_fail(base: Base, found: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(Base, "logits", logits)
        if where == "logits":
            raise error
        return logits(base, found)

    monkeypatch.setattr(Base, "hidden", short)
    answers = [ask_later(loop, max_tokens=80) for _ in range(2)]
    third = ask_later(loop, question="word " * 100)
    (last, _), (first_last, first), (second_last, second) = third(), *(answer() for answer in answers)
    assert last.error is not None
    assert (last.error.status, last.error.code) == (503, "out_of_memory")
    assert "GiB are free" in last.error.message
    again = RepertoryError.from_info(last.error)
    assert isinstance(again, Unavailable)
    assert again.retry_after_seconds is not None
    assert first_last.error is second_last.error is None
    assert first == second == expected  # the step that broke off left no trace in them
    assert ask(loop).error is None


def test_where_not_even_one_fits_each_is_told_so(loop: DeviceLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(Base, "hidden", lambda *about: (_ for _ in ()).throw(ON_CUDA))
        last = [answer()[0] for answer in [ask_later(loop) for _ in range(3)]]
    assert [chunk.error.code for chunk in last if chunk.error] == ["out_of_memory"] * 3
    assert ask(loop).error is None


def test_an_estimate_is_given_up_when_the_connection_of_who_asked_closes(
    loop: DeviceLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, is_given_up = threading.Event(), threading.Event()

    def endless(*_: object) -> Iterator[None]:
        try:
            while True:
                has_begun.set()
                yield
        finally:
            is_given_up.set()

    monkeypatch.setattr(loop_module, "estimate", endless)
    host = Host("tiny/llama-gqa", None, None, Path("unused"))
    host._loop = loop
    asked = EstimateRequest(
        key=loop.base.key, conversations=[conversation(1)], hyperparameters=Hyperparameters(), validation_split=0
    )
    arriving = [{"type": "http.request", "body": asked.model_dump_json().encode()}]

    async def receive() -> dict[str, object]:
        if arriving:
            return arriving.pop()
        await asyncio.to_thread(has_begun.wait, DEADLINE_SECONDS)
        return {"type": "http.disconnect"}

    async def send(message: object) -> None:
        """Nobody listens."""

    scope = {"type": "http", "method": "POST", "path": "/estimate", "headers": [], "query_string": b""}
    asyncio.run(asyncio.wait_for(make_app(host)(scope, receive, send), DEADLINE_SECONDS))
    assert has_begun.is_set()
    assert is_given_up.wait(DEADLINE_SECONDS)
    assert ask(loop).error is None


def ask(loop: DeviceLoop, max_tokens: int = 5) -> TokenChunk:
    """The last chunk of a reply that does not stop by itself."""
    return ask_later(loop, max_tokens)()[0]


def ask_later(
    loop: DeviceLoop, max_tokens: int = 5, question: str = "Hello!"
) -> Callable[[], tuple[TokenChunk, list[int]]]:
    """Asks at once; the function waits for the last chunk, and for the tokens of the reply."""
    ended = threading.Event()
    last: list[TokenChunk] = []

    def take(chunk: TokenChunk) -> None:
        if chunk.finish_reason or chunk.error:
            last.append(chunk)
            ended.set()

    def wait() -> tuple[TokenChunk, list[int]]:
        assert ended.wait(DEADLINE_SECONDS)
        return last[0], sequence.output_ids

    request = greedy(question, max_tokens=max_tokens)
    sequence = loop.engine.sequence(request, None, None, take)
    sequence.stop_ids = set()
    loop.submit(sequence)
    return wait
