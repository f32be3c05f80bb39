"""What a job would be and take, without doing it: tokens, steps, time, memory, and whether it fits."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from repertory.contracts import Estimate, EstimateRequest
from repertory.data.prepare import read_conversations, split
from repertory.data.render import Renderer
from repertory.model import hyperparameters
from repertory.model.base import Outline
from repertory.model.hyperparameters import TrainConfig
from repertory.model.memory import BatchShape, Demand, cures, gib
from repertory.model.microbatch import common_prefix, with_prompt_loss
from repertory.model.plan import Plan, Work
from repertory.model.probe import cut_to_fit, demand
from repertory.model.training_data import training_data


def estimate(
    base: Outline, renderer: Renderer | None, request: EstimateRequest, available_bytes: int, rate: float | None
) -> Generator[None, None, Estimate]:
    """Render the conversations in small portions and resolve the job for them.

    `rate` is that of `plan.Work`, None where training was not measured yet. Without a renderer (the tokenizer is not
    there) memory and steps are told for rows of max_seq_length. Raises DataUnusable and InvalidInput as a run would.
    """
    conversations = request.conversations
    if conversations is None:
        assert request.conversations_path is not None
        conversations = read_conversations(Path(request.conversations_path))
    asked = request.hyperparameters
    longest = hyperparameters.max_seq_length(asked, base)
    if renderer is None:
        parts = split([one.timestamp for one in conversations], request.validation_split, asked.seed or 0)
        config = hyperparameters.resolve(asked, base, len(parts.training), 0, len(parts.held_out))
        needed = demand(base, config, BatchShape(0, (longest,)))
        advice = ["The tokenizer is not in the model cache: memory is that of a row of max_seq_length tokens."]
        return _answer(len(conversations), config, needed, available_bytes, advice)
    data = yield from training_data(
        renderer, conversations, request.validation_split, asked, longest, request.system_prompt
    )
    rows = data.training
    config = hyperparameters.resolve(asked, base, len(rows), common_prefix(rows), len(data.held_out))
    plan = Plan(with_prompt_loss(rows, config.prompt_loss_weight), config)
    yield
    needed = cut_to_fit(base, plan, available_bytes)
    work = Work()
    work.expect(plan, 0, sum(len(row.input_ids) for row in data.held_out or rows))
    advice = [cut.warning for cut in plan.cuts[-1:]]
    if data.shortened:
        advice.append(
            f"{len(data.shortened)} conversations lose their oldest messages; raise max_seq_length to keep them."
        )
    if data.skipped:
        advice.append(f"{len(data.skipped)} conversations are left out: too long for max_seq_length.")
    answer = _answer(len(conversations), plan.config, needed, available_bytes, advice)
    return answer.model_copy(
        update={
            "tokens": sum(len(row.input_ids) for row in rows),
            "trained_tokens": sum(row.trained_tokens for row in rows),
            "truncated_rows": len(data.shortened),
            "skipped_rows": len(data.skipped),
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
