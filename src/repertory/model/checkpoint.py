"""Checkpoints of a run: whole folders `checkpoint-N`, N optimizer steps done, from which it goes on exactly.

Written under another name, sealed with a manifest, renamed into place. The two newest are kept.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from repertory.manifest import MANIFEST, sync_folder, verify, write_durably, write_manifest
from repertory.model.lora import Adapter
from repertory.model.optimizer import restore_state, state_of

KEPT = 2
TENSORS = "tensors.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands: everything else follows from the plan, which is a pure function of data, config and seed."""

    step: int  # optimizer steps done
    fingerprint: str  # of data, config, base model; a checkpoint of another run is not resumed
    story: dict[str, Any]  # what the run has measured so far, for its report
    tensors: dict[str, Tensor]

    @staticmethod
    def of(
        adapter: Adapter, optimizer: torch.optim.Optimizer, step: int, fingerprint: str, story: dict[str, Any]
    ) -> Checkpoint:
        tensors = dict(_named(adapter))
        for name, parameter in _named(adapter).items():
            for moment, value in state_of(optimizer, parameter).items():
                tensors[f"{name}|{moment}"] = value
        return Checkpoint(step, fingerprint, story, {n: t.detach().cpu().contiguous() for n, t in tensors.items()})

    def restore(self, adapter: Adapter, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for name, parameter in _named(adapter).items():
                parameter.copy_(self.tensors[name])
                moments = {
                    key.partition("|")[2]: tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}|")
                }
                restore_state(optimizer, parameter, moments)

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
        for stale in _steps(folder)[:-KEPT]:
            shutil.rmtree(folder / f"checkpoint-{stale}")

    @staticmethod
    def newest(folder: Path, fingerprint: str) -> Checkpoint | None:
        """The newest whole checkpoint of this very run, or None. Damaged and foreign ones are passed over."""
        for step in reversed(_steps(folder)):
            path = folder / f"checkpoint-{step}"
            if verify(path) is not None:
                continue
            state = json.loads((path / STATE).read_text())
            if state["fingerprint"] == fingerprint:
                return Checkpoint(step, fingerprint, state["story"], load((path / TENSORS).read_bytes()))
        return None


def _named(adapter: Adapter) -> dict[str, Tensor]:
    return {f"A.{n}": p for n, p in adapter.A.items()} | {f"B.{n}": p for n, p in adapter.B.items()}


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = [path.name.removeprefix("checkpoint-") for path in folder.iterdir() if (path / MANIFEST).exists()]
    return sorted(int(name) for name in names if name.isdigit())
