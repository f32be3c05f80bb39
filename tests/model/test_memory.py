from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, PretrainedConfig

import tiny
from repertory.contracts import BaseKey, Device, EstimateRequest, Hyperparameters
from repertory.data.render import NO_LABEL, Row
from repertory.errors import DataUnusable, InsufficientMemory
from repertory.model import attention, crossentropy, memory
from repertory.model import base as base_module
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.base import Base, Outline
from repertory.model.estimate import estimate
from repertory.model.lora import Training
from repertory.model.memory import GIB, BatchShape, Demand, cures
from repertory.model.microbatch import MicroBatch
from repertory.settings import Settings
from repertory_fixtures import LoadBase, MakeSpec, conversation, run_to_end

ROOT = Path(__file__).parents[2]
GPU = Device(kind="cuda", name="a card", memory_bytes=24 * GIB, has_bf16=True)


def _cards() -> Any:
    """benchmarks/cards.py, which prints the table of the README."""
    spec = importlib.util.spec_from_file_location("cards", ROOT / "benchmarks" / "cards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cards = _cards()


def outlined(folder: Path, quantization: str, dtype: str, config: PretrainedConfig = cards.LLAMA_2_7B) -> Outline:
    config.save_pretrained(folder)
    key = BaseKey.model_validate({"base_model": "meta-llama/x", "quantization": quantization, "dtype": dtype})
    return base_module.outline(folder, key, GPU)


@pytest.mark.parametrize(
    ("quantization", "dtype", "gigabytes"),
    [("none", "fp32", 28), ("none", "fp16", 14), ("8bit", "fp16", 7), ("4bit", "bf16", 4)],
)
def test_llama_2_7b_takes_what_the_readme_says(tmp_path: Path, quantization: str, dtype: str, gigabytes: float) -> None:
    base = outlined(tmp_path, quantization, dtype)
    assert base.parameter_count == 6_738_415_616  # as published
    assert base.architecture.base_bytes(base.key) == pytest.approx(gigabytes * 1e9, rel=0.15)


def test_the_cards_of_the_readme_are_those_of_the_estimate() -> None:
    assert cards.table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("card_gb", [8, 12, 16, 24])
def test_a_qlora_job_on_llama_2_7b_fits_every_card_as_it_is_set(tmp_path: Path, card_gb: int) -> None:
    """Rank 16, batch 4, 2,048 tokens, by the endpoint's estimate; gradient checkpointing is on by default."""
    base = outlined(tmp_path, "4bit", "bf16")
    request = EstimateRequest(
        key=base.key, conversations=[conversation(1)], hyperparameters=cards.QLORA, validation_split=0.0
    )
    with pytest.raises(StopIteration) as end:
        next(estimate(base, None, request, card_gb * GIB - cards.CONTEXT_BYTES, None))
    told = end.value.value
    assert told.fits
    assert told.hyperparameters["gradient_checkpointing"] is True
    assert told.peak_memory_bytes < 6 * GIB


@pytest.mark.parametrize(
    ("card_gb", "advised"), [(8, "gradient_checkpointing=true"), (12, "gradient_checkpointing=true"), (24, None)]
)
def test_without_gradient_checkpointing_it_is_what_is_advised(card_gb: int, advised: str | None) -> None:
    demand, available = replace(cards.qlora_demand(), gradient_checkpointing=False), card_gb * GIB - cards.CONTEXT_BYTES
    assert (demand.estimate().total <= available) is (advised is None)
    if advised is not None:
        assert cures(demand, available)[0].startswith(f"{advised} (")


def test_where_even_that_does_not_fit_rows_become_shorter() -> None:
    advice = cures(cards.qlora_demand(), int(5.0 * GIB))
    assert advice[0].startswith("max_seq_length=1024 (")


def test_a_half_precision_job_is_told_to_quantize() -> None:
    demand = cards.qlora_demand()
    demand = replace(demand, key=demand.key.model_copy(update={"quantization": "none"}))
    advice = cures(demand, 10 * GIB)
    assert [one.partition("=")[0] for one in advice] == ["use_8bit", "use_4bit"]


def test_optimizer_and_gradients_are_counted_from_the_rank() -> None:
    demand = replace(cards.qlora_demand(), gradient_checkpointing=False)
    found = demand.estimate()
    weights = 16 * sum(sum(shape) for shape in demand.architecture.linear.values())
    assert weights == 39_976_960  # https://arxiv.org/abs/2106.09685 on 7 layers of 32 blocks
    assert (found.gradients, found.optimizer, found.adapter) == (4 * weights, 8 * weights, 6 * weights)


def test_the_logits_of_a_chunk_are_counted_as_they_are_cut() -> None:
    assert memory.LOGITS_POSITIONS == crossentropy.CHUNK


LARGE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
# What their config.json says, and how many parameters they were published with.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "mistral": ({**LARGE, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000}, 7_241_732_096),
    "mixtral": (
        {**LARGE, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8},
        46_702_792_704,
    ),
    "opt": (
        {**LARGE, "ffn_dim": 16384, "word_embed_proj_dim": 4096, "vocab_size": 50272, "max_position_embeddings": 2048},
        6_658_473_984,
    ),
    "gpt_neox": (
        {**LARGE, "intermediate_size": 16384, "vocab_size": 50432, "tie_word_embeddings": False},
        6_857_302_016,
    ),
    "gpt2": ({}, 124_439_808),
    "phi": (
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32},
        2_779_683_840,
    ),
    "qwen2": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
        | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
        7_615_616_512,
    ),
    "qwen3": (
        {**LARGE, "num_hidden_layers": 36, "intermediate_size": 12288, "num_key_value_heads": 8, "head_dim": 128}
        | {"vocab_size": 151936, "tie_word_embeddings": False},
        8_190_735_360,
    ),
    "qwen3_moe": (
        {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
        | {"moe_intermediate_size": 768, "num_experts": 128, "head_dim": 128, "vocab_size": 151936}
        | {"tie_word_embeddings": False},
        30_532_122_624,
    ),
    "gemma2": (
        {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16}
        | {"num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000},
        9_241_705_984,
    ),
    "gemma3_text": (
        {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
        | {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144},
        999_885_952,
    ),
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_published_models_have_the_parameters_they_are_published_with(tmp_path: Path, model_type: str) -> None:
    described, parameters = PUBLISHED[model_type]
    base = outlined(tmp_path, "none", "bf16", AutoConfig.for_model(model_type, **described))
    assert base.parameter_count == parameters
    assert base.architecture.base_bytes(base.key) == 2 * parameters


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_loaded_counted_and_computed_as_estimated(
    load_base: LoadBase, family: str, quantization: str
) -> None:
    """Loading compares the forward passes. Of a run most is kept by attention at this length; small things that are
    not counted weigh more here than in a model of use, norms that keep fp32 copies of their input most."""
    base = load_base(family, "fp32", quantization)
    held = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    assert base.architecture.base_bytes(base.key) == pytest.approx(held, rel=0.05)
    shape = BatchShape(0, (512,))
    adapter = Adapter.fresh(
        LoraConfig(base_model="x", rank=4, alpha=8, dropout=0, target_modules=["q_proj"]),
        base.layers,
        list(base.layers),
        0,
    )
    demand = Demand(
        architecture=base.architecture,
        key=base.key,
        device="cpu",
        rank=4,
        adapted=tuple(base.layers),
        dropout=0.1,
        batch=shape,
    )
    allocated = demand.activations / memory.ALLOCATOR_OVERHEAD["cpu"]
    assert peak_allocation(base, rows_of(shape), adapter, 0.1, False) == pytest.approx(allocated, rel=0.25)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", [BatchShape(0, (512,)), BatchShape(0, (64,) * 8), BatchShape(256, (32,) * 8)])
def test_the_estimate_is_what_torch_allocates(base: Base, shape: BatchShape, dropout: float, recompute: bool) -> None:
    """Within 15% on this tiny model, where small things that are not counted weigh more; within 2% on the bundled."""
    names = tuple(base.layers)
    config = LoraConfig(base_model="x", rank=4, alpha=8, dropout=dropout, target_modules=["q_proj"])
    adapter = Adapter.fresh(config, base.layers, names, 0)
    demand = Demand(
        architecture=base.architecture,
        key=base.key,
        device="cpu",
        rank=4,
        adapted=names,
        dropout=dropout,
        batch=shape,
        gradient_checkpointing=recompute,
    )
    allocated = demand.activations / memory.ALLOCATOR_OVERHEAD["cpu"]
    assert peak_allocation(base, rows_of(shape), adapter, dropout, recompute) == pytest.approx(allocated, rel=0.15)


def rows_of(shape: BatchShape) -> list[Row]:
    prefix = [at % 500 for at in range(shape.prefix)]
    rows = []
    for number, length in enumerate(shape.lengths):
        ids = prefix + [(7 * at + number) % 500 for at in range(length)]
        rows.append(Row(ids, [NO_LABEL] * (shape.prefix + 1) + ids[shape.prefix + 1 :]))
    return rows


def peak_allocation(base: Base, rows: list[Row], adapter: Adapter, dropout: float, recompute: bool) -> int:
    routing, batch = Training(adapter, dropout), MicroBatch.of(rows, base.device)
    attention._hidden_scores.cache_clear()  # what other tests have left must not be freed, and counted, meanwhile
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
        base.passing(batch.layout, routing, recompute=recompute),
    ):
        batch.nll(base, routing).sum().backward()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = allocated = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def test_a_base_model_that_cannot_fit_is_refused_with_what_would_do(cache: Path) -> None:
    settings = Settings(_env_file=None, model_cache_dir=cache, max_gpu_memory_gb=0.0002)  # 215 kB
    key = BaseKey(base_model="tiny/llama-gqa", quantization="none", dtype="fp32")
    with pytest.raises(InsufficientMemory, match="within MAX_GPU_MEMORY_GB") as refused:
        base_module.load("tiny/llama-gqa", settings, base_module.detect_device(), key, lambda phase: None)
    assert "use_4bit=true" in refused.value.cure or "smaller base model" in refused.value.cure


def test_what_a_base_model_and_its_run_may_take_is_capped(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base.available_bytes > base.architecture.base_bytes(base.key)
    monkeypatch.setattr(base, "memory_limit_bytes", 1000)
    assert base.available_bytes == 1000


# Estimates of jobs


def estimated(base: Base, spec: Any, rate: float | None = None, available: int = GIB) -> Any:
    request = EstimateRequest(
        key=base.key,
        conversations=[conversation(1 + at % 3, at) for at in range(24)],
        hyperparameters=spec.hyperparameters,
        validation_split=spec.validation_split,
        system_prompt=spec.system_prompt,
    )
    portions = estimate(base, base.renderer, request, available, rate)
    while True:
        try:
            next(portions)
        except StopIteration as end:
            return end.value


def test_an_estimate_says_what_the_run_then_is(base: Base, make_spec: MakeSpec) -> None:
    spec = make_spec(24)
    told = estimated(base, spec, rate=1000.0)
    events = run_to_end(base, spec, until=lambda event: event.kind == "running")
    was = events[-1].data
    assert told.tokens == was["training_tokens"]
    assert told.trained_tokens == was["trained_tokens"]
    assert told.steps == was["total_steps"]
    assert told.hyperparameters == was["hyperparameters"]
    assert told.conversations == 24
    assert told.fits
    assert told.seconds > 0
    assert (told.truncated_rows, told.skipped_rows) == (0, 0)
    assert estimated(base, spec).seconds is None


def test_an_estimate_that_does_not_fit_says_by_how_much_and_what_would(base: Base, make_spec: MakeSpec) -> None:
    told = estimated(base, make_spec(), available=1000)
    assert not told.fits
    assert told.peak_memory_bytes > told.available_memory_bytes == 1000
    assert "It does not fit" in told.advice[0]
    assert told.advice[-1] == "Choose a smaller base model."


def test_shortened_and_skipped_rows_are_counted(base: Base, make_spec: MakeSpec) -> None:
    told = estimated(base, make_spec(max_seq_length=60))
    assert told.truncated_rows + told.skipped_rows > 0
    with pytest.raises(DataUnusable):
        estimated(base, make_spec(max_seq_length=8))


def test_a_base_model_without_weights_or_tokenizer_is_estimated_from_its_config(tmp_path: Path) -> None:
    base = outlined(tmp_path, "4bit", "bf16")
    assert base_module.renderer_in(tmp_path, "x") is None
    request = EstimateRequest(
        key=base.key,
        conversations=[conversation(1, at) for at in range(10)],
        hyperparameters=Hyperparameters(),
        validation_split=0.1,
    )
    with pytest.raises(StopIteration) as end:
        next(estimate(base, None, request, 24 * GIB, None))
    told = end.value.value
    assert (told.tokens, told.seconds) == (None, None)
    assert told.fits
    assert told.steps == 20  # 9 rows, 8 a step, 10 epochs
    assert told.peak_memory_bytes > base.architecture.base_bytes(base.key)


def test_quantized_bases_are_counted_as_they_lie_in_memory(load_base: LoadBase) -> None:
    for quantization in ("none", "8bit", "4bit"):
        base = load_base("llama-gqa", "fp32", quantization)
        tensors = [*base.model.parameters(), *base.model.buffers()]
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert base.architecture.base_bytes(base.key) == pytest.approx(held, rel=0.05)
        assert base.architecture.parameters == load_base().architecture.parameters
