"""The base model's linear layers, each wrapped once so that a forward pass may correct what it gives.

A wrapped layer by itself changes nothing. What is added to which token's output is decided for one forward pass at a
time by a routing (`lora.Training`, `lora.Serving`).

Shapes: N tokens, in_features and out_features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repertory.errors import InvalidInput


class Routing(Protocol):
    def through(self, siblings: Siblings, x: Tensor) -> Tensor:
        """The corrected outputs of `siblings` for `x`, side by side: (1, N, in_features) -> (1, N, all out_features).

        Some families leave the 1 out.
        """
        ...


@dataclass
class Router:
    """Holds the routing of the forward pass in progress; shared by all layers of one base model."""

    routing: Routing | None = None

    @contextmanager
    def through(self, routing: Routing | None) -> Iterator[None]:
        before, self.routing = self.routing, routing
        try:
            yield
        finally:
            self.routing = before


class LoraLinear(nn.Module):
    """A frozen linear layer whose output the routing in force may correct."""

    def __init__(self, base: nn.Module, name: str, router: Router) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.router = router
        self.siblings = Siblings([self])

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features)"""
        if isinstance(self.base, Conv1D):
            return self.base.nx, self.base.nf
        return self.base.in_features, self.base.out_features  # type: ignore[return-value]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(out_features, in_features), what the frozen layer multiplies with; a quantized one's is unpacked for it."""
        base: Any = self.base
        if isinstance(base, Conv1D):
            return base.weight.t()  # type: ignore[no-any-return]
        if isinstance(base, Linear4bit):
            return dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)  # type: ignore[no-any-return]
        if isinstance(base, Linear8bitLt):
            held = base.state if base.state.CB is not None else base.weight  # its first pass moves them
            return held.CB.to(dtype).mul_((held.SCB / 127).unsqueeze(1))  # type: ignore[no-any-return]
        return base.weight  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router.routing
        if routing is None:
            return self.base(x)  # type: ignore[no-any-return]
        return self.siblings.output_of(self, x, routing)


class Siblings:
    """Linear layers that read the same tensor, such as those of the queries, keys and values: one product does for all.

    Their weights are rows of one matrix, of which each layer holds its own. Most layers are their only sibling.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        self._weight: Tensor | None = None  # (all out_features, in_features)
        self._bias: Tensor | None = None
        self._read: Tensor | None = None  # what the outputs that nobody has asked for yet belong to
        self._outputs: dict[str, Tensor] = {}

    @staticmethod
    @torch.inference_mode(False)
    def join(layers: Sequence[LoraLinear]) -> None:
        """Make siblings of layers that read the same tensor, in the order in which the model calls them."""
        siblings = Siblings(layers)
        bases: list[nn.Linear] = [layer.base for layer in layers]  # type: ignore[misc]
        siblings._weight = torch.cat([base.weight.data for base in bases])
        if bases[0].bias is not None:
            siblings._bias = torch.cat([base.bias.data for base in bases])
        for layer, base, rows in zip(layers, bases, siblings.slices, strict=True):
            layer.siblings = siblings
            base.weight.data = siblings._weight[rows]
            if siblings._bias is not None:
                base.bias.data = siblings._bias[rows]

    @property
    def widths(self) -> list[int]:
        """Their out_features."""
        return [layer.shape[1] for layer in self.layers]

    @property
    def slices(self) -> list[slice]:
        """Where each one's output stands among all."""
        ends = list(accumulate(self.widths))
        return [slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)]

    def base(self, x: Tensor) -> Tensor:
        if self._weight is None:
            return self.layers[0].base(x)  # type: ignore[no-any-return]
        return F.linear(x, self._weight, self._bias)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(all out_features, in_features), what the frozen layers multiply with."""
        return self.layers[0].weight(dtype) if self._weight is None else self._weight

    def outputs(self, x: Tensor, routing: Routing | None) -> Tensor:
        """(1, N, in_features) -> (1, N, all out_features)"""
        return self.base(x) if routing is None else routing.through(self, x)

    def output_of(self, layer: LoraLinear, x: Tensor, routing: Routing) -> Tensor:
        """Computed for all siblings when the first one asks."""
        if len(self.layers) == 1:
            return routing.through(self, x)
        if self._read is not x or layer.name not in self._outputs:
            outputs = torch.split(routing.through(self, x), self.widths, -1)
            self._read, self._outputs = x, {one.name: y for one, y in zip(self.layers, outputs, strict=True)}
        output = self._outputs.pop(layer.name)
        if not self._outputs:
            self._read = None
        return output


class ReadingOrder:
    """A routing that corrects nothing, and notes which layers one after another read the same tensor."""

    def __init__(self) -> None:
        self._reads: list[tuple[Tensor, list[LoraLinear]]] = []  # the tensors are held: an address would be used again

    def through(self, siblings: Siblings, x: Tensor) -> Tensor:
        (layer,) = siblings.layers
        if self._reads and self._reads[-1][0] is x and _alike(self._reads[-1][1][0], layer):
            self._reads[-1][1].append(layer)
        else:
            self._reads.append((x, [layer]))
        return siblings.base(x)

    def join_siblings(self) -> None:
        for _, layers in self._reads:
            if len(layers) > 1:
                Siblings.join(layers)


def _alike(one: LoraLinear, other: LoraLinear) -> bool:
    """Whether their weights can be rows of one matrix: no quantized ones, and of one module."""
    bases = one.base, other.base
    return (
        all(type(base) is nn.Linear for base in bases)
        and one.name.rpartition(".")[0] == other.name.rpartition(".")[0]
        and len({(base.bias is None, base.weight.dtype) for base in bases}) == 1
    )


def wrap_linear_layers(blocks: nn.ModuleList, prefix: str, router: Router) -> dict[str, LoraLinear]:
    """Replace every linear layer inside `blocks` by a LoraLinear. Keyed by the layer's name in the model.

    A mixture of experts is corrected in its attention alone: its router must not move, its experts are no linear layers
    but one tensor for all, and PEFT takes the names of a shared expert's layers for theirs.
    """
    mixtures = tuple(f"{name}." for name, module in blocks.named_modules() if hasattr(module, "experts"))
    wrapped = {}
    for parent_name, parent in list(blocks.named_modules()):
        if f"{parent_name}.".startswith(mixtures):
            continue
        for child_name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | Conv1D):  # bitsandbytes' layers are nn.Linear too
                name = ".".join(part for part in (prefix, parent_name, child_name) if part)
                layer = LoraLinear(child, name, router)
                setattr(parent, child_name, layer)
                wrapped[name] = layer
    return wrapped


def choose_layers(layers: dict[str, LoraLinear], target_modules: str | list[str]) -> list[str]:
    """The names of the layers that `target_modules` means. Raises InvalidInput with the valid choices."""
    short_names = sorted({name.rsplit(".", 1)[-1] for name in layers})
    if target_modules == "all-linear":
        return list(layers)
    wanted = target_modules.split(",") if isinstance(target_modules, str) else target_modules
    wanted = [name.strip() for name in wanted if name.strip()]
    unknown = [name for name in wanted if name not in short_names]
    if unknown or not wanted:
        raise InvalidInput(
            f"lora_target_modules {unknown or target_modules!r} names no linear layer of this base model",
            code="unknown_target_module",
            cure=f"Use all-linear, or some of: {', '.join(short_names)}.",
            param="hyperparameters.lora_target_modules",
        )
    return [name for name in layers if name.rsplit(".", 1)[-1] in wanted]
