"""The base model: one frozen causal language model, its tokenizer and its device, shared by every voice."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Int8Params, Params4bit
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from repertory import architectures
from repertory.contracts import BaseKey, Device
from repertory.data.conversations import Message
from repertory.data.render import Renderer
from repertory.errors import BaseModelUnavailable, InsufficientMemory, RepertoryError
from repertory.model import gguf, kernel
from repertory.model.attention import (
    ATTENTION,
    Layout,
    PackedRows,
    Scoring,
    check_masks,
    layout_in_force,
)
from repertory.model.decoder import Decoder
from repertory.model.diagnosis import cpu_facts
from repertory.model.gatedmlp import slim_gated_mlps
from repertory.model.kvcache import CachedRows, KVCache
from repertory.model.layers import LoraLinear, ReadingOrder, Router, Routing, wrap_linear_layers
from repertory.model.lora import AdapterStacks, Serving
from repertory.model.memory import GIB, Architecture, gib, quantizations_that_fit
from repertory.model.recompute import Recomputation
from repertory.model.rmsnorm import replace_rms_norms
from repertory.model.selfattention import quicken_attention
from repertory.model.weights import fingerprint, locate
from repertory.settings import Settings

# What transformers raises for files that are damaged or that it does not understand.
UNLOADABLE = (*gguf.UNREADABLE, AssertionError, SafetensorError, StrictDataclassError)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXACT_TOKENS = 32
PADDING = 32
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
TEMPLATE_SECONDS = 20.0  # rendering a few short conversations takes milliseconds


def detect_device() -> Device:
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        return Device(
            kind="cuda",
            name=facts.name,
            count=torch.cuda.device_count(),
            memory_bytes=facts.total_memory,
            has_bf16=torch.cuda.is_bf16_supported(including_emulation=False),
        )
    cpu = cpu_facts()
    return Device(kind="cpu", name=cpu["name"], memory_bytes=psutil.virtual_memory().total, has_bf16=cpu["has_bf16"])


@dataclass(kw_only=True)
class Outline:
    """A base model's shapes and limits: all that can be said of it where its weights are not in memory."""

    key: BaseKey
    device: torch.device
    model: nn.Module
    layers: dict[str, LoraLinear]
    max_positions: int

    @cached_property
    def parameter_count(self) -> int:
        """Of the base model as published: quantized weights are packed, so they cannot be counted by numel."""
        counted = 0
        for name, weight in self.model.named_parameters():
            layer = self.layers.get(name.removesuffix(".base.weight"))
            counted += math.prod(layer.shape) if layer is not None else weight.numel()
        return counted

    @cached_property
    def architecture(self) -> Architecture:
        shapes = {name: layer.shape for name, layer in self.layers.items()}
        return Architecture.of(self.model.config, shapes, self.parameter_count)


