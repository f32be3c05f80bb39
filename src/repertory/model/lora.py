"""LoRA: low-rank corrections of the base model's linear layers, in PEFT's file format.

The method is https://arxiv.org/abs/2106.09685. The base model is wrapped once: each linear layer of its blocks becomes
a LoraLinear, which by itself changes nothing. Which correction applies to which token is decided for one forward pass
at a time by a routing:

    Training    one adapter for all tokens, with gradient and dropout
    Serving     spans of tokens, each with the adapter of its voice, or with none

Shapes: N tokens, r rank, in_features and out_features of the layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from numpy.random import SFC64
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from repertory.errors import InvalidInput, RepertoryError
from repertory.manifest import write_durably

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


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


@dataclass
class Training:
    """One adapter for all tokens. Products run in the base's precision, the weights stay in their own (fp32)."""

    adapter: Adapter
    dropout: float = 0.0

    def through(self, siblings: Siblings, x: Tensor) -> Tensor:
        corrected = [layer.name for layer in siblings.layers if layer.name in self.adapter.A]
        y: Tensor
        if not corrected:
            y = _Frozen.apply(x, siblings)  # type: ignore[no-untyped-call]
        else:
            weights = [half[name] for half in (self.adapter.A, self.adapter.B) for name in corrected]
            scaling = self.adapter.config.scaling
            y = _FusedLora.apply(x, siblings, corrected, scaling, self.dropout, *weights)  # type: ignore[no-untyped-call]
        return y


