"""No quantization, 8-bit and 4-bit do the whole of it on a CPU: train, die, resume, publish, and speak as PEFT does on
the same quantized base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from repertory.contracts import AdapterRef, BaseKey, Device, Hyperparameters
from repertory.model import base as base_module
from repertory.model.adapter import Adapter
from repertory.model.base import DTYPES, Base, _quantization
from repertory.model.engine import Engine
from repertory.model.scheduler import Sequence
from repertory.model.voices import read_voice
from repertory_fixtures import LoadBase, MakeSpec, greedy, run_to_end, steps_of, weights_sha256

FAMILY = "llama-gqa"
MODES = [("none", "fp32"), ("none", "bf16"), ("8bit", "fp32"), ("4bit", "fp32"), ("4bit", "bf16"), ("fp4", "fp32")]


def replies(base: Base, adapter: Adapter | None, ref: AdapterRef | None) -> tuple[list[int], list[list[int]]]:
    """A prompt, and its replies: read in chunks beside others' prompts, and then with its beginning found in the cache.

    In 8 bits alone, since bitsandbytes treats columns otherwise in which any token of the batch is large.
    """
    engine = Engine(base)
    engine.scheduler.step_tokens = 24

    def ask(question: str, adapter: Adapter | None, ref: AdapterRef | None) -> Sequence:
        request = greedy(question, max_tokens=24, org_id="org", adapter=ref)
        sequence = engine.sequence(request, adapter, "You are a helpful pirate.", lambda chunk: None)
        sequence.stop_ids = set()
        engine.submit(sequence)
        return sequence

    def drain() -> None:
        while engine.has_work:
            engine.step()

    first = ask("Tell me a joke", adapter, ref)
    if base.key.quantization != "8bit":
        ask("coffee or tea? " * 4, None, None)
        ask("ok", adapter, ref)
    drain()
    second = ask("Tell me a joke", adapter, ref)
    drain()
    assert second.reused_tokens > 0
    return first.prompt_ids, [first.output_ids, second.output_ids]


@pytest.mark.parametrize(("quantization", "dtype"), MODES)
def test_a_voice_is_trained_resumed_published_and_served_in_its_precision(
    load_base: LoadBase, cache: Path, make_spec: MakeSpec, quantization: str, dtype: str
) -> None:
    base = load_base(FAMILY, dtype, quantization)
    whole, broken = (
        make_spec(16, training_id=name, num_train_epochs=4, lora_dropout=0.1, save_steps=5)
        for name in ("train_whole", "train_broken")
    )
    events = run_to_end(base, whole)
    losses = steps_of(events)
    assert losses[len(losses)] < losses[1] - 0.5
    assert (events[-1].data["quantization"], events[-1].data["dtype"]) == (quantization, dtype)

    before = run_to_end(base, broken, until=lambda event: event.data.get("step") == 7)
    base = load_base(FAMILY, dtype, quantization)  # as after a restart
    after = run_to_end(base, broken)
    assert next(event.data for event in after if event.kind == "running")["resumed_from_step"] == 5
    assert steps_of(before) | steps_of(after) == losses
    assert weights_sha256(broken) == weights_sha256(whole)

    ref = AdapterRef(org_id="org", training_id=broken.training_id, path=broken.output_dir)
    voice = read_voice(ref, base)
    prompt, (replied, again) = replies(base, voice.adapter, ref)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        cache / "tiny" / FAMILY, dtype=DTYPES[dtype], device_map="cpu", quantization_config=_quantization(base.key)
    )
    for module in theirs.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its other kernel takes only some widths
    theirs = peft.PeftModel.from_pretrained(theirs, broken.output_dir).eval()
    if dtype == "fp32":
        ids = torch.tensor([prompt])
        whole_ids = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
        )
        assert replied == again == whole_ids[0, len(prompt) :].tolist()
        assert replied not in replies(base, None, None)[1]
    else:  # bf16 rounds differently from shape to shape, so likely tokens are compared instead of the likeliest
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + replied])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(replied)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 0.05 * logits.std()


def test_the_weights_are_what_the_mode_says(load_base: LoadBase) -> None:
    kinds = {"none": torch.nn.Linear, "8bit": Linear8bitLt, "4bit": Linear4bit, "fp4": Linear4bit}
    for quantization, kind in kinds.items():
        for layer in load_base(FAMILY, "bf16", quantization).layers.values():
            assert type(layer.base) is kind
            if isinstance(layer.base, Linear4bit):
                state = layer.base.weight.quant_state
                assert state.nested  # double quantization
                assert state.quant_type == ("fp4" if quantization == "fp4" else "nf4")
                assert layer.base.compute_dtype is torch.bfloat16


CPU = Device(kind="cpu", name="a CPU", memory_bytes=1, has_bf16=False)
CPU_16 = CPU.model_copy(update={"has_bf16": True})
CARD = Device(kind="cuda", name="a card", memory_bytes=1, has_bf16=True)
OLD_CARD = CARD.model_copy(update={"has_bf16": False})


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [
        (CPU, {}, ("none", "fp32")),
        (CPU_16, {"dtype": "auto"}, ("none", "bf16")),
        (CARD, {}, ("4bit", "bf16")),
        (OLD_CARD, {}, ("4bit", "fp16")),
        (CARD, {"use_4bit": False}, ("none", "bf16")),
        (CARD, {"use_8bit": True}, ("8bit", "bf16")),
        (CPU, {"use_4bit": True}, ("4bit", "fp32")),
        (CPU, {"use_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, ("4bit", "bf16")),
        (CPU, {"use_4bit": True, "dtype": "auto", "bnb_4bit_compute_dtype": "fp16"}, ("4bit", "fp16")),
        (CPU, {"use_4bit": True, "bnb_4bit_quant_type": "fp4"}, ("fp4", "fp32")),
        (CPU_16, {"bnb_4bit_compute_dtype": "fp16", "bnb_4bit_quant_type": "fp4"}, ("none", "bf16")),
    ],
)
def test_what_is_resolved_for_which_device(device: Device, asked: dict[str, Any], expected: tuple[str, str]) -> None:
    """All that changes what is computed is in the key, so a voice cannot be served in another precision."""
    key = BaseKey.resolve("m", Hyperparameters.model_validate(asked), device)
    assert (key.quantization, key.dtype) == expected


def test_auto_takes_bf16_where_this_processor_computes_it() -> None:
    able = torch.cpu.get_capabilities()
    device = base_module.detect_device()
    if device.kind == "cpu":
        assert device.has_bf16 == any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def test_two_precisions_at_once_are_refused_and_a_job_overrules_the_machine() -> None:
    with pytest.raises(ValidationError, match="differ"):
        Hyperparameters(use_4bit=True, dtype="fp32", bnb_4bit_compute_dtype="bf16")
    machine = Hyperparameters(dtype="fp32")
    merged = Hyperparameters(use_4bit=True, bnb_4bit_compute_dtype="bf16").over(machine)
    assert BaseKey.resolve("m", merged, CPU).dtype == "bf16"
    machine = Hyperparameters(bnb_4bit_compute_dtype="bf16")
    merged = Hyperparameters(use_4bit=True, dtype="fp32").over(machine)
    assert BaseKey.resolve("m", merged, CPU).dtype == "fp32"
