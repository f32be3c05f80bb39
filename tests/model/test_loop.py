from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from repertory.contracts import GenerateRequest, RunEvent, TokenChunk
from repertory.data.conversations import Message
from repertory.errors import NotFound
from repertory.model.base import Base
from repertory.model.loop import DeviceLoop
from repertory.model.training import TrainingRun
from repertory_fixtures import MakeSpec

DEADLINE_SECONDS = 60.0


@pytest.fixture
def loop(base: Base) -> Iterator[DeviceLoop]:
    loop = DeviceLoop(base)
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


def test_a_broken_forward_pass_is_told_and_the_loop_goes_on(loop: DeviceLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(type(loop.engine), "step", lambda engine: 1 / 0)
        error = ask(loop).error
    assert error is not None
    assert error.code == "internal_error"
    assert ask(loop).error is None


def ask(loop: DeviceLoop, max_tokens: int = 5) -> TokenChunk:
    """The last chunk of a reply that does not stop by itself."""
    ended = threading.Event()
    last: list[TokenChunk] = []

    def take(chunk: TokenChunk) -> None:
        if chunk.finish_reason or chunk.error:
            last.append(chunk)
            ended.set()

    request = GenerateRequest(
        request_id="r",
        org_id="o",
        adapter=None,
        messages=[Message(role="user", content="Hello!")],
        temperature=0,
        top_p=1,
        top_k=0,
        max_tokens=max_tokens,
    )
    sequence = loop.engine.sequence(request, None, None, take)
    sequence.stop_ids = set()
    loop.submit(sequence)
    assert ended.wait(DEADLINE_SECONDS)
    return last[0]
