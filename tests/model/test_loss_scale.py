"""fp16 with loss scaling: on a CPU too, so that what does not depend on the device is shown there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from repertory.contracts import RunEvent
from repertory.errors import JobFailed
from repertory.model import training
from repertory.model.base import Base
from repertory.model.microbatch import MicroBatch
from repertory_fixtures import LoadBase, MakeSpec, run_to_end, steps_of, weights_sha256


@pytest.fixture(scope="module")
def in_fp16(load_base: LoadBase) -> Base:
    return load_base(dtype="fp16")


def scales_of(events: list[RunEvent]) -> list[float]:
    return [event.data["loss_scale"] for event in events if event.kind == "step"]


def test_a_run_in_fp16_learns_what_one_in_fp32_does(base: Base, in_fp16: Base, make_spec: MakeSpec) -> None:
    events = run_to_end(in_fp16, make_spec(training_id="train_16"))
    assert events[-1].kind == "completed"
    assert steps_of(events) == pytest.approx(steps_of(run_to_end(base, make_spec(training_id="train_32"))), rel=0.02)
    assert set(scales_of(events)) == {training.LOSS_SCALE}
    assert events[-1].data["overflowed_steps"] == []


def test_other_precisions_are_not_scaled(base: Base, make_spec: MakeSpec) -> None:
    events = run_to_end(base, make_spec())
    assert all("loss_scale" not in event.data for event in events)
    assert "overflowed_steps" not in events[-1].data


def test_gradients_that_overflow_are_computed_again_with_half_the_scale(
    in_fp16: Base, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is lost to it: a job of a few steps would miss them. The rates and the other steps stay."""
    whole = run_to_end(in_fp16, make_spec(training_id="train_a"))
    monkeypatch.setattr(training, "LOSS_SCALE", 2.0**30)
    events = run_to_end(in_fp16, make_spec(training_id="train_b"))
    overflowed = events[-1].data["overflowed_steps"]
    assert len(overflowed) > 3
    assert set(overflowed) == {1}
    assert scales_of(events)[0] == 2.0 ** (30 - len(overflowed))
    assert steps_of(events) == pytest.approx(steps_of(whole), rel=0.02)
    progress = [event.progress for event in events]
    assert progress == sorted(progress)


def test_a_resume_goes_on_with_the_scale_and_ends_with_the_same_bits(
    in_fp16: Base, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale begins far too high and grows every other step, so that steps overflow all along."""
    monkeypatch.setattr(training, "LOSS_SCALE", 2.0**30)
    monkeypatch.setattr(training, "STEPS_TO_GROW", 2)
    whole, broken = (make_spec(26, training_id=name, save_steps=3, lora_dropout=0.1) for name in ("train_w", "train_b"))
    expected = run_to_end(in_fp16, whole)
    assert len(set(expected[-1].data["overflowed_steps"])) > 2
    before = run_to_end(in_fp16, broken, until=lambda event: event.data.get("step") == 5)
    after = run_to_end(in_fp16, broken)
    assert next(event.data for event in after if event.kind == "running")["resumed_from_step"] > 0
    assert steps_of(before) | steps_of(after) == steps_of(expected)
    assert scales_of(after) == scales_of(expected)[-len(scales_of(after)) :]
    assert after[-1].data["overflowed_steps"] == expected[-1].data["overflowed_steps"]
    assert weights_sha256(broken) == weights_sha256(whole)


@pytest.mark.fault("F17")
@pytest.mark.parametrize(("dtype", "advised"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_a_loss_that_is_no_number_ends_the_run_in_every_precision(
    load_base: LoadBase, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, dtype: str, advised: bool
) -> None:
    """No scale can mend it: the forward pass has no scale."""
    nll = MicroBatch.nll

    def broken(batch: MicroBatch, base: Base, routing: Any) -> torch.Tensor:
        values = nll(batch, base, routing)
        return values * float("nan") if torch.is_grad_enabled() else values

    monkeypatch.setattr(MicroBatch, "nll", broken)
    with pytest.raises(JobFailed) as failed:
        run_to_end(load_base(dtype=dtype), make_spec())
    assert failed.value.code == "diverged"
    assert "Lower learning_rate" in failed.value.cure
    assert ("dtype=bf16" in failed.value.cure) is advised


def test_gradients_that_no_scale_holds_end_the_run(
    in_fp16: Base, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    nll = MicroBatch.nll
    monkeypatch.setattr(MicroBatch, "nll", lambda batch, base, routing: nll(batch, base, routing) * 1e30)
    with pytest.raises(JobFailed) as failed:
        run_to_end(in_fp16, make_spec())
    assert failed.value.code == "diverged"
