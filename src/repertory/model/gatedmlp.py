"""The gated MLP (https://arxiv.org/abs/2002.05202) keeping two tensors of its width for the backward pass, not three.

transformers writes act(gate(x)) * up(x), of which autograd keeps both factors and what the activation was given. The
activation is cheap to compute again, and the MLP is the widest part of a block. Outputs and gradients are the same.

On a CPU, where gate and up are computed side by side, what follows is one compiled loop in each direction.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from repertory.model.kernel import Kernel, argument, exp, get, is_for, put, row

# Families whose MLP is down_proj(act_fn(gate_proj(x)) * up_proj(x)); the self-test at load would notice another.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo2", "Cohere", "Granite")
BLOCK_ROWS = 8


def slim_gated_mlps(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ in [f"{family}MLP" for family in FAMILIES]:
            module.forward = partial(_forward, module)


def _forward(mlp: Any, x: Tensor) -> Tensor:
    siblings = getattr(mlp.gate_proj, "siblings", None)
    is_known = isinstance(mlp.act_fn, nn.SiLU | SiLUActivation) and is_for(x)
    if is_known and siblings is not None and siblings.layers == [mlp.gate_proj, mlp.up_proj]:
        gated: Tensor = _GatedBySilu.apply(siblings.outputs(x, mlp.gate_proj.router.routing))
    else:
        gated = _Gated.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn)
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


class _GatedBySilu(torch.autograd.Function):
    """silu(gate) * up, of (..., gate | up), and its gradient as wide."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        gated = gate_up.new_empty(*gate_up.shape[:-1], width)
        count = gated.numel() // width
        _gate.run(-(-count // BLOCK_ROWS), gate_up, gated, count, width)
        return gated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad, grad_gate_up = grads[0].contiguous(), torch.empty_like(gate_up)
        count = grad.numel() // grad.shape[-1]
        _gate_backward.run(-(-count // BLOCK_ROWS), gate_up, grad, grad_gate_up, count, grad.shape[-1])
        return grad_gate_up


@Kernel
def _gate(asked, at, like):
    count, width = argument(asked, 2), argument(asked, 3)
    for n in range(at * BLOCK_ROWS, min(count, (at + 1) * BLOCK_ROWS)):
        gate_up, gated = row(argument(asked, 0), n, 2 * width, like), row(argument(asked, 1), n, width, like)
        for i in range(width):
            gate = get(gate_up, i)
            put(gated, i, gate / (np.float32(1) + exp(-gate)) * get(gate_up, width + i))


@Kernel
def _gate_backward(asked, at, like):
    count, width = argument(asked, 3), argument(asked, 4)
    for n in range(at * BLOCK_ROWS, min(count, (at + 1) * BLOCK_ROWS)):
        gate_up, grad_gated = row(argument(asked, 0), n, 2 * width, like), row(argument(asked, 1), n, width, like)
        grad = row(argument(asked, 2), n, 2 * width, like)
        for i in range(width):
            gate, up, g = get(gate_up, i), get(gate_up, width + i), get(grad_gated, i)
            sigmoid = np.float32(1) / (np.float32(1) + exp(-gate))
            put(grad, i, g * up * sigmoid * (np.float32(1) + gate * (np.float32(1) - sigmoid)))
            put(grad, width + i, g * gate * sigmoid)