@dataclass(kw_only=True)
class Base(Outline):
    """One base model on one device. Every forward pass goes through `passing`, `hidden` and `logits`."""

    dtype: torch.dtype  # of the activations, and of the weights where they are not quantized
    body: nn.Module  # everything but the output embeddings
    router: Router
    recomputation: Recomputation
    renderer: Renderer
    has_conv1d: bool
    fingerprint: str  # of the weights on disk: an adapter fits no others
    memory_limit_bytes: int | None = None  # MAX_GPU_MEMORY_GB
    decoder: Decoder | None = None  # the fast way from one token to the next, where there is one

    @contextmanager
    def passing(self, layout: Layout, routing: Routing | None, *, recompute: bool = False) -> Iterator[None]:
        """What a forward pass needs to know. With `recompute` its backward pass computes the blocks again."""
        with ExitStack() as stack:
            stack.enter_context(layout_in_force(layout))
            stack.enter_context(self.router.through(routing))
            if recompute:
                stack.enter_context(self.recomputation.with_surroundings(lambda: self.passing(layout, routing)))
            yield

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states (N, hidden_size) of packed tokens `ids` (N,) at `positions` (N,), inside `passing`."""
        padding = padded_length(len(ids)) - len(ids)
        if padding:
            ids, positions = F.pad(ids, (0, padding)), F.pad(positions, (0, padding))
        out = self.body(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        return out.last_hidden_state[0, : len(ids) - padding]  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, hidden_size) -> (M, vocabulary), in fp32 at least, with the post-processing that some families have."""
        config: Any = self.model.config
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        count = len(hidden)
        logits: Tensor = head(F.pad(hidden, (0, 0, 0, padded_length(count) - count)))[:count]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scaling := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if softcap := getattr(config, "final_logit_softcapping", None):  # Gemma
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    @cached_property
    def plain_head(self) -> Tensor | None:
        """The output embeddings (vocabulary, hidden_size), where logits are their product with hidden states alone."""
        config: Any = self.model.config
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        processed = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        if (
            type(head) is not nn.Linear
            or head.bias is not None
            or any(getattr(config, each, None) for each in processed)
        ):
            return None
        return head.weight

    @property
    def vocabulary_size(self) -> int:
        return int(self.model.config.vocab_size)  # type: ignore[union-attr, arg-type]

    @property
    def layer_count(self) -> int:
        return int(self.model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]

    @property
    def available_bytes(self) -> int:
        """What this base model and everything beside it may take: its own weights, and what is free now."""
        available = self.architecture.base_bytes(self.key) + free_bytes(self.device.type)
        return available if self.memory_limit_bytes is None else min(available, self.memory_limit_bytes)

    @property
    def cache_bytes_per_token(self) -> int:
        """Of keys and values of one token in all layers."""
        config: Any = self.model.config
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * self.layer_count * key_heads * head_size * self.dtype.itemsize)

    def kv_cache(self) -> KVCache:
        return KVCache(self.layer_count)


