"""The gated MLP (https://arxiv.org/abs/2002.05202) keeping two tensors of its width for the backward pass, not three.

transformers writes act(gate(x)) * up(x), of which autograd keeps both factors and what the activation was given. The
activation is cheap to compute again, and the MLP is the widest part of a block. Outputs and gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Families whose MLP is down_proj(act_fn(gate_proj(x)) * up_proj(x)); the self-test at load would notice another.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo2", "Cohere", "Granite")


def slim_gated_mlps(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ in [f"{family}MLP" for family in FAMILIES]:
            module.forward = partial(_forward, module)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    gated: Tensor = _Gated.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn)  # type: ignore[no-untyped-call]
    return mlp.down_proj(gated)  # type: ignore[no-any-return]


class _Gated(torch.autograd.Function):
    """act(gate) * up"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.act(leaf)
        (grad_gate,) = torch.autograd.grad(activated, leaf, grads[0] * up)
        return grad_gate, grads[0] * activated.detach(), None
