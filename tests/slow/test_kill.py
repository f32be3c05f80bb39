"""kill -9 while a run learns and replies are generated: it ends with the bits of a run that nothing happened to."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from repertory.contracts import RunSpec
from repertory_fixtures import MakeSpec
from running_host import RunningHost

FLAGS = ("--quantization", "none", "--dtype", "fp32")


@contextmanager
def host_at(cache: Path, socket: Path) -> Iterator[RunningHost]:
    host = RunningHost(cache, socket, "tiny/llama-gqa", *FLAGS)
    try:
        assert host.until("ready", "failed")["state"] == "ready"
        yield host
    finally:
        host.process.kill()
        host.close()


@contextmanager
def replies_meanwhile(host: RunningHost) -> Iterator[list[str]]:
    """Somebody talks to the bare base model all the time."""
    said: list[str] = []
    enough = threading.Event()

    def talk() -> None:
        while not enough.is_set():
            try:
                chunks = host.generate(None, max_tokens=20, temperature=1, seed=len(said))
            except (httpx.HTTPError, OSError):  # it was killed
                return
            said.append("".join(chunk.get("text", "") for chunk in chunks))

    talking = threading.Thread(target=talk)
    talking.start()
    try:
        yield said
    finally:
        enough.set()
        talking.join()


@pytest.fixture(scope="module")
def survivor(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHost]:
    with host_at(cache, tmp_path_factory.mktemp("survivor") / "h.sock") as host:
        yield host


def until_killed(host: RunningHost, spec: RunSpec, at: int | str) -> Iterator[dict[str, Any]]:
    """The run's events; its host is killed at the first of kind `at`, or at step `at`."""
    try:
        for event in host.run(spec):
            yield event
            if at in (event["kind"], event["data"].get("step") if event["kind"] == "step" else None):
                host.process.kill()
    except httpx.RemoteProtocolError:
        return


def losses_and_voice(events: list[dict[str, Any]], spec: RunSpec) -> tuple[dict[int, float], str]:
    losses = {event["data"]["step"]: event["data"]["loss"] for event in events if event["kind"] == "step"}
    weights = (Path(spec.output_dir) / "adapter_model.safetensors").read_bytes()
    return losses, hashlib.sha256(weights).hexdigest()


@pytest.mark.fault("F1", "F23")
# Checkpoints at 4, 8 and 12; the epoch's end is at 6.
@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 4, 5, 6, 12, "checkpoint", "evaluating"])
def test_a_run_whose_host_is_killed_ends_with_the_same_bits(
    cache: Path, survivor: RunningHost, make_spec: MakeSpec, tmp_path: Path, at: int | str
) -> None:
    options = {"save_steps": 4, "eval_steps": 3, "lora_dropout": 0.1}
    whole = make_spec(26, training_id=f"train_whole_{at}", **options)
    expected = losses_and_voice(list(survivor.run(whole)), whole)
    assert len(expected[0]) == 12

    spec = make_spec(26, training_id=f"train_killed_{at}", **options)
    with host_at(cache, tmp_path / "h.sock") as host, replies_meanwhile(host) as said:
        before = list(until_killed(host, spec, at))
        assert said
    assert before[-1]["kind"] != "completed"

    with replies_meanwhile(survivor) as said:
        after = list(survivor.run(spec))
        assert said
    resumed_from = next(event["data"] for event in after if event["kind"] == "running").get("resumed_from_step")
    kept = [event["data"]["step"] for event in before if event["kind"] == "checkpoint"]
    assert (resumed_from or 0) >= max(kept, default=0), "a checkpoint that was told of is lost"
    losses, voice = losses_and_voice(before + after, spec)
    assert (losses, voice) == expected
