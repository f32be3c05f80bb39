"""Checkpoints of a run: whole folders `checkpoint-N`, N optimizer steps done, from which it goes on exactly.

Written under another name, sealed with a manifest, renamed into place. The two newest are kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from repertory.manifest import MANIFEST, sync_folder, verify, write_durably, write_manifest
from repertory.model.adapter import Adapter
from repertory.model.optimizer import restore_state, state_of

KEPT = 2
TENSORS = "tensors.safetensors"
STATE = "state.json"


@dataclass
class State:
    """What a run changes as it goes on; all else follows from its plan, a pure function of data, config and seed."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    best: Adapter  # as the adapter was after the best evaluation so far
    step: int = 0  # optimizer steps done
    story: dict[str, Any] = field(default_factory=dict)  # what the run has measured so far, for its report


@dataclass(frozen=True)
class Checkpoint:
    """A state as it is kept on disk."""

    step: int
    fingerprint: str  # of data, config, base model; a checkpoint of another run is not resumed
    story: dict[str, Any]
    tensors: dict[str, Tensor]

    @staticmethod
    def of(state: State, fingerprint: str) -> Checkpoint:
        tensors = _named(state.adapter) | {f"best.{name}": tensor for name, tensor in _named(state.best).items()}
        for name, parameter in _named(state.adapter).items():
            for moment, value in state_of(state.optimizer, parameter).items():
                tensors[f"{name}|{moment}"] = value
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return Checkpoint(state.step, fingerprint, state.story, kept)

    def restore(self, state: State) -> None:
        state.step, state.story = self.step, self.story
        with torch.no_grad():
            for name, parameter in _named(state.best).items():
                parameter.copy_(self.tensors[f"best.{name}"])
            for name, parameter in _named(state.adapter).items():
                parameter.copy_(self.tensors[name])
                moments = {
                    key.partition("|")[2]: tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}|")
                }
                restore_state(state.optimizer, parameter, moments)

    def write(self, folder: Path) -> None:
        """Add this checkpoint to `folder` durably, and let go of those before the last two."""
        beside = folder / f".checkpoint-{self.step}.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write_durably(beside / TENSORS, save(self.tensors))
        state = {"step": self.step, "fingerprint": self.fingerprint, "story": self.story}
        write_durably(beside / STATE, json.dumps(state).encode())
        write_manifest(beside, [TENSORS, STATE])
        final = folder / f"checkpoint-{self.step}"
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        sync_folder(folder)
        kept = {f"checkpoint-{step}" for step in _steps(folder)[-KEPT:]}
        for path in folder.glob("checkpoint-*"):
            if path.name not in kept:  # also one whose removal was cut off half-way
                shutil.rmtree(path)

    @staticmethod
    def newest(folder: Path, fingerprint: str | None) -> Checkpoint | None:
        """The newest whole checkpoint of this very run (None: whatever its data and config are), or None. Damaged and
        foreign ones are passed over.
        """
        for step in reversed(_steps(folder)):
            path = folder / f"checkpoint-{step}"
            if verify(path) is not None:
                continue
            state = json.loads((path / STATE).read_text())
            if fingerprint in (None, state["fingerprint"]):
                tensors = load((path / TENSORS).read_bytes())
                return Checkpoint(step, state["fingerprint"], state["story"], tensors)
        return None


def _named(adapter: Adapter) -> dict[str, Tensor]:
    return {f"A.{n}": p for n, p in adapter.A.items()} | {f"B.{n}": p for n, p in adapter.B.items()}


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = [path.name.removeprefix("checkpoint-") for path in folder.iterdir() if (path / MANIFEST).exists()]
    return sorted(int(name) for name in names if name.isdigit())
