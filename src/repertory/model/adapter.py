"""An adapter: the low-rank weights of one voice, in PEFT's file format.

Shapes: r rank, in_features and out_features of the layer that is corrected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from repertory.errors import RepertoryError
from repertory.manifest import write_durably
from repertory.model.layers import LoraLinear

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoraConfig:
    """What PEFT's adapter_config.json says of a plain LoRA adapter."""

    base_model: str
    rank: int
    alpha: float
    dropout: float
    target_modules: list[str]  # short names: q_proj, ...
    revision: str | None = None  # of the base model: the commit on the hub
    fan_in_fan_out: bool = False  # Conv1D layers
    rslora: bool = False  # rank-stabilised: https://arxiv.org/abs/2312.03732

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(eq=False)
class Adapter:
    """One voice: for each corrected layer A (r, in_features) and B (out_features, r); y += scaling * x A' B'."""

    config: LoraConfig
    A: dict[str, Tensor]
    B: dict[str, Tensor]

    @staticmethod
    def fresh(config: LoraConfig, layers: dict[str, LoraLinear], names: Sequence[str], seed: int) -> Adapter:
        """An adapter that changes nothing yet: A drawn as PEFT draws it (Kaiming uniform), B zero. fp32, trainable."""
        generator = torch.Generator().manual_seed(seed)
        A: dict[str, Tensor] = {}
        B: dict[str, Tensor] = {}
        for name in names:
            in_features, out_features = layers[name].shape
            device = next(layers[name].parameters()).device
            bound = in_features**-0.5  # kaiming_uniform_ with a = sqrt(5)
            drawn = torch.empty(config.rank, in_features).uniform_(-bound, bound, generator=generator)
            A[name] = nn.Parameter(drawn.to(device))
            B[name] = nn.Parameter(torch.zeros(out_features, config.rank, device=device))
        return Adapter(config, A, B)

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.A.values(), *self.B.values()]

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def size_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)

    def trainable(self) -> Adapter:
        """A copy in fp32, to be trained on."""

        def leaves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: nn.Parameter(weight.detach().float().clone()) for name, weight in weights.items()}

        return Adapter(self.config, leaves(self.A), leaves(self.B))

    def to(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """A copy to serve from. Raises AdapterUnusable where a weight is no finite number there."""

        def moved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: weight.detach().to(device, dtype) for name, weight in weights.items()}

        copy = Adapter(self.config, moved(self.A), moved(self.B))
        if not all(weight.isfinite().all() for weight in copy.parameters):
            raise AdapterUnusable(f"the adapter has weights that are not finite in {dtype}")
        return copy

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under PEFT's names."""
        state = {}
        for name in self.A:
            state[f"base_model.model.{name}.lora_A.weight"] = self.A[name].detach().cpu().contiguous()
            state[f"base_model.model.{name}.lora_B.weight"] = self.B[name].detach().cpu().contiguous()
        return state

    def save(self, folder: Path) -> list[str]:
        """Write the two files of PEFT's format durably; returns their names."""
        described = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.config.base_model,
            "revision": self.config.revision,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": self.config.target_modules,
            "fan_in_fan_out": self.config.fan_in_fan_out,
            "bias": "none",
            "use_rslora": self.config.rslora,
            "use_dora": False,
            "inference_mode": True,
            "modules_to_save": None,
        }
        write_durably(folder / WEIGHTS, save(self.state_dict(), metadata={"format": "pt"}))
        write_durably(folder / CONFIG, json.dumps(described, indent=1).encode())
        return [WEIGHTS, CONFIG]

    @staticmethod
    def load(folder: Path, layers: dict[str, LoraLinear]) -> Adapter:
        """Read an adapter in PEFT's format. Raises AdapterUnusable if it does not fit this base model."""
        try:
            described = json.loads((folder / CONFIG).read_text())
            # Read, not mapped: a mapped file that is cut short later ends the whole process with SIGBUS.
            tensors = load((folder / WEIGHTS).read_bytes())
        except (OSError, ValueError, SafetensorError) as error:
            raise AdapterUnusable(f"the adapter {folder.name} cannot be read: {error}") from error
        config = _plain_lora(described, folder.name)
        A: dict[str, Tensor] = {}
        B: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
            if name not in layers or kind not in ("A.weight", "B.weight"):
                raise AdapterUnusable(f"the adapter {folder.name} holds {key}, which this base model has not")
            in_features, out_features = layers[name].shape
            expected = (config.rank, in_features) if kind == "A.weight" else (out_features, config.rank)
            if tuple(tensor.shape) != expected:
                raise AdapterUnusable(f"{key} of adapter {folder.name} is {tuple(tensor.shape)}, not {expected}")
            (A if kind == "A.weight" else B)[name] = tensor
        if A.keys() != B.keys() or not A:
            raise AdapterUnusable(f"the adapter {folder.name} has layers with only one of lora_A and lora_B")
        return Adapter(config, {name: A[name] for name in sorted(A)}, {name: B[name] for name in sorted(A)})


class AdapterUnusable(RepertoryError):
    """An adapter's files are damaged or belong to another base model."""

    status = 503
    code = "adapter_unusable"
    cure = "Train this version again, or promote another one; the other voices are not affected."


def _plain_lora(described: dict[str, object], name: str) -> LoraConfig:
    for option in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication"):
        if described.get(option):
            raise AdapterUnusable(f"the adapter {name} uses {option}, which is not supported")
    if described.get("peft_type") != "LORA" or described.get("bias", "none") != "none":
        raise AdapterUnusable(f"the adapter {name} is no plain LoRA adapter")
    try:
        targets = described["target_modules"]
        return LoraConfig(
            base_model=str(described["base_model_name_or_path"]),
            revision=None if described.get("revision") is None else str(described["revision"]),
            rank=int(described["r"]),  # type: ignore[call-overload]
            alpha=float(described["lora_alpha"]),  # type: ignore[arg-type]
            dropout=float(described.get("lora_dropout") or 0.0),  # type: ignore[arg-type]
            target_modules=[targets] if isinstance(targets, str) else sorted(targets),  # type: ignore[call-overload]
            fan_in_fan_out=bool(described.get("fan_in_fan_out")),
            rslora=bool(described.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterUnusable(f"{CONFIG} of adapter {name} is damaged: {error!r}") from error
