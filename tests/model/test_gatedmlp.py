from __future__ import annotations

import copy

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from repertory.model.gatedmlp import slim_gated_mlps


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_outputs_and_gradients_are_the_same_bits_and_less_is_kept(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    made = LlamaMLP(LlamaConfig(**sizes)) if family == "llama" else GemmaMLP(GemmaConfig(**sizes))
    plain = torch.nn.ModuleList([made.to(dtype)])
    slim = copy.deepcopy(plain)
    slim_gated_mlps(slim)
    x = torch.randn(7, 24, dtype=dtype)
    results, kept = [], []
    for mlps in (plain, slim):
        leaf = x.clone().requires_grad_()
        sizes_kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes_kept: (s.append(t.shape[-1]), t)[1], lambda t: t
        ):
            y = mlps[0](leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *(parameter.grad for parameter in mlps.parameters())])
        kept.append(sizes_kept.count(40))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert kept[1] < kept[0]
