"""The optimizer of a run: AdamW, with its moments in fp32 or in 8 bits, and on CUDA in pages that move to host memory.

8 bits: https://arxiv.org/abs/2110.02861; paged: https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from torch import Tensor

from repertory.contracts import OptimizerName
from repertory.model.hyperparameters import TrainConfig

SHARED = ("qmap1", "qmap2")  # the same table for all parameters, made anew with the optimizer


def new_optimizer(config: TrainConfig, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    kinds: dict[OptimizerName, Callable[..., torch.optim.Optimizer]] = {
        "adamw": partial(torch.optim.AdamW, fused=True),  # one pass over each tensor, not a dozen
        "adamw_8bit": AdamW8bit,
        "paged_adamw_8bit": PagedAdamW8bit,
    }
    return kinds[config.optimizer](
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer remembers of a parameter, by name; `restore_state` brings it back. Copies, on the CPU."""
    return {
        name: torch.as_tensor(value).detach().cpu().clone()
        for name, value in optimizer.state[parameter].items()
        if name not in SHARED
    }


def restore_state(optimizer: torch.optim.Optimizer, parameter: Tensor, remembered: Mapping[str, Tensor]) -> None:
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[parameter] = {name: tensor.to(parameter.device) for name, tensor in remembered.items()}
        return
    assert isinstance(optimizer, AdamW8bit | PagedAdamW8bit)
    if not remembered:  # before the first step
        return
    (group,) = optimizer.param_groups
    at = next(at for at, known in enumerate(group["params"]) if known is parameter)
    optimizer.init_state(group, parameter, 0, at)  # buffers of its own kind, paged ones too
    state = optimizer.state[parameter]
    for name, tensor in remembered.items():
        if isinstance(state[name], Tensor):
            state[name].copy_(tensor)
        else:
            state[name] = int(tensor)
