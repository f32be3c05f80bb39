"""Every tested architecture does the whole of it, measured against PEFT: train, reload, speak in one mixed batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from repertory import architectures
from repertory.contracts import AdapterRef, BaseKey, RunSpec
from repertory.data.conversations import Conversation, Message
from repertory.data.render import NO_LABEL, Row
from repertory.errors import BaseModelUnavailable
from repertory.model import base as base_module
from repertory.model.adapter import Adapter
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.model.lora import Training
from repertory.model.microbatch import MicroBatch
from repertory.model.prefixes import BLOCK_TOKENS
from repertory.model.scheduler import Sequence
from repertory.model.voices import read_voice
from repertory.settings import Settings
from repertory_fixtures import LoadBase, MakeSpec, greedy, rows_of, run_to_end, steps_of

QUESTIONS = ["Hello!", "Tell me a joke about the weather and about music " * 2, "ok", "coffee or tea?" * 5, "home", "?"]
ANSWERS = {"pirate": "Arr, matey! The rum is gone.", "poet": "soft falls the evening, tea and music, friends at home"}


def told_by(voice: str) -> list[Conversation]:
    """Longer than the tiny models' windows, and with a long beginning in common."""
    return [
        Conversation(
            messages=[
                Message(role="user", content=f"{QUESTIONS[at % 6]} {at}"),
                Message(role="assistant", content=ANSWERS[voice]),
            ]
        )
        for at in range(12)
    ]


def trained(base: Base, make_spec: MakeSpec, voice: str, **hyperparameters: Any) -> RunSpec:
    values = {"num_train_epochs": 4, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "lora_dropout": 0}
    spec = make_spec(training_id=f"train_{voice}", conversations=told_by(voice), **values | hyperparameters).model_copy(
        update={"base_model": base.key.base_model}
    )
    losses = list(steps_of(run_to_end(base, spec)).values())
    assert losses[-1] < losses[0] - 0.1
    return spec


def in_peft(cache: Path, family: str, adapter: str | Path | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(cache / "tiny" / family, attn_implementation="eager")
    return model.eval() if adapter is None else peft.PeftModel.from_pretrained(model, adapter).eval()


# Of the others the whole of it takes a minute more; their losses and gradients are compared further down.
ALWAYS = ("llama", "llama-gqa", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "gpt-neox", "gpt2", "qwen2-moe")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in tiny.FAMILIES]
)
def test_two_voices_trained_and_reloaded_speak_beside_the_base_as_in_peft(
    load_base: LoadBase, cache: Path, make_spec: MakeSpec, family: str
) -> None:
    base = load_base(family)
    specs = [trained(base, make_spec, "pirate"), trained(base, make_spec, "poet", lora_r=6)]
    # Another copy of the base, as after a restart.
    base = load_base(family)
    refs = [AdapterRef(org_id="org", training_id=spec.training_id, path=spec.output_dir) for spec in specs]
    speakers = [(None, None), *((ref, read_voice(ref, base).adapter) for ref in refs)]
    engine = Engine(base)
    engine.scheduler.step_tokens = 24  # long prompts come in several chunks, beside others' and while others decode

    def ask(at: int) -> Sequence:
        ref, adapter = speakers[at % 3]
        request = greedy(QUESTIONS[at], max_tokens=10 + at, org_id="org", adapter=ref)
        sequence = engine.sequence(request, adapter, "You are a helpful pirate.", lambda chunk: None)
        sequence.stop_ids = set()
        engine.submit(sequence)
        return sequence

    def drain() -> None:
        while engine.has_work:
            engine.step()

    sequences = [ask(at) for at in range(len(QUESTIONS))]
    drain()
    assert sequences[4].reused_tokens or sequences[1].reused_tokens  # of the same voice, with the same beginning
    again = [ask(at) for at in (1, 2, 3)]
    drain()
    for one in again:
        assert one.reused_tokens > len(one.prompt_ids) - 2 * BLOCK_TOKENS
    assert [one.output_ids for one in again] == [one.output_ids for one in sequences[1:4]]
    replies = []
    for speaker, adapter in enumerate([None, *(spec.output_dir for spec in specs)]):
        theirs = in_peft(cache, family, adapter)
        for at in range(speaker, len(QUESTIONS), 3):
            prompt = torch.tensor([sequences[at].prompt_ids])
            whole = theirs.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=10 + at,
                do_sample=False,
                eos_token_id=None,
            )
            assert sequences[at].output_ids == whole[0, prompt.shape[1] :].tolist()
            with torch.inference_mode():
                expected = theirs(whole).logits[0]
            assert relative_error(logits_of(base, whole[0], speakers[speaker][1]), expected) < 1e-4  # fp32
        replies.append(sequences[speaker].output_ids)
    assert replies[0] != replies[1] != replies[2] != replies[0]


