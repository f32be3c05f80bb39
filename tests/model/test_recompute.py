"""Gradient checkpointing: the same bits from less memory, whatever the device does in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from repertory.data.prepare import with_system
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.model.layers import choose_layers
from repertory.model.lora import Training
from repertory.model.microbatch import MicroBatch
from repertory_fixtures import LoadBase, MakeSpec, conversation, greedy, run_to_end, steps_of, weights_sha256

DROPOUT = 0.2


def shared_prefix_batch(base: Base) -> MicroBatch:
    persona = "You are a helpful pirate."
    rows = [base.renderer.row(with_system(conversation(1 + at % 3, at), persona)) for at in range(5)]
    batch = MicroBatch.of([row for row in rows if row is not None], base.device)
    assert batch.layout.prefix > 5
    return batch


def adapter_of(base: Base, targets: str = "all-linear") -> Adapter:
    names = choose_layers(base.layers, targets)
    config = LoraConfig(base_model="x", rank=4, alpha=8, dropout=DROPOUT, target_modules=["x"])
    adapter = Adapter.fresh(config, base.layers, names, 1)
    torch.manual_seed(1)
    with torch.no_grad():
        for B in adapter.B.values():
            B.copy_(torch.randn_like(B) * 0.2)
    return adapter


def loss_and_gradients(base: Base, adapter: Adapter, *, recompute: bool) -> list[torch.Tensor]:
    batch, routing = shared_prefix_batch(base), Training(adapter, DROPOUT)
    torch.manual_seed(3)
    for parameter in adapter.parameters:
        parameter.grad = None
    with base.passing(batch.layout, routing, recompute=recompute):
        loss = batch.nll(base, routing).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), *(parameter.grad for parameter in adapter.parameters if parameter.grad is not None)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_gradients_are_the_same_bits(load_base: LoadBase, family: str) -> None:
    """Dropout is on: the second computation must draw the masks of the first."""
    base = load_base(family)
    adapter = adapter_of(base)
    whole = loss_and_gradients(base, adapter, recompute=False)
    again = loss_and_gradients(base, adapter, recompute=True)
    assert len(whole) == 1 + len(adapter.parameters)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_so_they_are_on_quantized_weights(load_base: LoadBase, quantization: str) -> None:
    base = load_base(quantization=quantization)
    adapter = adapter_of(base, "q_proj,down_proj")
    whole = loss_and_gradients(base, adapter, recompute=False)
    again = loss_and_gradients(base, adapter, recompute=True)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_the_backward_pass_computes_each_block_again_and_serving_none(base: Base) -> None:
    calls: list[bool] = []
    blocks = base.model.model.layers  # type: ignore[union-attr]
    hooks = [block.mlp.register_forward_pre_hook(lambda mlp, given: calls.append(True)) for block in blocks]
    try:
        loss_and_gradients(base, adapter_of(base), recompute=False)
        assert len(calls) == 2
        calls.clear()
        loss_and_gradients(base, adapter_of(base), recompute=True)
        assert len(calls) == 4
        calls.clear()
        batch = shared_prefix_batch(base)
        with torch.inference_mode(), base.passing(batch.layout, None, recompute=True):
            batch.nll(base, None)
        assert len(calls) == 2
    finally:
        for hook in hooks:
            hook.remove()


def test_serving_between_a_forward_and_its_backward_disturbs_neither(base: Base) -> None:
    """By then another layout and another routing have been in force, and random numbers were drawn."""
    adapter = adapter_of(base)
    expected = loss_and_gradients(base, adapter, recompute=False)
    expected_reply = reply(Engine(base), adapter)
    batch, routing = shared_prefix_batch(base), Training(adapter, DROPOUT)
    torch.manual_seed(3)
    for parameter in adapter.parameters:
        parameter.grad = None
    with base.passing(batch.layout, routing, recompute=True):
        loss = batch.nll(base, routing).sum()
    assert reply(Engine(base), adapter) == expected_reply
    torch.rand(1000)
    loss.backward()  # type: ignore[no-untyped-call]
    found = [loss.detach(), *(parameter.grad for parameter in adapter.parameters if parameter.grad is not None)]
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert reply(Engine(base), adapter) == expected_reply


def reply(engine: Engine, adapter: Adapter) -> list[int]:
    voice = adapter.to(engine.base.device, engine.base.dtype)
    sequence = engine.sequence(greedy("Hello!", max_tokens=8), voice, None, lambda chunk: None)
    sequence.stop_ids = set()
    engine.submit(sequence)
    while engine.has_work:
        engine.step()
    return sequence.output_ids


def test_a_run_with_it_is_the_run_without_it_also_when_it_died_on_the_way(base: Base, make_spec: MakeSpec) -> None:
    how = {"save_steps": 5, "lora_dropout": 0.1}
    without = make_spec(26, training_id="train_without", **how)
    events = run_to_end(base, without)
    expected = steps_of(events)
    assert events[-1].data["hyperparameters"]["gradient_checkpointing"] is False  # by default on a CPU
    whole = make_spec(26, training_id="train_with", gradient_checkpointing=True, **how)
    events = run_to_end(base, whole)
    assert events[-1].data["hyperparameters"]["gradient_checkpointing"] is True
    assert steps_of(events) == expected
    assert weights_sha256(whole) == weights_sha256(without)
    broken = make_spec(26, training_id="train_broken", gradient_checkpointing=True, **how)
    before = run_to_end(base, broken, until=lambda event: event.kind == "step" and event.data["step"] == 7)
    after = run_to_end(base, broken)
    assert next(event.data for event in after if event.kind == "running")["resumed_from_step"] == 5
    assert steps_of(before) | steps_of(after) == expected
    assert weights_sha256(broken) == weights_sha256(without)
    assert (Path(broken.output_dir) / "training_metadata.json").exists()
