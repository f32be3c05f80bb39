from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from repertory.contracts import BaseKey, GenerateRequest, Hyperparameters, RunEvent, RunSpec
from repertory.data.conversations import Conversation, Message
from repertory.data.render import NO_LABEL, Row
from repertory.model import base as base_module
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.model.layers import Siblings
from repertory.model.training import TrainingRun
from repertory.settings import Settings

torch.set_num_threads(1)  # tiny products gain nothing from a second core, and lose much when it is busy

GREETINGS = [
    "Hello!",
    "How are you?",
    "Tell me a joke",
    "What do you like to do?",
    "ok",
    "coffee or tea?",
    "good morning",
]
ANSWERS = ["Arr, matey!", "Fine, the sea is rough.", "rum is gone", "I like the sea and rum", "yes", "Tea, arr", "arr"]

LoadBase = Callable[..., Base]
MakeSpec = Callable[..., RunSpec]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache that holds every tiny family."""
    folder = tmp_path_factory.mktemp("cache")
    for family in tiny.FAMILIES:
        tiny.make_model(folder / "tiny" / family, family)
    return folder


@pytest.fixture(scope="session")
def load_base(cache: Path) -> LoadBase:
    def load(family: str = "llama-gqa", dtype: str = "fp32", quantization: str = "none") -> Base:
        name = f"tiny/{family}"
        key = BaseKey(base_model=name, quantization=quantization, dtype=dtype)
        settings = Settings(_env_file=None, model_cache_dir=cache)
        return base_module.load(name, settings, base_module.detect_device(), key, lambda phase: None)

    return load


@pytest.fixture(scope="session")
def base(load_base: LoadBase) -> Base:
    return load_base()


@pytest.fixture
def in_float64(load_base: LoadBase) -> Callable[[str], Base]:
    """Bases whose rounding cannot hide a mistake: everything in float64."""

    def load(family: str = "llama-gqa") -> Base:
        base = load_base(family)
        base.model.double()
        for siblings in {id(layer.siblings): layer.siblings for layer in base.layers.values()}.values():
            if len(siblings.layers) > 1:
                Siblings.join(siblings.layers)
        base.model.set_experts_implementation("eager")  # of a mixture: the fast ones know no float64
        base.dtype, base.decoder = torch.float64, None  # which is for fp32 and bf16
        return base

    return load


def conversation(turns: int, at: int = 0) -> Conversation:
    messages = []
    for turn in range(turns):
        pick = (at * 3 + turn * 5) % len(GREETINGS)
        messages.append(Message(role="user", content=f"{GREETINGS[pick]} {at}"))
        messages.append(Message(role="assistant", content=f"{ANSWERS[pick]} {turn}"))
    return Conversation(messages=messages)


def greedy(question: str, max_tokens: int, **asked: Any) -> GenerateRequest:
    """What asks for the likeliest tokens."""
    about: dict[str, Any] = {"request_id": "r", "org_id": "o", "adapter": None}
    values = {"temperature": 0, "top_p": 1, "top_k": 0, "max_tokens": max_tokens}
    return GenerateRequest(messages=[Message(role="user", content=question)], **(about | values | asked))


@pytest.fixture
def make_spec(tmp_path: Path) -> MakeSpec:
    def make(
        count: int = 24,
        training_id: str = "train_1",
        system_prompt: str | None = "You are a helpful pirate.",
        conversations: list[Conversation] | None = None,
        spec: Mapping[str, object] = MappingProxyType({}),
        **hyperparameters: object,
    ) -> RunSpec:
        chosen = conversations or [conversation(1 + at % 3, at) for at in range(count)]
        data = tmp_path / f"{training_id}.jsonl"
        data.write_text("".join(one.model_dump_json() + "\n" for one in chosen))
        values = {"num_train_epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 5e-3}
        run_spec = RunSpec(
            org_id="org",
            training_id=training_id,
            base_model="tiny/llama-gqa",
            conversations_path=str(data),
            output_dir=str(tmp_path / "finetuned" / training_id),
            checkpoint_dir=str(tmp_path / "checkpoints" / training_id),
            hyperparameters=Hyperparameters.model_validate(values | hyperparameters),
            validation_split=0.1,
            system_prompt=system_prompt,
        )
        return run_spec.model_copy(update=dict(spec))

    return make


def run_to_end(
    base: Base,
    spec: RunSpec,
    until: Callable[[RunEvent], bool] = lambda event: False,
    meanwhile: Callable[[Engine], None] = lambda engine: None,
) -> list[RunEvent]:
    """Drive a run as the device's loop does, `meanwhile` before each of its portions; stops early after an event for
    which `until` holds.
    """
    engine = Engine(base)
    run = TrainingRun(spec, base, engine)
    events = []
    try:
        while True:
            meanwhile(engine)
            while engine.has_work:
                engine.step()
            event = run.step()
            if event is not None:
                events.append(event)
                if until(event):
                    run.close()
                    return events
    except StopIteration:
        return events


def steps_of(events: list[RunEvent]) -> dict[int, float]:
    return {event.data["step"]: event.data["loss"] for event in events if event.kind == "step"}


def weights_sha256(spec: RunSpec) -> str:
    return hashlib.sha256((Path(spec.output_dir) / "adapter_model.safetensors").read_bytes()).hexdigest()


def exact_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' eager attention, over the mask that the model makes, but without its rounding to fp32."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    assert attention_mask is not None
    return ((scores + attention_mask).softmax(-1) @ value).transpose(1, 2), None


@pytest.fixture
def plain_attention() -> str:
    """The name of an attention that transformers' models can compute with, in any precision."""
    ALL_ATTENTION_FUNCTIONS.register("exact", exact_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("exact", eager_mask)
    return "exact"


def rows_of(base: Base, lengths: list[int], prefix: int, seed: int = 0) -> list[Row]:
    """Random rows that share a prefix; the second half of each continuation is trained."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(3, 500, (prefix,), generator=generator).tolist()
    rows = []
    for number, length in enumerate(lengths):
        own = [number + 3, *torch.randint(3, 500, (length - 1,), generator=generator).tolist()]
        ids = shared + own
        first = prefix + length // 2
        rows.append(Row(ids, [NO_LABEL] * first + ids[first:]))
    return rows
