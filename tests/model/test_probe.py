from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from repertory.contracts import RunEvent, RunSpec
from repertory.errors import InsufficientMemory
from repertory.model.adapter import Adapter
from repertory.model.base import Base
from repertory.model.hyperparameters import resolve
from repertory.model.microbatch import MicroBatch
from repertory.model.plan import Cut, Plan
from repertory.model.probe import is_out_of_memory
from repertory_fixtures import MakeSpec, conversation, run_to_end, steps_of, weights_sha256

ON_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ...")


class Shortage:
    """Makes the n-th pass with gradient fail for want of memory, and every one with more rows than `most_rows`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: set[int] = set()
        self.most_rows = 10**9
        self.error: Exception = ON_CUDA
        self.passes = 0
        nll = MicroBatch.nll

        def short(batch: MicroBatch, base: Base, routing: Any) -> torch.Tensor:
            if torch.is_grad_enabled():
                self.passes += 1
                if self.passes in self.failing or len(batch.layout.lengths) > self.most_rows:
                    raise self.error
            return nll(batch, base, routing)

        monkeypatch.setattr(MicroBatch, "nll", short)


@pytest.fixture
def shortage(monkeypatch: pytest.MonkeyPatch) -> Shortage:
    return Shortage(monkeypatch)


def cut_spec(make_spec: MakeSpec, training_id: str) -> RunSpec:
    """One micro-batch of 4 rows a step, so that pass 1 is the probe and pass 1 + n is step n: 12 steps."""
    return make_spec(
        26, training_id=training_id, save_steps=5, lora_dropout=0.1, batch_size=4, gradient_accumulation_steps=1
    )


def warnings_of(events: list[RunEvent]) -> list[str]:
    return [warning for event in events for warning in event.data.get("warnings", []) if "Memory ran out" in warning]


def steps_until(step: int) -> Callable[[RunEvent], bool]:
    return lambda event: event.kind == "step" and event.data["step"] == step


def test_the_probe_leaves_no_trace(base: Base, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = steps_of(run_to_end(base, make_spec(training_id="train_a", lora_dropout=0.1)))
    monkeypatch.setattr("repertory.model.training.probe", no_probe)
    unprobed = make_spec(training_id="train_b", lora_dropout=0.1)
    assert steps_of(run_to_end(base, unprobed)) == expected


def no_probe(base: Base, plan: Plan, scratch: Adapter) -> Any:
    yield
    return 1000.0


def test_the_random_state_is_as_before_the_probe(base: Base, make_spec: MakeSpec) -> None:
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    run_to_end(base, make_spec(lora_dropout=0.1), until=lambda event: event.kind == "running")
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_time_that_is_left_is_known_before_the_first_step(base: Base, make_spec: MakeSpec) -> None:
    events = run_to_end(base, make_spec(), until=steps_until(3))
    left = [event.data["eta_seconds"] for event in events if event.kind in ("running", "step")]
    assert len(left) == 4
    assert all(seconds > 0 for seconds in left)


@pytest.mark.fault("F16")
@pytest.mark.parametrize("error", [ON_CUDA, ON_CPU, MemoryError()])
def test_out_of_memory_in_a_step_halves_the_micro_batch_and_keeps_the_effective_batch(
    base: Base, make_spec: MakeSpec, shortage: Shortage, error: Exception
) -> None:
    spec = cut_spec(make_spec, "train_1")
    whole = run_to_end(base, spec)
    shortage.passes, shortage.failing, shortage.error = 0, {1 + 4}, error
    cut = run_to_end(base, cut_spec(make_spec, "train_2"))
    assert cut[-1].kind == "completed"
    # The same gradients but for rounding, since the rows of each step are the same: equal to the 3rd step, near after.
    assert [steps_of(cut)[step] for step in (1, 2, 3)] == [steps_of(whole)[step] for step in (1, 2, 3)]
    assert steps_of(cut)[4] == pytest.approx(steps_of(whole)[4], rel=0.2)  # dropout draws other masks
    assert len(warnings_of(cut)) == 2  # when it happened, and with the version
    assert "from step 4 on" in warnings_of(cut)[0]
    kinds = [event.kind for event in cut]
    assert kinds.count("step") == 12
    progress = [event.progress for event in cut]
    assert progress == sorted(progress)


@pytest.mark.parametrize("died_after", [3, 4, 6, 11])
def test_a_resume_replays_the_cut_and_ends_with_the_same_bits(
    base: Base, make_spec: MakeSpec, shortage: Shortage, died_after: int
) -> None:
    shortage.failing = {1 + 4}
    whole = cut_spec(make_spec, "train_whole")
    expected = steps_of(run_to_end(base, whole))
    broken = cut_spec(make_spec, "train_broken")
    shortage.passes = 0
    if died_after == 3:  # with the cut recorded, and nothing computed with it
        before = run_to_end(base, broken, until=lambda event: event.kind == "checkpoint")
    else:
        before = run_to_end(base, broken, until=steps_until(died_after))
    shortage.failing = set()  # the memory is there again, and the cut must hold all the same
    after = run_to_end(base, broken)
    assert steps_of(before) | steps_of(after) == expected
    assert weights_sha256(broken) == weights_sha256(whole)
    assert len(set(warnings_of(after))) == 1


def test_a_cut_by_the_probe_is_replayed_even_before_the_first_checkpoint_of_a_step(
    base: Base, make_spec: MakeSpec, shortage: Shortage
) -> None:
    shortage.failing = {1}
    whole = cut_spec(make_spec, "train_whole")
    expected = steps_of(run_to_end(base, whole))
    shortage.passes = 0
    broken = cut_spec(make_spec, "train_broken")
    before = run_to_end(base, broken, until=steps_until(2))
    shortage.failing = set()
    after = run_to_end(base, broken)
    assert next(event.data for event in after if event.kind == "running")["resumed_from_step"] == 0
    assert steps_of(before) | steps_of(after) == expected
    assert weights_sha256(broken) == weights_sha256(whole)


def test_the_micro_batch_shrinks_to_one_row_if_need_be(base: Base, make_spec: MakeSpec, shortage: Shortage) -> None:
    shortage.most_rows = 1
    events = run_to_end(base, cut_spec(make_spec, "train_1"))
    assert events[-1].kind == "completed"
    assert len(set(warnings_of(events))) >= 2


def test_where_one_row_does_not_fit_the_job_fails_with_numbers_and_cure(
    base: Base, make_spec: MakeSpec, shortage: Shortage
) -> None:
    shortage.most_rows = 0
    with pytest.raises(InsufficientMemory, match=r"a row of \d+ tokens takes about .* GiB") as refused:
        run_to_end(base, make_spec())
    assert refused.value.code == "insufficient_memory"
    assert "max_seq_length" in refused.value.cure or "smaller base model" in refused.value.cure


def test_what_the_estimate_says_cannot_fit_is_refused_without_trying(
    base: Base, make_spec: MakeSpec, shortage: Shortage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "memory_limit_bytes", 10_000)
    with pytest.raises(InsufficientMemory):
        run_to_end(base, make_spec())
    assert shortage.passes == 0


def test_a_resumed_run_is_not_probed(base: Base, make_spec: MakeSpec, shortage: Shortage) -> None:
    spec = cut_spec(make_spec, "train_1")
    run_to_end(base, spec, until=steps_until(6))
    shortage.passes = 0
    run_to_end(base, spec, until=steps_until(6))
    assert shortage.passes == 1  # step 6 alone


def test_another_error_is_not_taken_for_lack_of_memory(base: Base, make_spec: MakeSpec, shortage: Shortage) -> None:
    shortage.failing, shortage.error = {3}, RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        run_to_end(base, make_spec())
    assert not is_out_of_memory(InsufficientMemory("ours, and final"))


def test_a_cut_takes_hold_at_its_step_and_splits_its_micro_batch(base: Base, make_spec: MakeSpec) -> None:
    rows = [row for at in range(16) if (row := base.renderer.row(conversation(1 + at % 4, at).messages)) is not None]
    config = resolve(make_spec(batch_size=4).hyperparameters, base, len(rows), 0)
    plan = Plan(rows, config)
    largest = plan.largest(2, 2, lambda batch: len(batch.lengths))
    assert plan.cut(2, largest)
    again = Plan(rows, config, [Cut(cut.from_step, cut.suffix_tokens) for cut in plan.cuts])
    assert again.microbatches(1) == Plan(rows, config).microbatches(1)
    assert again.microbatches(2) == plan.microbatches(2)
    assert largest not in again.microbatches(2)
    assert sorted(at for microbatch in again.microbatches(2) for at in microbatch) == sorted(again.rows_of(2))
    assert not plan.cut(2, largest[:1])


def test_gradients_of_a_step_that_broke_off_are_gone(base: Base, make_spec: MakeSpec, shortage: Shortage) -> None:
    """Two micro-batches a step, of which the second fails: the first one's gradient must not count twice."""
    values: dict[str, Any] = {"lora_dropout": 0.0, "batch_size": 8, "gradient_accumulation_steps": 1}
    whole = run_to_end(base, make_spec(training_id="train_a", **values), until=steps_until(2))
    per_step = shortage.passes // 2
    shortage.passes, shortage.failing = 0, {1 + per_step}
    cut = run_to_end(base, make_spec(training_id="train_b", **values), until=steps_until(2))
    assert len(warnings_of(cut)) == 1
    assert steps_of(cut) == pytest.approx(steps_of(whole), rel=1e-5)


def test_the_metadata_of_the_version_says_what_happened(base: Base, make_spec: MakeSpec, shortage: Shortage) -> None:
    shortage.failing = {1 + 4}
    spec = cut_spec(make_spec, "train_1")
    run_to_end(base, spec)
    assert "Memory ran out" in (Path(spec.output_dir) / "training_metadata.json").read_text()
