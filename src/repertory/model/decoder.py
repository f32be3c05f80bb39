"""The next token's logits of decoding rows, for Llama-type models on a CPU, several times as fast as through torch.

The arithmetic is in `decoding_kernel`; here its arguments are put together. Weights, adapters and the cache stay where
they are: what is handed over is their addresses.

Shapes: L layers, N rows, P projections of a block, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repertory.model.adapter import Adapter
from repertory.model.attention import Scoring
from repertory.model.decoding_kernel import (
    COLUMNS,
    PROJECTIONS,
    RANK_MULTIPLE,
    step,
    step_without_bf16_products,
)
from repertory.model.kernel import HAS_BF16_PRODUCTS, is_for
from repertory.model.kvcache import Holder, KVCache
from repertory.model.layers import LoraLinear, Siblings
from repertory.model.rmsnorm import RMSNorm

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # the self-test at load compares each with its general pass

MOST_TABLES = 64  # twice a batch; those of unusual ranks hold copies of the weights, which must not add up


class Decoder:
    """Runs on the thread that drives the device, and the others that torch has."""

    @staticmethod
    def of(
        model: Any, layers: dict[str, LoraLinear], dtype: torch.dtype, scorings: Sequence[Scoring]
    ) -> Decoder | None:
        """None where `model`, whose layers are wrapped and joined, is of another kind or on another device.

        `scorings`: how each block's attention weighs, as seen in a forward pass.
        """
        weights = [layer.base for layer in layers.values()]
        if (
            not is_for(model.lm_head.weight)
            or model.config.model_type not in FAMILIES
            or model.config.hidden_act != "silu"
            or dtype not in (torch.bfloat16, torch.float32)
            or any(type(base) is not nn.Linear or base.weight.device.type != "cpu" for base in weights)
            or any(how.softcap is not None or how.scale != scorings[0].scale for how in scorings)
        ):
            return None
        blocks = [_Block.of(block) for block in model.model.layers]
        if None in blocks or type(model.model.norm) is not RMSNorm or model.lm_head.bias is not None:
            return None
        return Decoder(model, blocks, dtype, scorings)  # type: ignore[arg-type]

    def __init__(self, model: Any, blocks: list[_Block], dtype: torch.dtype, scorings: Sequence[Scoring]) -> None:
        config = model.config
        self.embeddings: nn.Embedding = model.model.embed_tokens
        self.rotation: nn.Module = model.model.rotary_emb
        self.blocks = blocks
        self.dtype = dtype
        self.threads = torch.get_num_threads()
        self._meeting = torch.zeros(2, 8, dtype=torch.int64)  # a cache line each
        self.head: Tensor = model.lm_head.weight
        self._weights = [block.weights for block in blocks]  # held, whatever becomes of the model
        attention = model.model.layers[0].self_attn
        self.heads = attention.q_proj.shape[1] // attention.head_dim
        self.groups = attention.k_proj.shape[1] // attention.head_dim
        self.head_size: int = attention.head_dim
        self.width: int = config.intermediate_size
        self.has_bf16_products = dtype == torch.bfloat16 and HAS_BF16_PRODUCTS
        norms = [norm for block in blocks for norm in (block.input_norm, block.output_norm)]
        self._facts = (int(blocks[0].head_norms is not None), float(config.rms_norm_eps), float(scorings[0].scale))
        self._model = (
            torch.tensor([[weight.data_ptr() for weight in block] for block in self._weights]),
            _fp32([norm.weight for norm in (*norms, model.model.norm)]),
            _fp32([block.bias for block in blocks]),
            _fp32([block.head_weights for block in blocks]),
            torch.tensor([how.window or 0 for how in scorings]),
        )
        self._tables: WeakKeyDictionary[Adapter, _Table] = WeakKeyDictionary()
        self._none = _Table.of(None, blocks)
        self._told: tuple[list[ref[_Table]], tuple[Any, ...]] = [], ()  # of the last step's voices, none of them held
        self._memory = _Memory(self)

    @torch.inference_mode()
    def logits(
        self, ids: Sequence[int], holders: Sequence[Holder], voices: Sequence[Adapter | None], cache: KVCache
    ) -> Tensor:
        """(N, vocabulary) in fp32, after token `ids[n]` of each holder, which continues its row of the cache.

        Rows of one voice take less time side by side. What is returned is overwritten by the next call.
        """
        places = torch.tensor([holder.cached_tokens for holder in holders])
        hidden = self.embeddings(torch.tensor(ids))
        cos, sin = self.rotation(hidden[None], places[None])
        numbers = [each.float().contiguous() for each in (hidden, cos, sin)]
        tables = [self._none if voice is None else self._table(voice) for voice in voices]
        memory = self._memory.of(len(ids), int(places.max()) + 1, max(table.most_ranks for table in tables))
        sizes = len(self.blocks), len(ids), hidden.shape[1], len(self.head), self.heads, self.groups, self.head_size
        sizes_within = self.width, memory.rank, memory.longest
        rows = (*numbers, places, cache.addresses(holders))
        way = step if self.has_bf16_products or self.dtype == torch.float32 else step_without_bf16_products
        asked = (self.head, self._meeting, self.threads, *sizes, *sizes_within, *self._facts, *self._model, *rows)
        told = (*self._voices(tables), *memory.each_row, *memory.each_thread)
        way.run(self.threads, *asked, *told, threads=self.threads)
        return memory.logits[: len(ids)]

    def _table(self, voice: Adapter) -> _Table:
        table = self._tables.pop(voice, None) or _Table.of(voice, self.blocks)
        self._tables[voice] = table  # as the last one to go
        while len(self._tables) > MOST_TABLES:
            del self._tables[next(iter(self._tables))]
        return table

    def _voices(self, tables: list[_Table]) -> tuple[Any, ...]:
        if [known() for known in self._told[0]] != tables:
            stacked = [torch.stack([getattr(table, name) for table in tables]) for name in ("As", "Bs", "ranks")]
            scalings = torch.tensor([table.scaling for table in tables], dtype=torch.float32)
            nothing = torch.zeros(len(tables), dtype=torch.int64)
            self._told = (
                [ref(table) for table in tables],
                (int(any(table.most_ranks for table in tables)), *stacked, scalings, nothing),
            )
        return self._told[1]


@dataclass(frozen=True)
class _Block:
    """What the kernel takes of one block."""

    module: Any

    @staticmethod
    def of(module: Any) -> _Block | None:
        """None where it is not of the kind that the kernel computes."""
        block = _Block(module)
        attention, mlp = module.self_attn, module.mlp
        joined = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
        norms = [block.input_norm, block.output_norm, *(block.head_norms or ())]
        is_known = (
            all(layers[0].siblings.layers == layers for layers in joined)
            and all(layer.siblings.layers == [layer] for layer in (attention.o_proj, mlp.down_proj))
            and all(layer.shape[1] >= COLUMNS for layer in block.layers)
            and all(layer.base.bias is None for layer in block.layers[3:])
            and all(weight.is_contiguous() for weight in block.weights)
            and all(type(norm) is RMSNorm for norm in norms)
            and len({norm.eps for norm in norms}) == 1
        )
        return block if is_known else None

    @property
    def layers(self) -> list[LoraLinear]:
        """By PROJECTIONS."""
        owners = self.module.self_attn, self.module.mlp
        return [next(getattr(owner, name) for owner in owners if hasattr(owner, name)) for name in PROJECTIONS]

    @property
    def weights(self) -> list[Tensor]:
        """Of queries, keys and values, of the output, of gate and up, and down."""
        q, _, _, o, gate, _, down = self.layers
        bases: list[Any] = [layer.base for layer in (q, o, gate, down)]
        return [layer.siblings.weight(base.weight.dtype) for layer, base in zip((q, o, gate, down), bases, strict=True)]

    @property
    def bias(self) -> Tensor:
        """(queries + keys + values,)"""
        siblings: Siblings = self.layers[0].siblings
        biases = [layer.base.bias for layer in siblings.layers]
        if biases[0] is None:
            return torch.zeros(sum(siblings.widths))
        return torch.cat(biases)  # type: ignore[arg-type]

    @property
    def input_norm(self) -> Any:
        return self.module.input_layernorm

    @property
    def output_norm(self) -> Any:
        return self.module.post_attention_layernorm

    @property
    def head_norms(self) -> tuple[Any, Any] | None:
        attention = self.module.self_attn
        return (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None

    @property
    def head_weights(self) -> Tensor:
        """(2, D), of queries and keys."""
        if self.head_norms is None:
            return torch.ones(2, self.module.self_attn.head_dim)
        return torch.stack([norm.weight for norm in self.head_norms])


@dataclass(frozen=True, eq=False)
class _Table:
    """Where the weights of one voice lie: each (L, P)."""

    As: Tensor
    Bs: Tensor
    ranks: Tensor  # 0 where the voice corrects nothing
    scaling: float
    padded: list[Tensor]  # copies of weights whose rank is no multiple of what the kernel reads at a time
    most_ranks: int

    @staticmethod
    def of(voice: Adapter | None, blocks: list[_Block]) -> _Table:
        As, Bs, ranks = torch.zeros(3, len(blocks), len(PROJECTIONS), dtype=torch.int64)
        padded = []
        for at, block in enumerate(blocks):
            for p, layer in enumerate(block.layers):
                if voice is not None and layer.name in voice.A:
                    A, B = voice.A[layer.name].contiguous(), voice.B[layer.name].contiguous()
                    if missing := -A.shape[0] % RANK_MULTIPLE:
                        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
                    padded += [A, B]  # held: where they are the voice's own, this costs nothing
                    As[at, p], Bs[at, p], ranks[at, p] = A.data_ptr(), B.data_ptr(), A.shape[0]
        scaling = 1.0 if voice is None else voice.config.scaling
        return _Table(As, Bs, ranks, scaling, padded, int(ranks.max()))


class _Memory:
    """What the kernel writes on the way, kept from step to step and grown by need."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._most = (0, 0, 0)  # rows, tokens and rank that there is room for
        self.each_row: list[Tensor] = []
        self.each_thread: list[Tensor] = []

    def of(self, rows: int, tokens: int, rank: int) -> _Memory:
        asked = rows, tokens, max(rank, RANK_MULTIPLE)
        if any(need > have for need, have in zip(asked, self._most, strict=True)):
            rows, tokens, rank = (max(pair) for pair in zip(asked, self._most, strict=True))
            self._most = rows, 2 * tokens, rank
            self._make(*self._most)
        return self

    @property
    def rank(self) -> int:
        return self._most[2]

    @property
    def longest(self) -> int:
        return self._most[1] + COLUMNS

    @property
    def logits(self) -> Tensor:
        return self.each_row[-1]

    def _make(self, rows: int, tokens: int, rank: int) -> None:
        of, H = self._decoder, self._decoder.embeddings.embedding_dim
        queries, keys = of.heads * of.head_size, of.groups * of.head_size
        inputs, vocabulary = torch.bfloat16 if of.has_bf16_products else torch.float32, len(of.head)
        self.each_row = [torch.empty(rows, width, dtype=inputs) for width in (H, queries, of.width)]
        widths = len(PROJECTIONS) * rank, queries + 2 * keys, H, 2 * of.width, vocabulary
        self.each_row += [torch.empty(rows, width) for width in widths]
        group = of.heads // of.groups
        self.each_thread = [
            torch.empty(of.threads, group * of.head_size, dtype=inputs),
            torch.empty(of.threads, group, self.longest),
            torch.empty(of.threads, of.head_size),
        ]


def _fp32(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).float()
