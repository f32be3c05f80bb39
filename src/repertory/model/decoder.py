"""The next token's logits of decoding rows, for Llama-type models on a CPU, several times as fast as through torch.

The arithmetic is in `decoding_kernel`; here its arguments are put together. Weights, adapters and the cache stay where
they are: what is handed over is their addresses.

Shapes: L layers, N rows, P projections of a block, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repertory.model.adapter import Adapter
from repertory.model.attention import Scoring
from repertory.model.decoding_kernel import COLUMNS, PROJECTIONS, RANK_MULTIPLE, step
from repertory.model.kernel import HAS_BF16_PRODUCTS, HAS_FMA
from repertory.model.kvcache import Holder, KVCache
from repertory.model.layers import LoraLinear, Siblings
from repertory.model.rmsnorm import RMSNorm

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # the self-test at load compares each with its general pass

MOST_TABLES = 64  # twice a batch; those of unusual ranks hold copies of the weights, which must not add up
_CACHE_LINE = 8  # int64


class Decoder:
    """Runs on the thread that drives the device, and helpers of its own."""

    @staticmethod
    def of(
        model: Any, layers: dict[str, LoraLinear], dtype: torch.dtype, scorings: Sequence[Scoring]
    ) -> Decoder | None:
        """None where `model`, whose layers are wrapped and joined, is of another kind or on another device.

        `scorings`: how each block's attention weighs, as seen in a forward pass.
        """
        weights = [layer.base for layer in layers.values()]
        if (
            not HAS_FMA
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
        self._helpers = ThreadPoolExecutor(max(1, self.threads - 1), thread_name_prefix="decoder")
        self._meeting = np.zeros((2, _CACHE_LINE), np.int64)
        self.head: Tensor = model.lm_head.weight
        self._weights = [block.weights for block in blocks]  # held, whatever becomes of the model
        attention = model.model.layers[0].self_attn
        self.heads = attention.q_proj.shape[1] // attention.head_dim
        self.groups = attention.k_proj.shape[1] // attention.head_dim
        self.head_size: int = attention.head_dim
        self.width: int = config.intermediate_size
        self.has_bf16_products = dtype == torch.bfloat16 and HAS_BF16_PRODUCTS
        like = np.empty(0, np.uint16 if dtype == torch.bfloat16 else np.float32)
        norms = [norm for block in blocks for norm in (block.input_norm, block.output_norm)]
        self._model = (
            like,
            (self.heads, self.groups, self.head_size, self.width, blocks[0].head_norms is not None),
            np.float32(config.rms_norm_eps),
            np.float32(scorings[0].scale),
            np.array([[weight.data_ptr() for weight in block] for block in self._weights], np.int64),
            self.head.data_ptr(),
            _fp32([norm.weight for norm in (*norms, model.model.norm)]),
            _fp32([block.bias for block in blocks]),
            _fp32([block.head_weights for block in blocks]),
            np.array([how.window or 0 for how in scorings], np.int64),
        )
        self._tables: WeakKeyDictionary[Adapter, _Table] = WeakKeyDictionary()
        self._none = _Table.of(None, blocks)
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
        numbers = [np.ascontiguousarray(each.float().numpy()) for each in (hidden, cos[0], sin[0])]
        rows = (*numbers, places.numpy(), cache.addresses(holders))
        tables = [self._none if voice is None else self._table(voice) for voice in voices]
        memory = self._memory.of(len(ids), int(places.max()) + 1, max(table.ranks.max() for table in tables))
        asked: Any = (self.threads, self._meeting, self._model, rows, self._voices(tables), memory)
        helping = [self._helpers.submit(step, thread, *asked) for thread in range(1, self.threads)]
        step(0, *asked)
        for helper in helping:
            helper.result()
        return torch.from_numpy(memory[7])

    def _table(self, voice: Adapter) -> _Table:
        table = self._tables.pop(voice, None) or _Table.of(voice, self.blocks)
        self._tables[voice] = table  # as the last one to go
        while len(self._tables) > MOST_TABLES:
            del self._tables[next(iter(self._tables))]
        return table

    def _voices(self, tables: list[_Table]) -> tuple[Any, ...]:
        stacked = [np.stack([getattr(table, name) for table in tables]) for name in ("As", "Bs", "ranks")]
        scalings = np.array([table.scaling for table in tables], np.float32)
        nothing = np.zeros(len(tables), np.int64)
        return (any(table is not self._none for table in tables), *stacked, scalings, nothing)


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


@dataclass(frozen=True)
class _Table:
    """Where the weights of one voice lie: each (L, P)."""

    As: np.ndarray[Any, Any]
    Bs: np.ndarray[Any, Any]
    ranks: np.ndarray[Any, Any]  # 0 where the voice corrects nothing
    scaling: float
    padded: list[Tensor]  # copies of weights whose rank is no multiple of what the kernel reads at a time

    @staticmethod
    def of(voice: Adapter | None, blocks: list[_Block]) -> _Table:
        As, Bs, ranks = np.zeros((3, len(blocks), len(PROJECTIONS)), np.int64)
        padded = []
        for at, block in enumerate(blocks):
            for p, layer in enumerate(block.layers):
                if voice is not None and layer.name in voice.A:
                    A, B = voice.A[layer.name].contiguous(), voice.B[layer.name].contiguous()
                    if missing := -A.shape[0] % RANK_MULTIPLE:
                        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
                    padded += [A, B]  # held: where they are the voice's own, this costs nothing
                    As[at, p], Bs[at, p], ranks[at, p] = A.data_ptr(), B.data_ptr(), A.shape[0]
        return _Table(As, Bs, ranks, 1.0 if voice is None else voice.config.scaling, padded)


class _Memory:
    """What the kernel writes on the way, kept from step to step and grown by need."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._most = (0, 0, 0)  # rows, tokens and rank that there is room for
        self._each_row: list[np.ndarray[Any, Any]] = []
        self._each_thread: list[np.ndarray[Any, Any]] = []

    def of(self, rows: int, tokens: int, rank: int) -> tuple[np.ndarray[Any, Any], ...]:
        asked = rows, tokens, max(rank, RANK_MULTIPLE)
        if any(need > have for need, have in zip(asked, self._most, strict=True)):
            self._most = tuple(max(pair) for pair in zip(asked, self._most, strict=True))  # type: ignore[assignment]
            self._make(self._most[0], 2 * self._most[1], self._most[2])
        return (*(memory[:rows] for memory in self._each_row), *self._each_thread)

    def _make(self, rows: int, tokens: int, rank: int) -> None:
        of, H = self._decoder, self._decoder.embeddings.embedding_dim
        queries, keys = of.heads * of.head_size, of.groups * of.head_size
        inputs, vocabulary = np.uint16 if of.has_bf16_products else np.float32, len(of.head)
        self._each_row = [np.empty((rows, width), inputs) for width in (H, queries, of.width)]
        self._each_row.append(np.empty((rows, len(PROJECTIONS), rank), np.float32))
        widths = queries + 2 * keys, H, 2 * of.width, vocabulary
        self._each_row += [np.empty((rows, width), np.float32) for width in widths]
        group = of.heads // of.groups
        self._each_thread = [
            np.empty((of.threads, group * of.head_size), inputs),
            np.empty((of.threads, group, tokens + COLUMNS), np.float32),
            np.empty((of.threads, of.head_size), np.float32),
        ]


def _fp32(tensors: Sequence[Tensor]) -> np.ndarray[Any, Any]:
    return torch.stack(list(tensors)).float().numpy()
