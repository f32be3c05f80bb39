"""`python -m benchmarks.sharing`: what serving and training on one base model cost each other.

The host's own loop over the device, bundled model: a run alone, then in the loop without requests, then requests alone,
then both. Readers are 8, each with a voice of its own, who ask again as soon as they are answered. Of the run whole
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
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.model.loop import DeviceLoop
from repertory.model.lora import Adapter
from repertory.model.training import TrainingRun
from repertory.settings import settings

READERS = 8
NEW_TOKENS = 64
STEPS = 6  # optimizer steps alone, the first of which are not timed
UNTIMED = 2
ALONE_SECONDS = 20.0
TOGETHER_SECONDS = 60.0


def main() -> None:
    device = base_module.detect_device()
    key = BaseKey(base_model=BUNDLED_MODEL, quantization="none", dtype="bf16")
    base = base_module.load(BUNDLED_MODEL, settings(), device, key, lambda phase: print(phase, file=sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(base, Path(folder))))


def measured(base: Base, folder: Path) -> dict[str, Any]:
    alone = steps_alone(base, run_spec(folder, "train_alone"))
    loop = DeviceLoop(base, settings().training_share)
    device = threading.Thread(target=loop.run_forever, daemon=True)
    device.start()
    serving, quanta = Durations(loop.engine.step), Durations(TrainingRun.step)
    loop.engine.step = serving  # type: ignore[method-assign]
    TrainingRun.step = lambda run: quanta(run)  # type: ignore[method-assign]
    readers = [Reader(loop, random_voice(base, seed).to(base.device, base.dtype)) for seed in range(READERS)]

    read_alone = read(readers, ALONE_SECONDS)
    step_alone = serving.taken()
    steps = Steps()
    loop.start_run(run_spec(folder, "train_shared"), steps)
    steps.until(STEPS)
    idle = steps.seconds()[:STEPS]
    quanta.taken()
    begin = len(steps.ends)
    read_together = read(readers, TOGETHER_SECONDS)
    together = steps.seconds()[begin:]
    quantum = quanta.taken()
    loop.stop_run("train_shared").result()
    loop.stop()
    device.join()
    usual = statistics.median(alone[UNTIMED:])
    gaps = sorted(read_together.gaps)
    return {
        "tokens_per_second_alone": round(read_alone.tokens_per_second, 1),
        "tokens_per_second_while_training": round(read_together.tokens_per_second, 1),
        "serving_keeps": round(read_together.tokens_per_second / read_alone.tokens_per_second, 3),
        "training_step_seconds_alone": round(usual, 3),
        "training_keeps_without_requests": round(usual / statistics.median(idle[UNTIMED:]), 3),
        "training_keeps_while_serving": round(usual / statistics.mean(together), 3) if together else 0.0,
        "gap_ms": {"p50": at(gaps, 0.5), "p95": at(gaps, 0.95), "p99": at(gaps, 0.99), "worst": at(gaps, 1)},
        "gap_ms_alone": {"p50": at(sorted(read_alone.gaps), 0.5), "p99": at(sorted(read_alone.gaps), 0.99)},
        "quantum_ms": {"p50": at(quantum, 0.5), "longest": at(quantum, 1), "count": len(quantum)},
        "step_ms": {"p50": at(step_alone, 0.5), "p99": at(step_alone, 0.99)},
    }


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
        """Sorted, since the last time."""
        seconds, self._seconds = sorted(self._seconds), []
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

    def until(self, count: int) -> None:
        with self._grown:
            assert self._grown.wait_for(lambda: len(self.ends) >= count, 300)

    def seconds(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.ends)]


@dataclass
class Read:
    seconds: float
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Reader:
    """Asks with one voice, again and again while it reads; when each token came."""

    def __init__(self, loop: DeviceLoop, voice: Adapter) -> None:
        self.loop, self.voice = loop, voice
        self.replies: list[list[float]] = []

    def read_until(self, end: float) -> None:
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


def read(readers: list[Reader], seconds: float) -> Read:
    """All at once, for about so many seconds; the tokens that came in them."""
    for reader in readers:
        reader.replies = []
    begin = time.perf_counter()
    threads = [threading.Thread(target=reader.read_until, args=(begin + seconds,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Read(seconds)
    for times in itertools.chain(*(reader.replies for reader in readers)):
        within = [moment for moment in times if moment < begin + seconds]
        found.tokens += len(within)
        found.gaps += [after - before for before, after in itertools.pairwise(within)]
    return found


def run_spec(folder: Path, name: str) -> RunSpec:
    data = folder / f"{name}.jsonl"
    work = workload("A", 96)
    data.write_text("".join(chat.model_dump_json() + "\n" for chat in work.conversations))
    return RunSpec(
        org_id="bench",
        training_id=name,
        base_model=BUNDLED_MODEL,
        conversations_path=str(data),
        output_dir=str(folder / name),
        checkpoint_dir=str(folder / f"{name}-checkpoints"),
        hyperparameters=Hyperparameters(batch_size=8, gradient_accumulation_steps=1, num_train_epochs=10),
        validation_split=0.02,
        system_prompt=work.system_prompt,
    )


def steps_alone(base: Base, spec: RunSpec) -> list[float]:
    """Seconds of optimizer steps of a run that nothing else is beside, not even the loop."""
    run, steps = TrainingRun(spec, base, Engine(base)), Steps()
    while len(steps.ends) <= STEPS:
        event = run.step()
        if event is not None:
            steps(event)
    run.close()
    return steps.seconds()


def at(ordered: list[float], share: float) -> float:
    """Milliseconds at this share of the sorted seconds."""
    return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1000, 1)


if __name__ == "__main__":
    main()
