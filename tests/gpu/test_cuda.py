"""What only a graphics card can show: `make test-gpu`. docs/gpu.md says which of these have been run, and on what."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import tiny
from repertory.contracts import AdapterRef, BaseKey, RunEvent, TokenChunk
from repertory.data.prepare import with_system
from repertory.model import base as base_module
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.attention import Scoring, causal_attention
from repertory.model.base import Base
from repertory.model.hyperparameters import resolve
from repertory.model.loop import DeviceLoop
from repertory.model.lora import Training
from repertory.model.memory import BatchShape
from repertory.model.microbatch import MicroBatch
from repertory.model.probe import demand
from repertory.model.voices import read_voice
from repertory.settings import Settings
from repertory_fixtures import MakeSpec, conversation, greedy, run_to_end, steps_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEADLINE_SECONDS = 120.0
Load = Callable[..., Base]


@pytest.fixture(scope="module")
def load(cache: Path) -> Load:
    def loaded(kind: str = "cuda", family: str = "llama-gqa", dtype: str = "bf16", quantization: str = "none") -> Base:
        device = base_module.detect_device()
        if kind == "cpu":
            device = device.model_copy(update={"kind": "cpu"})
        key = BaseKey.model_validate({"base_model": f"tiny/{family}", "quantization": quantization, "dtype": dtype})
        settings = Settings(_env_file=None, model_cache_dir=cache)
        return base_module.load(key.base_model, settings, device, key, lambda phase: None)

    return loaded


def adapter_of(base: Base) -> Adapter:
    """The same numbers on every device."""
    config = LoraConfig(base_model="x", rank=4, alpha=8, dropout=0, target_modules=["x"])
    adapter = Adapter.fresh(config, base.layers, list(base.layers), 1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for B in adapter.B.values():
            B.copy_(torch.randn(B.shape, generator=generator) * 0.2)
    return adapter


def batch_of(base: Base, rows: int = 5) -> MicroBatch:
    """Rows behind a shared prefix."""
    found = [base.renderer.row(with_system(conversation(1 + at % 3, at), "You are a pirate.")) for at in range(rows)]
    return MicroBatch.of([row for row in found if row is not None], base.device)


def loss_and_gradients(base: Base, recompute: bool = False, rows: int = 5) -> tuple[float, torch.Tensor]:
    adapter, batch = adapter_of(base), batch_of(base, rows)
    routing = Training(adapter)
    with base.passing(batch.layout, routing, recompute=recompute):
        loss = batch.nll(base, routing).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad.flatten().cpu() for parameter in adapter.parameters if parameter.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_gradients_are_those_of_a_cpu(load: Load, family: str) -> None:
    """fp32 without TF32: fused attention on the card, written-out attention on the CPU."""
    on_card, on_cpu = load("cuda", family, "fp32"), load("cpu", family, "fp32")
    torch.backends.cuda.matmul.allow_tf32 = False  # the next base model that is loaded sets it again
    (loss, gradients), (expected_loss, expected) = loss_and_gradients(on_card), loss_and_gradients(on_cpu)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert (gradients - expected).norm() <= 1e-3 * expected.norm()


def test_tf32_is_on_for_what_is_computed_in_fp32(load: Load) -> None:
    load()
    assert torch.backends.cuda.matmul.allow_tf32


def test_plain_causal_rows_go_through_flash_attention_and_masked_ones_through_the_efficient_kernel() -> None:
    """Each kernel alone is allowed: torch raises where it cannot take what it is given."""
    query = torch.randn(2, 4, 64, 64, device="cuda", dtype=torch.float16)
    key = torch.randn(2, 2, 64, 64, device="cuda", dtype=torch.float16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        causal_attention(query, key, key, 2, Scoring(scale=0.125))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        causal_attention(query[:, :, :32], key, key, 2, Scoring(scale=0.125))
        causal_attention(query, key, key, 2, Scoring(scale=0.125, window=16))


def test_bf16_training_learns_what_a_cpu_learns(load: Load, make_spec: MakeSpec) -> None:
    on_card = run_to_end(load("cuda"), make_spec(training_id="train_card", lora_dropout=0))
    on_cpu = run_to_end(load("cpu"), make_spec(training_id="train_cpu", lora_dropout=0))
    assert on_card[-1].kind == "completed"
    assert steps_of(on_card) == pytest.approx(steps_of(on_cpu), rel=0.03)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantized_job_from_conversations_to_a_voice(load: Load, make_spec: MakeSpec, quantization: str) -> None:
    base = load("cuda", quantization=quantization)
    spec = make_spec(num_train_epochs=4)
    events = run_to_end(base, spec)
    assert events[-1].kind == "completed"
    assert events[-1].data["hyperparameters"]["gradient_checkpointing"] is True
    losses = list(steps_of(events).values())
    assert losses[-1] < losses[0] - 0.5
    read_voice(AdapterRef(org_id="org", training_id="train_1", path=spec.output_dir), base)


def test_fp16_is_trained_with_loss_scaling(load: Load, make_spec: MakeSpec) -> None:
    events = run_to_end(load("cuda", dtype="fp16"), make_spec())
    assert events[-1].kind == "completed"
    assert all(event.data["loss_scale"] > 0 for event in events if event.kind == "step")


def test_the_paged_optimizer_learns_and_resumes(load: Load, make_spec: MakeSpec) -> None:
    """Rank 48 and few tensors: what has fewer than 100,000 elements is not paged, so this shows state and resume."""
    base = load("cuda")
    how: dict[str, Any] = {"save_steps": 5, "optimizer": "paged_adamw_8bit", "lora_r": 48, "lora_dropout": 0}
    expected = steps_of(run_to_end(base, make_spec(26, training_id="train_whole", **how)))
    broken = make_spec(26, training_id="train_broken", **how)
    before = run_to_end(base, broken, until=lambda event: event.data.get("step") == 7)
    after = run_to_end(base, broken)
    assert next(event.data for event in after if event.kind == "running")["resumed_from_step"] == 5
    assert steps_of(before) | steps_of(after) == pytest.approx(expected, rel=0.02)


def test_a_resume_goes_on_with_the_same_dropout(load: Load, make_spec: MakeSpec) -> None:
    """Its masks come from the card's own generator. Not to the bit: fused attention adds up gradients in any order."""
    base = load("cuda")
    whole, broken = (make_spec(26, training_id=name, save_steps=5, lora_dropout=0.1) for name in ("train_w", "train_b"))
    expected = steps_of(run_to_end(base, whole))
    before = run_to_end(base, broken, until=lambda event: event.data.get("step") == 7)
    after = run_to_end(base, broken)
    assert steps_of(before) | steps_of(after) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_gradient_checkpointing_takes_less_and_changes_nothing(load: Load, quantization: str) -> None:
    base = load("cuda", quantization=quantization)
    peaks, found = [], []
    for recompute in (False, True):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(loss_and_gradients(base, recompute, rows=60))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.8 * peaks[0]
    assert found[0][0] == found[1][0]
    assert (found[0][1] - found[1][1]).norm() <= 1e-2 * found[0][1].norm()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_is_what_the_card_allocates(load: Load, make_spec: MakeSpec, recompute: bool) -> None:
    base = load("cuda")
    adapter, batch = adapter_of(base), batch_of(base, rows=200)
    config = resolve(make_spec(lora_dropout=0.0, lora_r=4).hyperparameters, base, 200, batch.layout.prefix)
    config = config.model_copy(update={"gradient_checkpointing": recompute})
    shape = BatchShape(batch.layout.prefix, batch.layout.lengths)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    routing = Training(adapter)
    with base.passing(batch.layout, routing, recompute=recompute):
        batch.nll(base, routing).sum().backward()  # type: ignore[no-untyped-call]
    measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(demand(base, config, shape).activations, rel=0.3)


