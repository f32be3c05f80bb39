"""Whether the defaults are good ones: real people's voices, each trained with the defaults and with one value changed.

    python -m benchmarks.sweep [--people 4] [--conversations 120] [--output F]

Prints, for each setting, the held-out loss of every person relative to the base, and for the defaults the matrix of
person and adapter: what an adapter gains on its own person and what on the others. What it gains on the others is chat
in general; the rest is the person. Nothing here is a matter of time, so a busy machine gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from repertory.contracts import BUNDLED_MODEL, BaseKey, Hyperparameters, RunSpec
from repertory.data import chitchat
from repertory.model import base as base_models
from repertory.model.adapter import Adapter
from repertory.model.base import Base
from repertory.model.engine import Engine
from repertory.model.evaluation import score
from repertory.model.training import REPORT, TrainingRun
from repertory.settings import settings

HELD_OUT = 0.25
CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rate 2.5e-4": {"learning_rate": 2.5e-4},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rank 8": {"lora_r": 8},
    "rank 32": {"lora_r": 32},
    "q,v only": {"lora_target_modules": "q_proj,v_proj"},
    "no dropout": {"lora_dropout": 0.0},
    "prompt loss 0.05": {"prompt_loss_weight": 0.05},
    "batch of 16": {"batch_size": 4, "gradient_accumulation_steps": 4},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--people", type=int, default=4)
    options.add_argument("--conversations", type=int, default=120)
    options.add_argument("--changes", nargs="*", default=list(CHANGES), choices=list(CHANGES))
    options.add_argument("--output", type=Path)
    asked = options.parse_args()

    device = base_models.detect_device()
    key = BaseKey.resolve(BUNDLED_MODEL, Hyperparameters(), device)
    base = base_models.load(BUNDLED_MODEL, settings(), device, key, lambda phase: print(phase, file=sys.stderr))
    people = chitchat.people(min_conversations=100)[: asked.people]
    with tempfile.TemporaryDirectory() as folder:
        results = {
            change: [
                trained(base, person, asked.conversations, CHANGES[change], Path(folder) / f"{change}-{at}")
                for at, person in enumerate(people)
            ]
            for change in dict.fromkeys(["defaults", *asked.changes])
        }
        matrix = [
            [
                held_out_nll(base, person, asked.conversations, Path(folder) / f"defaults-{at}")
                for at in range(len(people))
            ]
            for person in people
        ]
    measured = {
        "machine": machine.facts(),
        "conversations_per_person": asked.conversations,
        "held_out_share": HELD_OUT,
        "changes": {change: CHANGES[change] for change in results},
        "results": results,
        "matrix_nll": matrix,
    }
    print(json.dumps(measured, indent=1))
    if asked.output is not None:
        asked.output.write_text(json.dumps(measured, indent=1) + "\n")
    show(results, matrix)


def trained(base: Base, person: str, conversations: int, change: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A whole job, as the product runs it; what its report says."""
    print(f"{folder.name} …", file=sys.stderr, flush=True)
    spec = spec_of(person, conversations, change, folder)
    engine = Engine(base)
    run = TrainingRun(spec, base, engine)
    while True:
        while engine.has_work:
            engine.step()
        try:
            run.step()
        except StopIteration:
            break
    report = json.loads((Path(spec.output_dir) / REPORT).read_text())
    steps = [evaluation["step"] for evaluation in report["evaluations"]]
    return {
        "base_nll": report["base_val_nll"],
        "nll": report["val_nll"],
        "gain": report["base_val_nll"] - report["val_nll"],
        "best_step": report["best_step"],
        "last_step": steps[-1],
    }


def spec_of(person: str, conversations: int, change: dict[str, Any], folder: Path) -> RunSpec:
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "conversations.jsonl"
    data.write_text("".join(f"{chat.model_dump_json()}\n" for chat in chitchat.voice(person, conversations)))
    return RunSpec(
        org_id="sweep",
        training_id="train_sweep",
        base_model=BUNDLED_MODEL,
        conversations_path=str(data),
        output_dir=str(folder / "voice"),
        checkpoint_dir=str(folder / "checkpoints"),
        hyperparameters=Hyperparameters.model_validate(change),
        validation_split=HELD_OUT,
        publish_anyway=True,  # a setting that learns nothing is a result as well
    )


def held_out_nll(base: Base, person: str, conversations: int, voice: Path) -> float:
    """Nats a token of the person's held-out conversations with another one's voice."""
    chats = chitchat.voice(person, conversations)
    latest = chats[-round(len(chats) * HELD_OUT) :]
    rows = [row for row in (base.renderer.row(chat.messages, 2048) for chat in latest) if row is not None]
    adapter = Adapter.load(voice / "voice", base.layers).to(base.device, torch.float32)
    portions = score(base, rows, adapter)
    while True:
        try:
            next(portions)
        except StopIteration as end:
            return float(end.value.mean_nll)


def show(results: dict[str, list[dict[str, Any]]], matrix: list[list[float]]) -> None:
    people = range(len(matrix))
    table = Table("setting", *(f"person {at}" for at in people), "mean", title="nats a token below the base, held out")
    for change, found in results.items():
        gains = [one["gain"] for one in found]
        table.add_row(change, *(f"{gain:.3f}" for gain in gains), f"{statistics.fmean(gains):.3f}")
    Console().print(table)
    table = Table("words of", *(f"adapter {at}" for at in people), "the person's own", title="nats a token")
    for at in people:
        others = statistics.fmean(matrix[at][other] for other in people if other != at)
        table.add_row(f"person {at}", *(f"{nll:.3f}" for nll in matrix[at]), f"{others - matrix[at][at]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
