"""Self-attention of Llama-type models on a CPU: what lies between the products in front and the one behind, compiled.

transformers and `PackedRows` turn queries and keys to their positions, part heads from tokens and rows from the pack in
some thirty operations, each of which reads and writes all there is; and as many backward.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from repertory.model.attention import PackedRows, Scoring, current_layout
from repertory.model.kernel import Kernel, argument, is_for
from repertory.model.packedattention import PackedAttention, Segments, fits
from repertory.model.rotation import copy, turn

BLOCK_TOKENS = 8


def quicken_attention(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) in (LlamaAttention, MistralAttention, Qwen2Attention):
            module.forward = partial(_forward, module, module.forward)


def _forward(
    attention: Any,
    otherwise: Callable[..., tuple[Tensor, Any]],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Any]:
    """In place of the module's own, which is `otherwise`: for another device, or where the model is looked at."""
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    siblings, layout, size = getattr(projections[0], "siblings", None), current_layout(), attention.head_dim
    is_packed = isinstance(layout, PackedRows)
    is_fit = is_for(hidden_states) and (not is_packed or fits(hidden_states.itemsize, size))
    if layout is None or siblings is None or not is_fit:
        return otherwise(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **more,
        )
    if isinstance(attention, MistralAttention):
        window = getattr(attention.config, "sliding_window", None)
    else:
        window = getattr(attention, "sliding_window", None)
    heads, groups = projections[0].shape[1] // size, projections[1].shape[1] // size
    if siblings.layers == projections:
        qkv = siblings.outputs(hidden_states, projections[0].router.routing)
    else:  # quantized, or not joined yet
        qkv = torch.cat([projection(hidden_states) for projection in projections], dim=-1)
    seen: Tensor
    if isinstance(layout, PackedRows):
        segments = Segments.of(layout.prefix, layout.lengths)
        seen = PackedAttention.apply(qkv, *position_embeddings, segments, heads, groups, attention.scaling, window)
    else:
        parts = _apart(qkv, *position_embeddings, heads, groups)
        seen = layout.attend(attention.layer_idx, *parts, Scoring(scale=attention.scaling, window=window))
        seen = seen.transpose(1, 2).reshape(*hidden_states.shape[:2], heads * size)
    return attention.o_proj(seen), None


def _apart(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """(1, N, (H + 2 G) D), cosine and sine (1, N, D) -> queries (1, H, N, D), keys and values (1, G, N, D)."""
    assert not qkv.requires_grad  # nothing is kept for a way back
    tokens, size = qkv.shape[1], cos.shape[-1]
    query, key, value = (qkv.new_empty(1, count, tokens, size) for count in (heads, groups, groups))
    parts = query, key, value
    blocks = -(-tokens // BLOCK_TOKENS)
    _part.run(blocks, qkv.contiguous(), cos.contiguous(), sin.contiguous(), *parts, tokens, heads, groups, size)
    return parts


@Kernel
def _part(asked, at, like):
    N, H, G, D = argument(asked, 6), argument(asked, 7), argument(asked, 8), argument(asked, 9)
    size = D * like.itemsize
    for n in range(at * BLOCK_TOKENS, min((at + 1) * BLOCK_TOKENS, N)):
        qkv, cos, sin = argument(asked, 0) + n * (H + 2 * G) * size, argument(asked, 1), argument(asked, 2)
        for h in range(H):
            turn(qkv + h * size, cos + n * size, sin + n * size, D, argument(asked, 3) + (h * N + n) * size, like)
        for g in range(G):
            key, value = (g * N + n) * size + argument(asked, 4), (g * N + n) * size + argument(asked, 5)
            turn(qkv + (H + g) * size, cos + n * size, sin + n * size, D, key, like)
            copy(qkv + (H + G + g) * size, D, value, like)