@pytest.fixture
def memory_cap() -> Iterator[Callable[[int], None]]:
    """torch refuses to reserve more than this, as a smaller card would."""
    total = torch.cuda.get_device_properties(0).total_memory

    def cap(count: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(count / total)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_batch(
    load: Load, make_spec: MakeSpec, memory_cap: Callable[[int], None]
) -> None:
    """The allocator's own error, not one that a test has raised."""
    base = load("cuda")
    how: dict[str, Any] = {"batch_size": 64, "gradient_accumulation_steps": 1, "num_train_epochs": 2}
    how |= {"lora_dropout": 0, "gradient_checkpointing": False}
    torch.cuda.reset_peak_memory_stats()
    whole = run_to_end(base, make_spec(142, training_id="train_whole", **how))
    most = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    memory_cap((torch.cuda.memory_reserved() + most) // 2)
    cut = run_to_end(base, make_spec(142, training_id="train_cut", **how))
    assert cut[-1].kind == "completed"
    assert any("Memory ran out" in warning for warning in cut[-1].data["warnings"])
    assert steps_of(cut) == pytest.approx(steps_of(whole), rel=0.05)


def test_training_and_serving_share_the_card(load: Load, make_spec: MakeSpec) -> None:
    loop = DeviceLoop(load("cuda", quantization="4bit"), training_share=0.2)
    device = threading.Thread(target=loop.run_forever, daemon=True)
    device.start()
    events: list[RunEvent] = []
    ended = threading.Event()

    def hear(event: RunEvent) -> None:
        events.append(event)
        if event.kind in ("completed", "failed"):
            ended.set()

    loop.start_run(make_spec(num_train_epochs=10), hear)
    replies = []
    while not ended.is_set():
        replies.append(ask(loop))
    loop.stop()
    device.join(DEADLINE_SECONDS)
    assert events[-1].kind == "completed"
    assert len(replies) > 1
    assert all(reply == replies[0] for reply in replies)


def ask(loop: DeviceLoop) -> list[int]:
    """A greedy reply of the base."""
    ended = threading.Event()

    def take(chunk: TokenChunk) -> None:
        if chunk.finish_reason or chunk.error:
            ended.set()

    request = greedy("Hello!", max_tokens=8)
    sequence = loop.engine.sequence(request, None, None, take)
    loop.submit(sequence)
    assert ended.wait(DEADLINE_SECONDS)
    return sequence.output_ids
