"""What a job would be and take, without doing it: tokens, steps, time, memory, and whether it fits."""

from __future__ import annotations

from collections.abc import Generator

from repertory.contracts import Estimate, EstimateRequest
from repertory.data.prepare import split, with_system
from repertory.data.render import Renderer, Row
from repertory.errors import DataUnusable
from repertory.model import hyperparameters
from repertory.model.base import Outline
from repertory.model.hyperparameters import TrainConfig
from repertory.model.memory import BatchShape, Demand, cures, gib
from repertory.model.microbatch import common_prefix
from repertory.model.plan import Plan, Work
from repertory.model.probe import cut_to_fit, demand

ROWS_PER_PORTION = 32  # rendered at a time: about 10 ms, which a live request hardly notices


def estimate(
    base: Outline, renderer: Renderer | None, request: EstimateRequest, available_bytes: int, rate: float | None
) -> Generator[None, None, Estimate]:
    """Render the conversations in small portions and resolve the job for them.

    `rate` is that of `plan.Work`, None where training was not measured yet. Without a renderer (the tokenizer is not
    there) memory and steps are told for rows of max_seq_length. Raises DataUnusable and InvalidInput as a run would.
    """
    conversations = request.conversations
    asked = request.hyperparameters
    parts = split(conversations, request.validation_split, asked.seed or 0)
    longest = hyperparameters.max_seq_length(asked, base)
    if renderer is None:
        config = hyperparameters.resolve(asked, base, len(parts.training), 0)
        needed = demand(base, config, BatchShape(0, (longest,)))
        advice = ["The tokenizer is not in the model cache: memory is that of a row of max_seq_length tokens."]
        return _answer(len(conversations), config, needed, available_bytes, advice)
    rows: list[Row] = []
    held_out: list[Row] = []
    truncated = skipped = 0
    for indices, kept in ((parts.training, rows), (parts.held_out, held_out)):
        for number, at in enumerate(indices):
            row = renderer.row(with_system(conversations[at], request.system_prompt), longest)
            if row is None:
                skipped += 1
            else:
                kept.append(row)
                truncated += row.dropped_messages > 0
            if number % ROWS_PER_PORTION == 0:
                yield
    if not rows:
        raise DataUnusable(
            f"none of the {len(parts.training)} conversations to train on fits into {longest} tokens",
            cure="Raise max_seq_length, or send shorter conversations.",
        )
    plan = Plan(rows, hyperparameters.resolve(asked, base, len(rows), common_prefix(rows)))
    yield
    needed = cut_to_fit(base, plan, available_bytes)
    work = Work()
    work.expect(plan, 0, sum(len(row.input_ids) for row in held_out or rows))
    advice = [cut.warning for cut in plan.cuts[-1:]]
    if truncated:
        advice.append(f"{truncated} conversations lose their oldest messages; raise max_seq_length to keep them.")
    if skipped:
        advice.append(f"{skipped} conversations are left out: too long for max_seq_length.")
    answer = _answer(len(conversations), plan.config, needed, available_bytes, advice)
    return answer.model_copy(
        update={
            "tokens": sum(len(row.input_ids) for row in rows),
            "trained_tokens": sum(row.trained_tokens for row in rows),
            "truncated_rows": truncated,
            "skipped_rows": skipped,
            "seconds": None if rate is None else round(work.total / rate, 1),
        }
    )


def _answer(
    conversations: int, config: TrainConfig, needed: Demand, available_bytes: int, advice: list[str]
) -> Estimate:
    taken = needed.estimate().total
    fits = taken <= available_bytes
    if not fits:
        settings = cures(needed, available_bytes)
        advice = [f"It does not fit: {gib(taken)} are needed and {gib(available_bytes)} are there.", *advice]
        advice += [f"With {setting} it would fit." for setting in settings]
        if not settings:
            advice.append("Choose a smaller base model.")
    return Estimate(
        conversations=conversations,
        steps=config.total_steps,
        epochs=config.num_train_epochs,
        peak_memory_bytes=taken,
        available_memory_bytes=available_bytes,
        fits=fits,
        advice=advice,
        hyperparameters=config.model_dump(exclude={"total_steps", "betas", "max_grad_norm", "weight_decay"}),
    )