def logits_of(base: Base, ids: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
    row = Row(ids.tolist(), [NO_LABEL] * (len(ids) - 1) + [int(ids[-1])])
    batch = MicroBatch.of([row], base.device)
    with torch.inference_mode(), base.passing(batch.layout, Training(adapter) if adapter else None):
        return base.logits(base.hidden(batch.ids, batch.layout.positions))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_that_share_a_prefix_have_the_loss_and_gradients_of_peft(
    in_float64: Callable[[str], Base], plain_attention: str, cache: Path, tmp_path: Path, family: str
) -> None:
    """Weights and products in float64. Both sides round to fp32 in places (norms, angles of positions, routers), each
    on its own; 1e-5 leaves room for that alone. The prefix and the rows exceed the windows of 16.
    """
    base = in_float64(family)
    theirs = AutoModelForCausalLM.from_pretrained(
        cache / "tiny" / family, dtype=torch.float64, attn_implementation=plain_attention
    )
    theirs.set_experts_implementation("eager")
    adapter = adapter_made_by_peft(theirs, base, tmp_path)
    rows = rows_of(base, [9, 24, 5, 9], prefix=30)
    batch = MicroBatch.of(rows, base.device)
    assert batch.layout.prefix == 30
    with base.passing(batch.layout, Training(adapter)):
        loss = batch.nll(base, None).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    model = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True, autocast_adapter_dtype=False).eval()
    expected = torch.zeros(())
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1]
        expected = expected + F.cross_entropy(
            logits, torch.tensor(row.labels[1:]), reduction="sum", ignore_index=NO_LABEL
        )
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    compared = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            place, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
            ours = (adapter.A if kind.startswith("A") else adapter.B)[place].grad
            assert ours is not None
            assert relative_error(ours, parameter.grad) < 1e-5, name
            compared += 1
    assert compared == len(adapter.parameters)


def adapter_made_by_peft(model: Any, base: Base, folder: Path) -> Adapter:
    """PEFT's own adapter of `model` on every layer that we correct, trained a step by PEFT, and read by us."""
    names = sorted({name.rsplit(".", 1)[-1] for name in base.layers})
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=base.has_conv1d, task_type="CAUSAL_LM"
    )
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    trainable = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    ids = torch.tensor([rows_of(base, [20], 4)[0].input_ids])
    theirs(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.SGD(trainable, lr=1e-3).step()
    theirs.save_pretrained(folder)
    theirs.unload()
    adapter = Adapter.load(folder, base.layers)
    for weights in (adapter.A, adapter.B):
        for name, weight in weights.items():
            weights[name] = torch.nn.Parameter(weight.to(base.dtype))
    return adapter


def test_every_supported_architecture_is_tested_and_no_other_is_called_supported() -> None:
    assert {model_type for model_type, _ in tiny.FAMILIES.values()} == set(architectures.SUPPORTED)
    readme = Path(__file__).parents[2] / "README.md"
    assert f"architectures are supported: {', '.join(architectures.SUPPORTED.values())}." in readme.read_text()


WINDOW = {"num_key_value_heads": 2, "sliding_window": 16}
OTHERWISE: dict[str, tuple[str, dict[str, Any], str]] = {
    "recurrent": ("rwkv", {}, "packed rows|attribute"),
    "state space": ("mamba", {"state_size": 4}, "packed rows"),
    "some blocks without attention": ("qwen3_next", tiny.MIXTURE | {"num_experts": 16}, "have no attention"),
    "attention of its own": ("bloom", {}, "have no attention"),
    "attention that cannot be exchanged": ("falcon", {}, "cannot be exchanged"),
    "attention sinks": ("gpt_oss", {"num_key_value_heads": 2}, "s_aux"),
    "later tokens are seen": ("bert", {}, "mask of block 0"),
    "a window in the mask alone": ("phimoe", WINDOW, "mask of block 0"),
    "a window in some masks alone": (
        "qwen2_moe",
        WINDOW | {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
        "mask of block 1",
    ),
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_what_computes_otherwise_is_refused_when_it_is_loaded(tmp_path: Path, kind: str) -> None:
    """The operator may try any base model as the default; then loading it is the test."""
    model_type, more, reason = OTHERWISE[kind]
    config = AutoConfig.for_model(model_type, **tiny.SIZES | more)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tried")
    tiny.make_tokenizer().save_pretrained(tmp_path / "tried")
    with pytest.raises(BaseModelUnavailable, match=reason) as refused:
        loaded("tried", Settings(_env_file=None, model_cache_dir=tmp_path, default_base_model="tried"))
    assert refused.value.code == "unsupported_architecture"
    assert "Mixtral" in refused.value.cure


def test_what_is_not_on_the_list_is_refused_by_the_host_too(tmp_path: Path) -> None:
    """Where the service could not tell: the config came with the download."""
    for name, config in {
        "mamba": {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        "classifier": {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").touch()
        with pytest.raises(BaseModelUnavailable) as refused:
            loaded(name, Settings(_env_file=None, model_cache_dir=tmp_path))
        assert refused.value.code == "unsupported_architecture"
        assert all(supported in refused.value.cure for supported in architectures.SUPPORTED.values())


def loaded(name: str, settings: Settings) -> Base:
    key = BaseKey(base_model=name, quantization="none", dtype="fp32")
    return base_module.load(name, settings, base_module.detect_device(), key, lambda phase: None)


def test_tensors_that_the_model_has_no_place_for_are_told_of(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "tiny" / "fuller", "llama")
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, weights, {"format": "pt"})
    told: list[str] = []
    key = BaseKey(base_model="tiny/fuller", quantization="none", dtype="fp32")
    settings = Settings(_env_file=None, model_cache_dir=tmp_path)
    base_module.load("tiny/fuller", settings, base_module.detect_device(), key, told.append)
    assert any("1 tensors that tiny/fuller has no place for, such as model.layers.0" in phase for phase in told)
