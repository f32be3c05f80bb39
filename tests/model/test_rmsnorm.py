from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from repertory.model.rmsnorm import RMSNorm


def test_it_computes_what_transformers_computes_and_so_do_its_gradients() -> None:
    """In fp32 to rounding; in bf16 to one step of bf16, which is 2**-8."""
    theirs = LlamaRMSNorm(64, eps=1e-5)
    torch.manual_seed(0)
    theirs.weight.data.normal_()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        theirs = theirs.to(dtype)
        ours = RMSNorm(theirs.weight, 1e-5)
        x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
        weights = torch.randn(3, 5, 64).to(dtype)
        assert torch.allclose(ours(x), theirs(x), rtol=tolerance, atol=tolerance)
        (our_gradient,) = torch.autograd.grad((ours(x) * weights).sum(), x)
        (their_gradient,) = torch.autograd.grad((theirs(x) * weights).sum(), x)
        assert torch.allclose(our_gradient, their_gradient, rtol=tolerance, atol=4 * tolerance)


def test_its_gradient_is_right_in_float64() -> None:
    norm = RMSNorm(torch.nn.Parameter(torch.randn(6, dtype=torch.float64), requires_grad=False), 1e-6)
    assert torch.autograd.gradcheck(norm, torch.randn(2, 6, dtype=torch.float64, requires_grad=True))