def padded_length(tokens: int) -> int:
    """Few different lengths instead of all: oneDNN plans each new shape of a product, and keeps about a megabyte for it
    (`docs/log.md`). Small batches, the decoding rows, are left exact.
    """
    return tokens if tokens <= EXACT_TOKENS else -(-tokens // PADDING) * PADDING


def load(name: str, settings: Settings, device: Device, key: BaseKey, say: Callable[[str], None]) -> Base:
    """Load base model `name` as `key` says. `say` is told what is going on.

    Raises BaseModelUnavailable or InsufficientMemory.
    """
    located = locate(key, settings, say)
    folder, key = located.folder, located.key
    say(f"loading {name} ({_precision(key)}) on {device.name}")
    _check_memory(folder, key, device, settings)
    torch_device = _torch_device(device)
    limit = _limit_bytes(settings)
    if device.kind == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True  # what is computed in fp32, in ten bits of mantissa instead of 23
        if limit is not None:  # torch itself then refuses more, which a run can answer with a cut
            torch.cuda.set_per_process_memory_fraction(min(limit / device.memory_bytes, 1.0), torch_device)
    else:
        _keep_freed_memory()
        if (reason := kernel.lacking()) is not None:
            say(f"computing without compiled loops: {reason}")
    dtype = DTYPES[key.dtype]
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": torch_device},
            quantization_config=_quantization(key),
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except torch.OutOfMemoryError:
        raise
    except UNLOADABLE as error:
        if str(error) == repr(ATTENTION):  # a table of attention classes, as older families have it
            raise _unsupported(name, "its attention cannot be exchanged") from error
        raise BaseModelUnavailable(f"the base model {name} cannot be loaded: {_first_line(error)}") from error
    if lacking := sorted(loaded["missing_keys"]):  # transformers would leave them at random values
        raise BaseModelUnavailable(
            f"the files of the base model {name} lack {len(lacking)} of its tensors, such as {lacking[0]}",
            cure="Download or copy it again, or choose another base model.",
        )
    if left_over := sorted(loaded["unexpected_keys"]):
        say(f"leaving out {len(left_over)} tensors that {name} has no place for, such as {left_over[0]}")
    model.requires_grad_(False)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the base is frozen; only the adapter has dropout
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights at the first forward without gradient, in a format that rounds
            # otherwise than the one training uses, and that takes only some widths.
            module.support_avx512bf16_for_cpu = False
    replace_rms_norms(model)
    slim_gated_mlps(model)
    quicken_attention(model)
    body, blocks, prefix = _parts(model, name)
    router = Router()
    layers = wrap_linear_layers(blocks, prefix, router)
    base = Base(
        key=key,
        device=torch_device,
        dtype=dtype,
        model=model,
        body=body,
        layers=layers,
        router=router,
        recomputation=Recomputation(blocks),
        renderer=_renderer(tokenizer, name),
        max_positions=_max_positions(model.config),
        fingerprint=fingerprint(folder),
        has_conv1d=any(type(layer.base).__name__ == "Conv1D" for layer in layers.values()),
        memory_limit_bytes=limit,
    )
    # What lies in the mapped file would keep all of it mapped, and it has been read through once: to quantize it, or to
    # join siblings.
    for tensor in [*model.parameters(), *model.buffers()]:
        if not isinstance(tensor, Params4bit | Int8Params):
            tensor.data = tensor.data.clone()
    _check_vocabulary(base, name)
    _check_forward(base, name, say)
    give_back_memory(torch_device)
    return base


def renderer_in(folder: Path, name: str) -> Renderer | None:
    """Of the tokenizer in a base model's folder; None where there is none. Raises BaseModelUnavailable."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except UNLOADABLE:
        return None
    return _renderer(tokenizer, name)


def _renderer(tokenizer: Any, name: str) -> Renderer:
    """A chat template is a program of whoever published the model: it may fail in any way, and it may never end."""
    if isinstance(tokenizer.chat_template, dict):  # several by name, for tools and documents; chats go through this one
        tokenizer.chat_template = tokenizer.chat_template.get("default", "")
        if not tokenizer.chat_template:
            raise _template_unusable(name, "is none of its several ones, of which none is called 'default'")
    found: list[Renderer | BaseException] = []

    def render() -> None:
        try:
            found.append(Renderer(tokenizer))
        except BaseException as error:
            found.append(error)

    rendering = threading.Thread(target=render, name="chat-template", daemon=True)
    rendering.start()
    rendering.join(TEMPLATE_SECONDS)
    if rendering.ident is not None and rendering.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(rendering.ident), ctypes.py_object(SystemExit))
        why = f"does not end within {TEMPLATE_SECONDS:g} seconds"
    elif isinstance(found[0], Renderer):
        return found[0]
    elif isinstance(found[0], RepertoryError):
        raise found[0]
    else:
        why = f"fails ({type(found[0]).__name__}: {_first_line(found[0])[:120]})"
    raise _template_unusable(name, why)


def _template_unusable(name: str, why: str) -> BaseModelUnavailable:
    return BaseModelUnavailable(
        f"the chat template of the base model {name} {why}",
        code="template_unusable",
        cure="Choose another base model, or register a copy of its folder with a sound chat_template.jinja.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _precision(key: BaseKey) -> str:
    return key.dtype if key.quantization == "none" else f"{key.quantization}, computing in {key.dtype}"


# At every product of an 8-bit layer it would say that inputs are cast, which for bf16 and fp32 is always so.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _quantization(key: BaseKey) -> BitsAndBytesConfig | None:
    if key.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if key.quantization in ("4bit", "fp4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4" if key.quantization == "fp4" else "nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[key.dtype],
        )
    return None


def outline(folder: Path, key: BaseKey, device: Device) -> Outline:
    """The model that `folder`'s config.json describes, as it would be on `device`: built on torch's meta device.

    Raises BaseModelUnavailable.
    """
    name = key.base_model
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            # "eager" stands instead of what config.json may name: attention that has to be installed, or downloaded.
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, dtype=DTYPES[key.dtype], attn_implementation="eager"
            )
    except UNLOADABLE as error:
        raise BaseModelUnavailable(f"the base model {name} cannot be loaded: {_first_line(error)}") from error
    _, blocks, prefix = _parts(model, name)
    outlined = Outline(
        key=key,
        device=_torch_device(device),
        model=model,
        layers=wrap_linear_layers(blocks, prefix, Router()),
        max_positions=_max_positions(config),
    )
    try:
        has_blocks = bool(outlined.architecture.linear)
    except AttributeError as error:  # no heads, say
        raise _unsupported(name, _first_line(error)) from error
    if not has_blocks:
        raise _unsupported(name, "its blocks have no linear layers outside of experts")
    return outlined


def _torch_device(device: Device) -> torch.device:
    return torch.device("cuda", 0) if device.kind == "cuda" else torch.device("cpu")


def free_bytes(kind: str) -> int:
    """Of the memory that a device of this kind computes in, now."""
    if kind == "cuda":
        return int(torch.cuda.mem_get_info(0)[0])
    return int(psutil.virtual_memory().available)


def give_back_memory(device: torch.device) -> None:
    """What is not needed any more, to the device or the system: allocators would keep it for themselves."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL(None).malloc_trim(0)


def _keep_freed_memory() -> None:
    """From step to step: the allocator would give large blocks back to the system, which clears them page by page when
    the next step asks for as many. `give_back_memory` is for when there is no next step.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # not every C library has it
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _max_positions(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", 0) or 2048)


def _limit_bytes(settings: Settings) -> int | None:
    return None if settings.max_gpu_memory_gb is None else int(settings.max_gpu_memory_gb * GIB)


def _check_memory(folder: Path, key: BaseKey, device: Device, settings: Settings) -> None:
    """Refuse a base model that cannot fit, before half of it is loaded."""
    architecture = outline(folder, key, device).architecture
    needed = architecture.base_bytes(key)
    free = free_bytes(device.kind)
    limit = _limit_bytes(settings)
    if limit is not None:
        free = min(free, limit)
    if needed > free:
        fitting = quantizations_that_fit(architecture, key, free)
        raise InsufficientMemory(
            f"the base model {key.base_model} needs about {gib(needed)} as {_precision(key)}; "
            f"{device.name} has {gib(free)} {'free' if limit is None else 'free within MAX_GPU_MEMORY_GB'}",
            cure=f"Set {' or '.join(fitting)}, or choose a smaller base model."
            if fitting
            else "Choose a smaller base model; this one does not fit in 4-bit either.",
        )


def _parts(model: Any, name: str) -> tuple[nn.Module, nn.ModuleList, str]:
    """The model without its output embeddings, its blocks, and the blocks' name in the model."""
    body: nn.Module = model.base_model
    count = getattr(model.config, "num_hidden_layers", None)
    for found, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return body, module, found
    raise _unsupported(name, "its blocks were not found")


def _unsupported(name: str, why: str) -> BaseModelUnavailable:
    return BaseModelUnavailable(
        f"the architecture of {name} is not supported: {why}",
        code=architectures.CODE,
        cure=architectures.CURE,
    )


def _check_vocabulary(base: Base, name: str) -> None:
    """A token without an embedding would be an internal error on a CPU, and on a card the end of the host.

    Tokens that were added later and that no template writes may be beyond: nobody's words become them.
    """
    tokenizer = base.renderer.tokenizer
    words = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)
    row = base.renderer.row([Message(role="user", content="u"), Message(role="assistant", content="a")])
    last = max(words | set(row.input_ids if row else []), default=0)
    if last >= base.vocabulary_size:
        raise BaseModelUnavailable(
            f"the tokenizer of the base model {name} has a token {last} ({tokenizer.convert_ids_to_tokens(last)!r}),"
            f" and the model has embeddings for {base.vocabulary_size} only",
            code="template_unusable",
            cure="Choose another base model, or register a copy of its folder with the tokenizer and chat template of"
            " the model it was made from.",
        )


