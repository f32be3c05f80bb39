"""How much memory a base model and a training run take, from shapes alone: no weights are needed, nothing is run.

Activations are what autograd keeps between forward and backward, counted operation by operation as this package
computes them (`lora`, `rmsnorm`, `gatedmlp`, `packedattention`, `attention`, `crossentropy`), for one micro-batch.
Measured beside it on a CPU (bundled model, rank 16, all linear layers, 128 to 640 tokens, fp32 and bf16;
`docs/log.md`): `python -m benchmarks.memory` sees a resident memory that rises 1.14 to 1.45 times as far, for which
ALLOCATOR_OVERHEAD stands. No GPU has confirmed the figures yet.

Shapes: h hidden size, i intermediate size, q query heads x head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from repertory.contracts import BaseKey, OptimizerName
from repertory.model.attention import MOST_WRITTEN_OUT
from repertory.model.kernel import lacking
from repertory.model.packedattention import fits

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# NF4 and FP4: half a byte, an 8-bit scale per 64 weights, and an fp32 scale per 256 of those ("double quantization",
# https://arxiv.org/abs/2305.14314). 8-bit: a byte, and an fp32 scale per output feature, which is next to nothing.
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
QUANTIZED_BYTES = {"4bit": FOUR_BITS, "fp4": FOUR_BITS, "8bit": 1.0}
LOGITS_POSITIONS = 128  # `crossentropy.CHUNK`, which cannot be imported from here
BYTES_PER_LOGIT = 12  # in the base's precision, in fp32, their logarithm, and the gradient: measured, see the test
# What glibc takes from the system for what torch allocates: freed blocks that nothing later fits into. Measured, see
# above. torch's own allocator on CUDA rounds little.
ALLOCATOR_OVERHEAD = {"cpu": 1.4, "cuda": 1.0}
LEAST_8BIT = 4096  # elements: bitsandbytes keeps the moments of smaller tensors in fp32
GIB = 2**30
SHORTER_ROWS = (1024, 512, 256)  # tokens: what is advised where a row does not fit


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the memory of a causal language model depends on."""

    hidden_size: int
    intermediate_size: int  # features between the MLP's layers, of one token
    is_gated: bool  # the MLP multiplies two projections
    is_softcapped: bool  # attention, whose weights are then written out on every device
    is_llama_like: bool  # attention, which is then compiled on a CPU (`selfattention`)
    blocks: int
    heads: int
    query_size: int  # query heads x head size
    key_size: int  # key heads x head size
    vocabulary: int
    linear: dict[str, tuple[int, int]]  # (in_features, out_features) of the blocks' linear layers, by name
    parameters: int

    @property
    def head_size(self) -> int:
        return self.query_size // self.heads

    @staticmethod
    def of(config: Any, linear: dict[str, tuple[int, int]], parameters: int) -> Architecture:
        """From a transformers config, the linear layers of the blocks, and the count of all parameters."""
        hidden = int(config.hidden_size)
        experts = getattr(config, "num_experts_per_tok", None) or 1  # of a mixture, those a token goes through
        one = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
        intermediate = int(one or getattr(config, "ffn_dim", None) or getattr(config, "n_inner", None) or 4 * hidden)
        head_size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        into_mlp = sum(out for _, out in linear.values() if out % intermediate == 0) // config.num_hidden_layers
        return Architecture(
            hidden_size=hidden,
            intermediate_size=intermediate * int(experts),
            is_softcapped=getattr(config, "attn_logit_softcapping", None) is not None,
            is_llama_like=config.model_type in ("llama", "mistral", "qwen2"),
            is_gated=into_mlp >= 2 * intermediate or experts > 1,
            blocks=int(config.num_hidden_layers),
            heads=int(config.num_attention_heads),
            query_size=int(config.num_attention_heads * head_size),
            key_size=int((getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size),
            vocabulary=int(config.vocab_size),
            linear=linear,
            parameters=parameters,
        )

    def base_bytes(self, key: BaseKey) -> int:
        """Of the loaded weights: linear layers of the blocks quantized, embeddings and norms in the key's dtype."""
        in_blocks = sum(math.prod(shape) for shape in self.linear.values())
        per_weight = QUANTIZED_BYTES.get(key.quantization, BYTES[key.dtype])
        return int(in_blocks * per_weight + (self.parameters - in_blocks) * BYTES[key.dtype])


@dataclass(frozen=True)
class BatchShape:
    """Tokens of one forward pass: a prefix that its rows share, and what each row has after it."""

    prefix: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes on the device."""

    base: int
    adapter: int  # fp32, which are the master weights too; and the copy in the base's precision that a pass keeps
    gradients: int
    optimizer: int  # two moments of AdamW, paged ones too: they leave the device only when it is full
    activations: int  # the most that one forward and backward holds beside all that

    @property
    def run(self) -> int:
        """What a run takes beside the base model."""
        return self.adapter + self.gradients + self.optimizer + self.activations

    @property
    def total(self) -> int:
        return self.base + self.run


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What decides how much memory a run takes."""

    architecture: Architecture
    key: BaseKey
    device: str  # cpu or cuda
    rank: int
    adapted: tuple[str, ...]  # names of linear layers
    dropout: float
    batch: BatchShape  # the largest micro-batch
    optimizer: OptimizerName = "adamw"
    gradient_checkpointing: bool = False  # keep the blocks' inputs alone, and compute the rest again going back

    def estimate(self) -> Estimate:
        architecture = self.architecture
        weights = sum(self.rank * sum(architecture.linear[name]) for name in self.adapted)
        element = BYTES[self.key.dtype]
        return Estimate(
            base=architecture.base_bytes(self.key),
            adapter=weights * (4 + (element if element < 4 and not self.gradient_checkpointing else 0)),
            gradients=4 * weights,
            optimizer=sum(
                self._moments_of(features) for name in self.adapted for features in architecture.linear[name]
            ),
            activations=self.activations,
        )

    def _moments_of(self, features: int) -> int:
        """Bytes of two moments of a matrix (rank, features): fp32, or a byte each and an fp32 scale per 256 of them."""
        weights = self.rank * features
        if self.optimizer == "adamw" or weights < LEAST_8BIT:
            return 8 * weights
        return 2 * weights + 2 * 4 * -(-weights // 256)

    @property
    def activations(self) -> int:
        """Kept by all blocks, and beside it the largest of what comes and goes: the logits of a chunk when the backward
        pass begins, the gradients inside one MLP, or those of attention weights that are written out.

        With gradient checkpointing the blocks keep their inputs alone; when the logits have gone, one block at a time
        is there whole.
        """
        architecture, batch, element = self.architecture, self.batch, BYTES[self.key.dtype]
        block = self._kept_by_a_block()
        logits = self._logits
        gradients = batch.tokens * 3 * (architecture.intermediate_size + architecture.hidden_size) * element
        unpacked = 0  # quantized weights become a whole matrix for their product
        if self.key.quantization != "none":
            unpacked = max(map(math.prod, architecture.linear.values())) * element
        written_out = [one.weights for one in self._attention_passes() if self._is_written_out(one)]
        weights = 2 * max(written_out, default=0) * element
        if self.gradient_checkpointing:
            inputs = architecture.blocks * batch.tokens * architecture.hidden_size * element
            mlp = self._kept_by_an_mlp()  # gone when the gradients of the attention weights come
            peak = inputs + max(logits, block + gradients, block - mlp + weights)
        else:
            peak = architecture.blocks * block + max(logits, gradients, weights)
        return int((peak + unpacked) * ALLOCATOR_OVERHEAD[self.device])

    @property
    def _logits(self) -> int:
        """Bytes of a chunk of them. A compiled loss writes the gradient over them."""
        vocabulary, tokens = self.architecture.vocabulary, self.batch.tokens
        if self.device == "cpu" and self.key.dtype != "fp16" and not self.architecture.is_softcapped:
            return min(tokens, 2 * LOGITS_POSITIONS) * vocabulary * BYTES[self.key.dtype]
        return min(tokens, LOGITS_POSITIONS) * vocabulary * BYTES_PER_LOGIT

    def _kept_by_a_block(self) -> int:
        """Bytes that autograd keeps of one block."""
        architecture, batch, element = self.architecture, self.batch, BYTES[self.key.dtype]
        h, i, q = architecture.hidden_size, architecture.intermediate_size, architecture.query_size
        features = h  # each norm keeps its input, and a number
        masks = 0
        adapted = [architecture.linear[name] for name in self.adapted]
        low_rank = self.rank * len(adapted) // architecture.blocks
        if self.dropout:  # an input is kept with some of it dropped, and which
            inputs = self._inputs_dropped() // architecture.blocks
            features, masks = features + inputs, inputs
        else:  # layers that read the same share it
            has_mlp = any(i in shape for shape in adapted)
            features += h + q + (h + i if has_mlp else 0)
        per_token = (features + low_rank) * element + masks + 2 * 4
        return batch.tokens * per_token + self._kept_by_an_mlp() + self._attention_elements() * element

    def _inputs_dropped(self) -> int:
        """Features. Layers that read the same drop the same, unless they are quantized (`layers.Siblings`)."""
        linear = self.architecture.linear
        if self.key.quantization != "none":
            return sum(linear[name][0] for name in self.adapted)
        # The last layer of a module (of attention, of an MLP) reads what its siblings before it have led to.
        last = {name.rpartition(".")[0]: name for name in linear}
        read = {(name.rpartition(".")[0], name in last.values()): linear[name][0] for name in self.adapted}
        return sum(read.values())

    def _kept_by_an_mlp(self) -> int:
        """Its norm keeps its input, the activation function its own, and a gate both of its factors."""
        architecture = self.architecture
        features = architecture.hidden_size + (2 if architecture.is_gated else 1) * architecture.intermediate_size
        return self.batch.tokens * features * BYTES[self.key.dtype]

    def _attention_elements(self) -> int:
        """Queries, keys and values; and the outputs, or the weights where they are written out.

        Where attention is compiled it keeps them as they are, and without dropout the next layer's input is the
        output, which is counted there. Else several rows are padded to the longest, and each has
        keys and values of the whole prefix beside its own.
        """
        architecture, elements = self.architecture, 0
        if self._has_compiled_attention:
            queries = 2 if self.dropout else 1
            return self.batch.tokens * (queries * architecture.query_size + 2 * architecture.key_size)
        for one in self._attention_passes():
            if self._is_written_out(one):
                read = one.queries * architecture.query_size + 2 * one.keys * architecture.key_size
                elements += one.rows * read + one.weights * self._kept_of_a_weight
            else:  # flash attention; keys and values are repeated for the heads that share them
                elements += one.rows * 2 * (one.queries + one.keys) * architecture.query_size
        return elements

    def _attention_passes(self) -> list[_AttentionPass]:
        """As `attention.PackedRows` cuts them: the rows after the prefix, and the prefix by itself."""
        batch, heads = self.batch, self.architecture.heads
        rows, longest = len(batch.lengths), max(batch.lengths)
        passes = [_AttentionPass(heads, rows, longest, batch.prefix + longest)]
        if batch.prefix and rows > 1:
            passes.append(_AttentionPass(heads, 1, batch.prefix, batch.prefix))
        return passes

    @property
    def _kept_of_a_weight(self) -> int:
        """Elements. Under a soft cap: what tanh gave, and what softmax gave, in fp32 and in the base's precision."""
        if not self.architecture.is_softcapped:
            return 1
        return 2 if BYTES[self.key.dtype] == 4 else 4

    @property
    def _has_compiled_attention(self) -> bool:
        architecture = self.architecture
        is_for_kernels = self.device == "cpu" and self.key.dtype != "fp16" and lacking() is None
        return is_for_kernels and architecture.is_llama_like and fits(BYTES[self.key.dtype], architecture.head_size)

    def _is_written_out(self, one: _AttentionPass) -> bool:
        if self._has_compiled_attention:
            return False
        return self.architecture.is_softcapped or (self.device == "cpu" and one.keys <= MOST_WRITTEN_OUT)


@dataclass(frozen=True)
class _AttentionPass:
    heads: int
    rows: int
    queries: int
    keys: int

    @property
    def weights(self) -> int:
        return self.heads * self.rows * self.queries * self.keys


def cures(demand: Demand, available_bytes: int) -> list[str]:
    """Settings with which the run would fit, the mildest first; at most three.

    Gradient checkpointing, no dropout, shorter rows, quantization that the job does not have yet, or several of these.
    """
    demand = replace(demand, batch=BatchShape(0, (demand.batch.prefix + max(demand.batch.lengths),)))  # a row alone
    found = []
    lengths = [demand.batch.tokens, *(short for short in SHORTER_ROWS if short < demand.batch.tokens)]
    for key in _keys(demand.key):
        dropouts = sorted({demand.dropout, 0.0}, reverse=True)
        for tokens, dropout, again in product(lengths, dropouts, sorted({demand.gradient_checkpointing, True})):
            changed = replace(
                demand, key=key, dropout=dropout, batch=BatchShape(0, (tokens,)), gradient_checkpointing=again
            )
            taken = changed.estimate().total
            if changed != demand and taken <= available_bytes:
                found.append(f"{_difference(demand, changed)} ({gib(taken)})")
                break
    return found[:3]


def _difference(demand: Demand, changed: Demand) -> str:
    """The settings that lead from one to the other."""
    settings = []
    if changed.key != demand.key:
        settings.append(f"use_{changed.key.quantization}=true")
    if changed.batch != demand.batch:
        settings.append(f"max_seq_length={changed.batch.tokens}")
    if changed.gradient_checkpointing != demand.gradient_checkpointing:
        settings.append("gradient_checkpointing=true")
    if changed.dropout != demand.dropout:
        settings.append("lora_dropout=0")
    return " and ".join(settings)


def quantizations_that_fit(architecture: Architecture, key: BaseKey, available_bytes: float) -> list[str]:
    """Settings with which the base model alone would fit."""
    return [
        f"use_{other.quantization}=true ({gib(architecture.base_bytes(other))})"
        for other in _keys(key)
        if other != key and architecture.base_bytes(other) <= available_bytes
    ]


def gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def _keys(key: BaseKey) -> Iterator[BaseKey]:
    """This precision, and the smaller ones."""
    yield key
    if key.quantization == "none":
        yield key.model_copy(update={"quantization": "8bit"})
    if key.quantization not in ("4bit", "fp4"):
        yield key.model_copy(update={"quantization": "4bit"})
