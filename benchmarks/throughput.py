"""`make bench`: how fast the bundled model trains and speaks on this machine, as a table and as JSON.

Everything runs in one process through the very code of the host: the training run's steps and the engine's.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from repertory.contracts import BUNDLED_MODEL, BaseKey, GenerateRequest, Hyperparameters, RunSpec
from repertory.data import chitchat
from repertory.data.conversations import Conversation, Message
from repertory.model import base as base_module
from repertory.model.adapter import Adapter, LoraConfig
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.model.training import TrainingRun
from repertory.settings import settings

STEPS = 8  # optimizer steps that are timed, after two that are not
NEW_TOKENS = 64


def main() -> None:
    device = base_module.detect_device()
    key = BaseKey.resolve(BUNDLED_MODEL, settings().hyperparameters, device)
    base = base_module.load(BUNDLED_MODEL, settings(), device, key, lambda phase: None)
    results: dict[str, Any] = {"machine": machine.facts(), "base": key.model_dump(), "training": {}, "generation": {}}
    person = chitchat.people(min_conversations=100)[0]
    chats = chitchat.voice(person, 200)
    persona = "You are a person who writes short, casual messages to strangers on a chat page. " * 25
    results["training"]["default system prompt"] = training_rate(base, chats, None)
    results["training"]["persona prompt"] = training_rate(base, chats, persona)
    voices = [voice(base, seed) for seed in range(8)]
    for name, owners in {
        "1 request, base": [None],
        "1 request, 1 voice": voices[:1],
        "8 requests, base": [None] * 8,
        "8 requests, 8 voices": voices,
        "32 requests, base": [None] * 32,
        "32 requests, 8 voices": voices * 4,
    }.items():
        results["generation"][name] = generation_rate(base, owners)
    show(results)
    print(json.dumps(results))


def training_rate(base: Base, chats: list[Conversation], system_prompt: str | None) -> dict[str, float]:
    """Tokens of the original rows per second of optimizer steps."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "conversations.jsonl"
        data.write_text("".join(chat.model_dump_json() + "\n" for chat in chats))
        spec = RunSpec(
            org_id="bench",
            training_id="train_bench",
            base_model=BUNDLED_MODEL,
            conversations_path=str(data),
            output_dir=f"{folder}/out",
            checkpoint_dir=f"{folder}/checkpoints",
            hyperparameters=Hyperparameters(batch_size=16, gradient_accumulation_steps=1, save_steps=1000),
            validation_split=0.02,
            system_prompt=system_prompt,
        )
        run = TrainingRun(spec, base, Engine(base))
        steps: list[tuple[float, int]] = []
        about: dict[str, Any] = {}
        while len(steps) < STEPS + 2:
            event = run.step()
            if event is not None and event.kind == "running":
                about = event.data
            if event is not None and event.kind == "step":
                steps.append((time.perf_counter(), event.data["step"]))
        tokens = about["training_tokens"] / about["training_conversations"] * 16
        seconds = [after[0] - before[0] for before, after in itertools.pairwise(steps[1:])]
        run.close()
        return {
            "tokens_per_second": round(tokens / statistics.median(seconds), 1),
            "tokens_per_row": round(tokens / 16, 1),
            "shared_prefix_tokens": about["shared_prefix_tokens"],
            "trained_share": round(about["trained_tokens"] / about["training_tokens"], 3),
        }


def voice(base: Base, seed: int) -> Adapter:
    short = sorted({name.rsplit(".", 1)[-1] for name in base.layers})
    config = LoraConfig(base_model=BUNDLED_MODEL, rank=16, alpha=32, dropout=0, target_modules=short)
    adapter = Adapter.fresh(config, base.layers, list(base.layers), seed)
    with torch.no_grad():
        for B in adapter.B.values():
            B.normal_(std=0.002)
    return adapter.to(base.device, base.dtype)


def generation_rate(base: Base, owners: list[Adapter | None]) -> dict[str, float]:
    """Tokens per second of whole requests, prompts included, and of the steps in which all of them decode."""
    engine = Engine(base)
    first: list[float] = []
    for at, adapter in enumerate(owners):
        request = GenerateRequest(
            request_id=str(at),
            org_id=f"org{at % 8}",
            adapter=None,
            messages=[Message(role="user", content="Tell me what you did last weekend, please.")],
            temperature=0,
            top_p=1,
            top_k=0,
            max_tokens=NEW_TOKENS,
        )
        sequence = engine.sequence(request, adapter, None, lambda chunk: first.append(time.perf_counter()))
        sequence.stop_ids = set()
        engine.submit(sequence)
    begin = time.perf_counter()
    steps: list[float] = []
    while engine.has_work:
        before = time.perf_counter()
        full = len(engine.scheduler.decoding) == len(owners) and not engine.scheduler.prefilling
        engine.step()
        if full:
            steps.append(time.perf_counter() - before)
    seconds = time.perf_counter() - begin
    return {
        "tokens_per_second": round(len(owners) * NEW_TOKENS / seconds, 1),
        "decode_tokens_per_second": round(len(owners) / statistics.median(steps), 1),
        "first_text_seconds": round(first[0] - begin, 3),
    }


def show(results: dict[str, Any]) -> None:
    console = Console()
    about = results["machine"]
    console.print(f"{about['device']}, {about['cores']} cores, {results['base']['dtype']}, torch {about['torch']}")
    training = Table("training", "tokens/s", "tokens a row", "shared prefix")
    for name, row in results["training"].items():
        shown = (row["tokens_per_second"], row["tokens_per_row"], row["shared_prefix_tokens"])
        training.add_row(name, *map(str, shown))
    generation = Table("generation", "tokens/s", "decoding alone", "first text, s")
    for name, row in results["generation"].items():
        shown = (row["tokens_per_second"], row["decode_tokens_per_second"], row["first_text_seconds"])
        generation.add_row(name, *map(str, shown))
    console.print(training, generation)
