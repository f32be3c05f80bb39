"""`python -m benchmarks.sharing`: what serving and training on one base model cost each other.

The host's own loop over the device, bundled model, in turn: a run without requests, requests while the run waits, and
both. Readers are 8, each with a voice of its own, who ask again as soon as they are answered. Of the run whole
optimizer steps are timed, of the requests the gaps between the tokens of a reply. Prints one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.voices import random_voice
from benchmarks.workloads import workload
from repertory.contracts import BUNDLED_MODEL, BaseKey, GenerateRequest, Hyperparameters, RunEvent, RunSpec
from repertory.data.conversations import Message
from repertory.model import base as base_module
from repertory.model.adapter import Adapter
from repertory.model.base import Base
from repertory.model.loop import DeviceLoop
from repertory.model.training import TrainingRun
from repertory.settings import settings

RUN = "train_bench"
READERS = 8
NEW_TOKENS = 64
ROUNDS = 3
STEPS = 3  # optimizer steps without requests, in each round
ALONE_SECONDS = 10.0
TOGETHER_SECONDS = 40.0


def main() -> None:
    device = base_module.detect_device()
    key = BaseKey(base_model=BUNDLED_MODEL, quantization="none", dtype="bf16")
    base = base_module.load(BUNDLED_MODEL, settings(), device, key, lambda phase: print(phase, file=sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(base, Path(folder))))


def measured(base: Base, folder: Path) -> dict[str, Any]:
    loop = DeviceLoop(base, settings().training_share)
    served, trained = Durations(loop.engine.step), Durations(TrainingRun.step)
    loop.engine.step = served  # type: ignore[method-assign]
    TrainingRun.step = lambda run: trained(run)  # type: ignore[method-assign]
    device = threading.Thread(target=loop.run_forever, daemon=True)
    device.start()
    readers = [Reader(loop, random_voice(base, seed).to(base.device, base.dtype)) for seed in range(READERS)]
    steps = Steps()
    loop.start_run(run_spec(folder), steps)
    steps.until(2)  # the first ones have new shapes

    alone, together = Read(), Read()
    idle_steps: list[float] = []
    shared_steps: list[float] = []
    busy: list[float] = []
    step_times: list[float] = []
    quanta: list[float] = []
    for _ in range(ROUNDS):
        first = steps.until(steps.count + 1)
        trained.taken()
        last = steps.until(first + STEPS)
        idle_steps += steps.seconds(first, last)
        busy.append(sum(trained.taken()) / sum(steps.seconds(first, last)))

        loop.timeshare.share, share = 0.0, loop.timeshare.share  # the run waits
        served.taken()
        alone.add(readers, ALONE_SECONDS)
        step_times += served.taken()

        loop.timeshare.share = share
        first = steps.count
        trained.taken()
        together.add(readers, TOGETHER_SECONDS)
        shared_steps += steps.seconds(first + 1, steps.count)
        quanta += trained.taken()
    loop.stop_run(RUN).result()
    loop.stop()
    device.join()
    quantum, step = percentiles(quanta), percentiles(step_times)
    gap = percentiles(together.gaps)
    return {
        "training_share": share,
        "tokens_per_second_alone": round(alone.tokens_per_second, 1),
        "tokens_per_second_while_training": round(together.tokens_per_second, 1),
        "serving_keeps": round(together.tokens_per_second / alone.tokens_per_second, 3),
        "training_step_seconds": round(statistics.mean(idle_steps), 3),
        "training_step_seconds_while_serving": round(statistics.mean(shared_steps), 3),
        "training_keeps_while_serving": round(statistics.mean(idle_steps) / statistics.mean(shared_steps), 3),
        "training_keeps_without_requests": round(statistics.mean(busy), 3),  # time in its own steps
        "gap_ms": gap,
        "gap_ms_alone": percentiles(alone.gaps),
        "quantum_ms": quantum,
        "step_ms": step,
        "p99_gap_over_quantum_and_step": round(gap["p99"] / (quantum["worst"] + step["p50"]), 3),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1000, 1)

    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "worst": at(1)}


class Durations:
    """Times every call of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._seconds: list[float] = []

    def __call__(self, *about: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self._function(*about)
        finally:
            self._seconds.append(time.perf_counter() - begin)

    def taken(self) -> list[float]:
        """Since the last time."""
        seconds, self._seconds = self._seconds, []
        return seconds


class Steps:
    """When the optimizer steps of a run ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self._grown = threading.Condition()

    def __call__(self, event: RunEvent) -> None:
        if event.error is not None:
            raise SystemExit(event.error.message)
        if event.kind == "step":
            with self._grown:
                self.ends.append(time.perf_counter())
                self._grown.notify_all()

    @property
    def count(self) -> int:
        return len(self.ends)

    def until(self, count: int) -> int:
        with self._grown:
            assert self._grown.wait_for(lambda: len(self.ends) >= count, 300)
        return count

    def seconds(self, first: int, last: int) -> list[float]:
        """Of the steps from the end of number `first` to that of number `last`, counted from 1."""
        return [after - before for before, after in itertools.pairwise(self.ends[first - 1 : last])]


@dataclass
class Read:
    """What came to the readers."""

    seconds: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def add(self, readers: list[Reader], seconds: float) -> None:
        """All of them at once, for so many seconds; what comes later does not count."""
        begin = time.perf_counter()
        threads = [threading.Thread(target=reader.read_until, args=(begin + seconds,)) for reader in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds += seconds
        for times in itertools.chain(*(reader.replies for reader in readers)):
            within = [moment for moment in times if moment < begin + seconds]
            self.tokens += len(within)
            self.gaps += [after - before for before, after in itertools.pairwise(within)]


class Reader:
    """Asks with one voice, again and again while it reads; when each token came."""

    def __init__(self, loop: DeviceLoop, voice: Adapter) -> None:
        self.loop, self.voice = loop, voice
        self.replies: list[list[float]] = []

    def read_until(self, end: float) -> None:
        self.replies = []
        while time.perf_counter() < end:
            ended = threading.Event()
            request = GenerateRequest(
                request_id="sharing",
                org_id=f"org{id(self.voice)}",
                adapter=None,
                messages=[Message(role="user", content=f"Tell me what you did last weekend, {len(self.replies)}.")],
                temperature=0,
                top_p=1,
                top_k=0,
                max_tokens=NEW_TOKENS,
            )
            sequence = self.loop.engine.sequence(
                request, self.voice, None, lambda chunk, ended=ended: chunk.finish_reason and ended.set()
            )
            sequence.stop_ids = set()
            times: list[float] = []
            append = sequence.append

            def timed(*token: Any, times: list[float] = times, append: Any = append) -> None:
                times.append(time.perf_counter())
                append(*token)

            sequence.append = timed  # type: ignore[method-assign]
            self.replies.append(times)
            self.loop.submit(sequence)
            assert ended.wait(300)


def run_spec(folder: Path) -> RunSpec:
    data = folder / "conversations.jsonl"
    work = workload("A", 96)
    data.write_text("".join(chat.model_dump_json() + "\n" for chat in work.conversations))
    return RunSpec(
        org_id="bench",
        training_id=RUN,
        base_model=BUNDLED_MODEL,
        conversations_path=str(data),
        output_dir=str(folder / RUN),
        checkpoint_dir=str(folder / "checkpoints"),
        hyperparameters=Hyperparameters(batch_size=8, gradient_accumulation_steps=1, num_train_epochs=10),
        validation_split=0.02,
        system_prompt=work.system_prompt,
    )


if __name__ == "__main__":
    main()
