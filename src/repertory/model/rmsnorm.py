"""Root mean square normalisation (https://arxiv.org/abs/1910.07467) with a frozen weight, in few passes over memory.

transformers writes it as six operations whose fp32 results autograd keeps all; this keeps the input and one number a
token, and computes what transformers computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Families that normalise in fp32, cast back and multiply by the weight. Gemma multiplies by 1 + weight, before casting.
REPLACED = tuple(
    f"{family}RMSNorm"
    for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Phi3", "Granite")
)


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
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (torch.linalg.vector_norm(precise, dim=-1, keepdim=True).square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normal: Tensor = (precise * scale).to(x.dtype)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """With n = x * scale: grad_x = scale * (g - n * mean(g * n)), g the gradient of n."""
        x, weight, scale = ctx.saved_tensors
        normal = x.to(scale.dtype) * scale
        grad = (grads[0] * weight).to(scale.dtype)
        shared = (grad * normal).mean(-1, keepdim=True)
        return grad.addcmul_(normal, shared, value=-1).mul_(scale).to(x.dtype), None, None