def dropout_mask(shape: torch.Size, share: float, device: torch.device) -> Tensor:
    """Bytes of ones where kept, 0 with probability `share` (to 1/65,536), from torch's default generator.

    On a CPU torch's generator gives a seed only: numpy's draws twice as fast (`benchmarks/kernels.py`).
    """
    places = math.prod(shape)
    draws = -(-places // 4)  # four places to each 64 random bits
    if device.type == "cpu":
        drawn = SFC64(int(torch.randint(2**62, ()))).random_raw(draws)
        bits = torch.from_numpy(drawn.view("int64"))
    else:
        bits = torch.empty(draws, dtype=torch.int64, device=device).random_(-(2**63), None)
    mask = torch.empty(places, dtype=torch.int8, device=device)
    torch.ge(bits.view(torch.int16)[:places], round(share * 65536) - 32768, out=mask)
    return mask.neg_().view(shape)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def drop_(x: Tensor, mask: Tensor) -> Tensor:
    """Set to 0, in place, what a dropout mask does not keep: by the bits, ten times faster than a product by booleans
    on a CPU.
    """
    bits = _BITS[x.dtype.itemsize]
    x.view(bits).bitwise_and_(mask.to(bits))
    return x


class _Frozen(torch.autograd.Function):
    """Frozen layers, quantized or not, of which nothing is kept for the backward pass.

    bitsandbytes' own function keeps the input of an 8-bit layer, out of the reach of gradient checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, siblings: Siblings) -> Tensor:
        ctx.siblings = siblings
        return siblings.base(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.siblings.weight(grads[0].dtype), None


class _FusedLora(torch.autograd.Function):
    """base(x) + scaling * dropout(x) A' B', with the base frozen and A, B possibly in a higher precision than x.

    The A of siblings stand below each other, so that one product reads x for all. Their B stand in the diagonal of a
    matrix that is 0 elsewhere: to multiply by zeros costs less than to start a product for each.

    What plain autograd would write to memory and read again is added in place: the correction to the output, and its
    gradient to that of the input.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, siblings: Siblings, names: list[str], scaling: float, dropout: float, *weights: Tensor
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        mask = dropout_mask(flat.shape, dropout, flat.device) if dropout else None
        kept = flat if mask is None else drop_(flat.clone(), mask)
        a, b, blocks = _side_by_side(siblings, names, weights, x.dtype)
        scaling = scaling / (1 - dropout)  # what is kept stands for what is not
        low_rank = (kept @ a.t()).mul_(scaling)
        y = siblings.base(flat).addmm_(low_rank, b.t())
        ctx.save_for_backward(kept, mask, low_rank, a, b)
        ctx.siblings, ctx.blocks, ctx.scaling, ctx.x_shape = siblings, blocks, scaling, x.shape
        ctx.precision = weights[0].dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, mask, low_rank, a, b = ctx.saved_tensors
        grad_y = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low_rank = (grad_y @ b).mul_(ctx.scaling)
        grad_b = (grad_y.t() @ low_rank).to(ctx.precision)
        grad_a = (grad_low_rank.t() @ kept).to(ctx.precision)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.siblings.weight(grad_y.dtype)
            if mask is None:
                grad_x.addmm_(grad_low_rank, a)
            else:
                grad_x.add_(drop_(grad_low_rank @ a, mask))
            grad_x = grad_x.view(ctx.x_shape)
        grads_A = [grad_a[ranks] for _, ranks in ctx.blocks]
        grads_B = [grad_b[rows, ranks] for rows, ranks in ctx.blocks]
        return grad_x, None, None, None, None, *grads_A, *grads_B


def _side_by_side(
    siblings: Siblings, names: list[str], weights: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[tuple[slice, slice]]]:
    """A (ranks, in_features) and B (all out_features, ranks) of the named siblings; where in B each one's stands."""
    As, Bs = weights[: len(names)], weights[len(names) :]
    if len(siblings.layers) == 1:
        return As[0].to(dtype), Bs[0].to(dtype), [(slice(None), slice(None))]
    rank = len(As[0])
    a = As[0].new_empty(len(names) * rank, As[0].shape[1], dtype=dtype)
    b = Bs[0].new_zeros(sum(siblings.widths), len(names) * rank, dtype=dtype)
    blocks: list[tuple[slice, slice]] = []
    for layer, rows in zip(siblings.layers, siblings.slices, strict=True):
        if layer.name in names:
            at = len(blocks)
            ranks = slice(at * rank, (at + 1) * rank)
            a[ranks], b[rows, ranks] = As[at], Bs[at]
            blocks.append((rows, ranks))
    return a, b, blocks


class Serving:
    """Each token with the adapter of its voice: first one token of every decoding row, then chunks of prompts.

    All voices of the decoding rows take part in two products, over their weights side by side, so each is read once
    however many rows it has. In between a mask leaves to each row what is its own voice's, and nothing to a row of the
    bare base.
    """

    def __init__(
        self, rows: Sequence[Adapter | None], chunks: Sequence[tuple[Adapter | None, int]], stacks: AdapterStacks
    ) -> None:
        """`chunks`: of each, whose it is and how many tokens it has."""
        self.row_count = len(rows)
        self.chunks = chunks
        self.stacks = stacks
        stacks.seat([adapter for adapter in rows if adapter is not None])
        self._others: Tensor | None = None  # (rows, seats, 1), whose voice a row is not; None: all have the same
        if any(adapter is not voice for adapter in rows for voice in stacks.voices):
            others = [[adapter is not voice for voice in stacks.voices] for adapter in rows]
            self._others = torch.tensor(others, device=stacks.voices[0].device)[:, :, None]

    def through(self, siblings: Siblings, x: Tensor) -> Tensor:
        y = siblings.base(x)
        tokens, corrected = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        rows = self.row_count
        stack = self.stacks.of(siblings)
        if stack is not None:
            A, B = stack
            low_rank = F.linear(tokens[:rows], A)
            if self._others is not None:
                # Filled, not multiplied by 0: what overflows in one voice must not reach the others.
                low_rank.view(rows, self._others.shape[1], -1).masked_fill_(self._others, 0)
            corrected[:rows].addmm_(low_rank, B)
        begin = rows
        for voice, count in self.chunks:
            if voice is not None:
                A, B = _Stack.alone(voice, siblings)
                corrected[begin : begin + count].addmm_(F.linear(tokens[begin : begin + count], A), B)
            begin += count
        return y


class AdapterStacks:
    """The weights of the voices that decode, side by side. Each keeps its seat while others come and go, so that one
    that comes costs the writing of its own weights.
    """

    def __init__(self) -> None:
        self.voices: list[Adapter] = []  # by seat; some of them may decode no more
        self._stacks: dict[str, _Stack] = {}

    def seat(self, voices: Sequence[Adapter]) -> None:
        """Seat all of these. The others leave their seats to them, and altogether when they are the most."""
        wanted = {id(voice): voice for voice in voices}
        if len(self.voices) >= 2 * len(wanted):
            self.voices = list(wanted.values())
        seated = {id(voice) for voice in self.voices}
        free = [seat for seat, voice in enumerate(self.voices) if id(voice) not in wanted]
        for voice in wanted.values():
            if id(voice) not in seated:
                if free:
                    self.voices[free.pop()] = voice
                else:
                    self.voices.append(voice)

    def of(self, siblings: Siblings) -> tuple[Tensor, Tensor] | None:
        """Scaled A (seats * ranks, in_features) and B (seats * ranks, all out_features); None where none corrects them.

        The ranks of a seat are those of each sibling in turn, r each, r the largest rank among the voices.
        """
        if not self.voices:
            return None
        name, rank = siblings.layers[0].name, max(voice.config.rank for voice in self.voices)
        stack = self._stacks.get(name)
        if stack is None or len(stack.held) < len(self.voices) or stack.rank < rank:
            seats = 1 << (len(self.voices) - 1).bit_length()
            stack = self._stacks[name] = _Stack(siblings, seats, rank, self.voices[0])
        return stack.of(self.voices)

    def forget(self, adapter: Adapter) -> None:
        """It decodes no more."""
        if adapter in self.voices:
            self.clear()

    def clear(self) -> None:
        self.voices, self._stacks = [], {}


class _Stack:
    """Seats for the weights that correct one group of siblings."""

    def __init__(self, siblings: Siblings, seats: int, rank: int, like: Adapter) -> None:
        self.siblings = siblings
        self.rank = rank
        self.held: list[Adapter | None] = [None] * seats
        self._corrects = [False] * seats
        some = like.parameters[0]
        self._A = some.new_zeros(seats, len(siblings.layers), rank, siblings.layers[0].shape[0])
        self._B = some.new_zeros(seats, len(siblings.layers), rank, sum(siblings.widths))

    @staticmethod
    def alone(voice: Adapter, siblings: Siblings) -> tuple[Tensor, Tensor]:
        stack = _Stack(siblings, 1, voice.config.rank, voice)
        stack._put(0, voice)
        return stack._A.flatten(0, 2), stack._B.flatten(0, 2)

    def of(self, voices: Sequence[Adapter]) -> tuple[Tensor, Tensor] | None:
        for seat, voice in enumerate(voices):
            if self.held[seat] is not voice:
                self._put(seat, voice)
        count = len(voices)
        if not any(self._corrects[:count]):
            return None
        return self._A[:count].flatten(0, 2), self._B[:count].flatten(0, 2)

    def _put(self, seat: int, voice: Adapter) -> None:
        A, B, rank = self._A[seat].zero_(), self._B[seat].zero_(), voice.config.rank
        for layer, columns, layer_A, layer_B in zip(self.siblings.layers, self.siblings.slices, A, B, strict=True):
            if layer.name in voice.A:
                layer_A[:rank] = voice.A[layer.name] * voice.config.scaling
                layer_B[:rank, columns] = voice.B[layer.name].t()
        self.held[seat] = voice
        self._corrects[seat] = any(layer.name in voice.A for layer in self.siblings.layers)