@dataclass(frozen=True)
class _Noting:
    """A layout, and how each layer weighed what it saw of it."""

    layout: PackedRows
    scorings: dict[int, Scoring] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
        self.scorings[layer] = how
        return self.layout.attend(layer, query, key, value, how)


@dataclass(eq=False)
class _Checked:
    """Whose row of the cache is checked."""

    cached_tokens: int = 0


@torch.inference_mode()
def _check_forward(base: Base, name: str, say: Callable[[str], None]) -> None:
    """Compare our packed and cached forward passes with the model's own: whoever computes otherwise is refused here.

    First who sees whom at the end of the longest rows. Then the logits: two rows of 12 tokens share a prefix of 8; the
    second one's last token is then decoded from the cache. A family with another kind of attention would be wrong in
    every reply, silently.

    The packed pass also shows which layers read the same tensor; they are joined for the passes that follow, and from
    then on. With that the fast decoder can be made, where there is one for this family; one that differs is not used.
    """
    ids = torch.randint(0, base.vocabulary_size, (12 + 4,), generator=torch.Generator().manual_seed(0)).to(base.device)
    row = torch.cat((ids[:8], ids[12:]))
    packed = _Noting(PackedRows(prefix=8, lengths=(4, 4), device=base.device))
    order, bare = ReadingOrder(), Serving([], [], AdapterStacks())
    cache = base.kv_cache()
    holder = _Checked()
    cache.enter(holder, 12)
    first = CachedRows(cache=cache, decoding=[], chunks=[(holder, 11)], device=base.device)
    last = CachedRows(cache=cache, decoding=[holder], chunks=[], device=base.device)
    try:
        check_masks(base.model, base.max_positions)
        base.model.set_attn_implementation("eager")  # type: ignore[operator]
        expected = base.model(input_ids=row[None], use_cache=False).logits[0, -1].float()
        base.model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
        with base.passing(packed, order):
            from_packed = base.logits(base.hidden(ids, packed.layout.positions)[-1:])[0]
        order.join_siblings()
        with base.passing(packed.layout, bare):
            from_joined = base.logits(base.hidden(ids, packed.layout.positions)[-1:])[0]
        with base.passing(first, bare):
            base.hidden(row[:-1], first.positions)
        holder.cached_tokens = 11
        with base.passing(last, bare):
            from_cache = base.logits(base.hidden(row[-1:], last.positions))[0]
        scorings = [packed.scorings[layer] for layer in range(base.layer_count)]
        base.decoder = Decoder.of(base.model, base.layers, base.dtype, scorings)
        if base.decoder is not None:
            from_decoder = base.decoder.logits([int(row[-1])], [holder], [None], cache)[0]
    except (AssertionError, RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise _unsupported(name, f"the forward pass over packed rows fails ({_first_line(error)})") from error
    if not expected.isfinite().all():
        raise BaseModelUnavailable(
            f"what the base model {name} computes in {base.key.dtype} is no number",
            cure="Set DTYPE=bf16 or fp32, which hold larger numbers than fp16."
            if base.key.dtype == "fp16"
            else "Its weights are damaged: download or copy it again, or choose another base model.",
        )
    # 4-bit and 8-bit products and bf16 round differently from shape to shape; a wrong mask or position is far beyond.
    allowed = 1e-3 if base.key.dtype == "fp32" and base.key.quantization == "none" else 0.1
    for how, logits in (("packed", from_packed), ("joined", from_joined), ("cached", from_cache)):
        error_ratio = ((logits - expected).norm() / expected.norm()).item()
        if not error_ratio < allowed:
            raise _unsupported(name, f"{how} logits differ from the model's own by {error_ratio:.2g} of their norm")
    if base.decoder is not None and not (from_decoder - expected).norm() / expected.norm() < allowed:
        say(f"decoding {name} without its fast decoder, whose logits differ from the model's own")
        base.decoder = None
