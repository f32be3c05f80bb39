"""AdamW in 8 bits: bitsandbytes has it for CPUs too, so all but the pages is shown here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from safetensors.torch import load_file

from repertory.errors import InvalidInput
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.base import Base
from repertory.model.hyperparameters import resolve
from repertory.model.memory import BatchShape
from repertory.model.optimizer import new_optimizer, state_of
from repertory.model.probe import demand
from repertory_fixtures import MakeSpec, run_to_end, steps_of, weights_sha256


def test_a_run_in_8_bits_learns_about_what_one_in_fp32_does(base: Base, make_spec: MakeSpec) -> None:
    in_fp32 = steps_of(run_to_end(base, make_spec(training_id="train_32")))
    events = run_to_end(base, make_spec(training_id="train_8", optimizer="adamw_8bit"))
    assert events[-1].kind == "completed"
    assert events[-1].data["hyperparameters"]["optimizer"] == "adamw_8bit"
    assert steps_of(events) == pytest.approx(in_fp32, rel=0.02)


@pytest.mark.parametrize("died_after", [2, 7])
def test_a_resume_brings_back_the_moments_in_their_bits(
    base: Base, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, died_after: int
) -> None:
    monkeypatch.setattr(AdamW8bit, "get_config", _least_of(256))
    how = {"save_steps": 5, "lora_r": 48, "optimizer": "adamw_8bit"}
    whole, broken = (make_spec(26, training_id=name, **how) for name in ("train_whole", "train_broken"))
    expected = steps_of(run_to_end(base, whole))
    before = run_to_end(base, broken, until=lambda event: event.data.get("step") == died_after)
    if died_after > 5:
        kept = load_file(Path(broken.checkpoint_dir) / "checkpoint-5" / "tensors.safetensors")
        assert sum(tensor.dtype is torch.uint8 for tensor in kept.values()) > len(kept) / 4
    after = run_to_end(base, broken)
    assert steps_of(before) | steps_of(after) == expected
    assert weights_sha256(broken) == weights_sha256(whole)


def _least_of(elements: int) -> Any:
    """So that the tensors of a tiny model are large enough to be kept in 8 bits."""
    config = AdamW8bit.get_config
    return lambda *about: config(*about) | {"min_8bit_size": elements}


def test_pages_are_refused_on_a_cpu(base: Base, make_spec: MakeSpec) -> None:
    with pytest.raises(InvalidInput) as refused:
        run_to_end(base, make_spec(optimizer="paged_adamw_8bit"))
    assert refused.value.code == "unsupported_optimizer"
    assert "adamw_8bit" in refused.value.cure


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_estimate_counts_the_bytes_of_its_state(base: Base, make_spec: MakeSpec, optimizer: str) -> None:
    rank = 80  # tensors of 80 x 48 stay in fp32, those of 80 x 64 do not
    config = LoraConfig(base_model="x", rank=rank, alpha=8, dropout=0, target_modules=["x"])
    adapter = Adapter.fresh(config, base.layers, list(base.layers), 0)
    spec = make_spec(optimizer=optimizer)
    train_config = resolve(spec.hyperparameters, base, 24, 0).model_copy(update={"lora_r": rank})
    stepped = new_optimizer(train_config, adapter.parameters)
    for parameter in adapter.parameters:
        parameter.grad = torch.ones_like(parameter)
    stepped.step()
    states = [state_of(stepped, parameter) for parameter in adapter.parameters]
    held = sum(tensor.nbytes for state in states for name, tensor in state.items() if name != "step")
    assert demand(base, train_config, BatchShape(0, (8,))).estimate().optimizer == held
