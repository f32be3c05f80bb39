"""Root mean square normalisation (https://arxiv.org/abs/1910.07467) with a frozen weight, in few passes over memory.

transformers writes it as six operations whose fp32 results autograd keeps all; this keeps the input and one number a
token, and computes what transformers computes. On a CPU each direction is one compiled loop.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repertory.model.kernel import FP32, Kernel, argument, float_argument, get, is_for, put, row

# Families that normalise in fp32, cast back and multiply by the weight. Gemma multiplies by 1 + weight, before casting.
REPLACED = tuple(
    f"{family}RMSNorm"
    for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Phi3", "Granite")
)
BLOCK_ROWS = 16


def replace_rms_norms(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in REPLACED:
                setattr(parent, name, RMSNorm(child.weight, child.variance_epsilon))  # type: ignore[arg-type]


class RMSNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if is_for(x, weight):
            x, count = x.contiguous(), x.numel() // x.shape[-1]
            scale, y = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32), torch.empty_like(x)
            _forward.run(-(-count // BLOCK_ROWS), x, weight, scale, y, count, x.shape[-1], eps)
            ctx.save_for_backward(x, weight, scale)
            return y
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (torch.linalg.vector_norm(precise, dim=-1, keepdim=True).square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normal: Tensor = (precise * scale).to(x.dtype)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """With n = x * scale: grad_x = scale * (g - n * mean(g * n)), g the gradient of n."""
        x, weight, scale = ctx.saved_tensors
        grad_y = grads[0]
        if is_for(grad_y, weight):
            grad_y, grad_x, count = grad_y.contiguous(), torch.empty_like(x), scale.numel()
            _backward.run(-(-count // BLOCK_ROWS), x, weight, scale, grad_y, grad_x, count, x.shape[-1])
            return grad_x, None, None
        normal = x.to(scale.dtype) * scale
        grad = (grad_y * weight).to(scale.dtype)
        shared = (grad * normal).mean(-1, keepdim=True)
        return grad.addcmul_(normal, shared, value=-1).mul_(scale).to(x.dtype), None, None


@Kernel
def _forward(asked, at, like):
    count, width, eps = argument(asked, 4), argument(asked, 5), float_argument(asked, 6)
    weight = row(argument(asked, 1), 0, width, like)
    scales = row(argument(asked, 2), 0, count, FP32)
    for n in range(at * BLOCK_ROWS, min(count, (at + 1) * BLOCK_ROWS)):
        x, y = row(argument(asked, 0), n, width, like), row(argument(asked, 3), n, width, like)
        total = np.float32(0)
        for i in range(width):
            total += get(x, i) * get(x, i)
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        scales[n] = scale
        for i in range(width):
            put(y, i, get(x, i) * scale)
        for i in range(width):  # rounded in between, as transformers does
            put(y, i, get(y, i) * get(weight, i))


@Kernel
def _backward(asked, at, like):
    count, width = argument(asked, 5), argument(asked, 6)
    weight = row(argument(asked, 1), 0, width, like)
    scales = row(argument(asked, 2), 0, count, FP32)
    for n in range(at * BLOCK_ROWS, min(count, (at + 1) * BLOCK_ROWS)):
        x, grad_y = row(argument(asked, 0), n, width, like), row(argument(asked, 3), n, width, like)
        grad_x = row(argument(asked, 4), n, width, like)
        scale, total = scales[n], np.float32(0)
        for i in range(width):
            total += get(grad_y, i) * get(weight, i) * get(x, i)
        shared = total * scale * scale / np.float32(width)
        for i in range(width):
            put(grad_x, i, (get(grad_y, i) * get(weight, i) - get(x, i) * shared) * scale)
