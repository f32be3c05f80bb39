"""Whether a run fits the device, found out before its first step; and what is done where it does not.

Two things speak: the estimate from shapes (`memory`), which costs nothing and kills nobody, and a trial of the plan's
largest micro-batch on an adapter that is thrown away. Where either says no, the plan is cut.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import replace

import torch

from repertory.errors import InsufficientMemory, RepertoryError
from repertory.model.adapter import Adapter
from repertory.model.base import Base, Outline, give_back_memory
from repertory.model.hyperparameters import TrainConfig
from repertory.model.layers import choose_layers
from repertory.model.lora import Training
from repertory.model.memory import BatchShape, Demand, cures, gib
from repertory.model.microbatch import MicroBatch
from repertory.model.optimizer import new_optimizer
from repertory.model.plan import Plan

# How allocators say it: torch's for CUDA and for CPU, and cuBLAS for its workspace.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def demand(base: Outline, config: TrainConfig, batch: BatchShape) -> Demand:
    """What a run with this largest micro-batch takes."""
    return Demand(
        architecture=base.architecture,
        key=base.key,
        device=base.device.type,
        rank=config.lora_r,
        adapted=tuple(choose_layers(base.layers, config.lora_target_modules)),
        dropout=config.lora_dropout,
        batch=batch,
        gradient_checkpointing=config.gradient_checkpointing,
        optimizer=config.optimizer,
    )


def largest_microbatch(base: Outline, plan: Plan) -> list[int]:
    """The one that takes the most memory of all in the plan, as far as the estimate can tell."""

    any_batch = demand(base, plan.config, BatchShape(0, (1,)))
    return plan.largest(1, plan.config.total_steps, lambda batch: replace(any_batch, batch=batch).activations)


def cut_to_fit(base: Outline, plan: Plan, available_bytes: int) -> Demand:
    """Cut the plan from its first step on until the estimate fits, or every row goes alone. What it takes then."""
    while True:
        microbatch = largest_microbatch(base, plan)
        needed = demand(base, plan.config, plan.shape_of(microbatch))
        if needed.estimate().total <= available_bytes or not plan.cut(1, microbatch):
            return needed


def probe(base: Base, plan: Plan, scratch: Adapter) -> Generator[None, None, float]:
    """Try the largest micro-batch of the plan on `scratch`, which is used up, and cut the plan until it fits.

    Returns the rate of `plan.Work`. Leaves no trace in any random generator.
    Raises InsufficientMemory where a row alone does not fit.
    """
    available = base.available_bytes
    if cut_to_fit(base, plan, available).estimate().total > available:
        raise does_not_fit(base, plan)
    while True:
        microbatch = largest_microbatch(base, plan)
        yield
        try:
            return _tried(base, plan, microbatch, scratch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        release(scratch)
        if not plan.cut(1, microbatch):
            raise does_not_fit(base, plan)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, RepertoryError):
        return False
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def release(adapter: Adapter) -> None:
    """Give back what a pass that broke off has left: gradients, and activations that only its traceback held."""
    for parameter in adapter.parameters:
        parameter.grad = None
    give_back_memory(next(iter(adapter.A.values())).device)


def does_not_fit(base: Base, plan: Plan) -> InsufficientMemory:
    """One row alone is too much: the numbers, and the settings that would do."""
    needed = demand(base, plan.config, plan.shape_of(largest_microbatch(base, plan)))
    estimate, available = needed.estimate(), base.available_bytes
    settings = cures(needed, available)
    return InsufficientMemory(
        f"training on a row of {needed.batch.tokens} tokens takes about {gib(estimate.total)}"
        f" ({gib(estimate.base)} base model, {gib(estimate.activations)} activations,"
        f" {gib(estimate.run - estimate.activations)} adapter and optimizer), and {gib(available)} are there",
        cure=f"Set {', or '.join(settings)}, or choose a smaller base model."
        if settings
        else "Free memory on the device, lower max_seq_length, or choose a smaller base model.",
    )


def _tried(base: Base, plan: Plan, microbatch: list[int], scratch: Adapter) -> float:
    """Forward and backward with the optimizer's state in memory. Returns the rate of `plan.Work`."""
    optimizer = new_optimizer(plan.config, scratch.parameters)
    for parameter in scratch.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # it allocates its state at the first step
    routing = Training(scratch, plan.config.lora_dropout)
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        begin = time.monotonic()
        batch = MicroBatch.of([plan.rows[at] for at in microbatch], base.device)
        with base.passing(batch.layout, routing, recompute=plan.config.gradient_checkpointing):
            loss = batch.nll(base, routing).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # waits for the device
        return 3 * batch.layout.token_count / (time.monotonic() - begin)
