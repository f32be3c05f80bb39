"""From what was asked for to what is done: every training value of a job, resolved from its data, model and device."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from repertory.contracts import Hyperparameters, OptimizerName
from repertory.errors import InvalidInput
from repertory.model.base import Outline
from repertory.model.certificate import ENOUGH_ROWS
from repertory.model.layers import choose_layers

MIN_STEPS = 100  # LoRA wants this many: https://tinker-docs.thinkingmachines.ai/lora-primer
MAX_STEPS = 1500
TRAINED_OVER_SCORED = 3  # forward and backward of a row take about three times its forward alone


class TrainConfig(BaseModel):
    """The values of one run, fixed when it starts, stored with its checkpoints and its adapter."""

    model_config = ConfigDict(frozen=True)

    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: list[str]
    use_rslora: bool = False
    effective_batch_rows: int  # rows of one optimizer step: an invariant, however many go through one forward
    suffix_tokens: int  # tokens after the shared prefix of one forward
    gradient_checkpointing: bool = False
    optimizer: OptimizerName = "adamw"
    learning_rate: float
    num_train_epochs: int
    max_seq_length: int  # tokens of a row
    warmup_steps: int
    prompt_loss_weight: float = 0.0
    total_steps: int
    save_steps: int
    eval_steps: int | None  # None: at the end only
    early_stopping_patience: int = 0  # evaluations without a new best; 0: never
    canaries: int = 0
    logging_steps: int
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int

    def learning_rate_at(self, step: int) -> float:
        """Rate of optimizer step 1..total_steps: linear warm-up, then linear decay to a tenth. Never 0."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        left = (self.total_steps - step) / max(self.total_steps - self.warmup_steps, 1)
        return self.learning_rate * (0.1 + 0.9 * left)

    def is_evaluated_after(self, step: int) -> bool:
        return step == self.total_steps or (self.eval_steps is not None and step % self.eval_steps == 0)


def max_seq_length(asked: Hyperparameters, base: Outline) -> int:
    """Tokens of the longest row. Raises InvalidInput where the base model has fewer positions than asked for."""
    if asked.max_seq_length is None:
        return min(2048, base.max_positions)
    if asked.max_seq_length > base.max_positions:
        raise InvalidInput(
            f"max_seq_length {asked.max_seq_length} exceeds the {base.max_positions} positions of this base model",
            cure=f"Set max_seq_length to {base.max_positions} or less, or leave it out.",
            param="hyperparameters.max_seq_length",
        )
    return asked.max_seq_length


def resolve(asked: Hyperparameters, base: Outline, rows: int, prefix: int, held_out: int = 0) -> TrainConfig:
    """Fill in what was not asked for, for `rows` training rows that share `prefix` tokens, and `held_out` others.

    Raises InvalidInput where a value does not fit the base model.
    """
    asked.check_device(base.device.type)
    hidden_size = int(base.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    if asked.lora_r is not None and asked.lora_r > hidden_size:
        raise InvalidInput(
            f"lora_r {asked.lora_r} exceeds the hidden size {hidden_size} of this base model",
            cure="Use a rank between 8 and 64.",
            param="hyperparameters.lora_r",
        )
    chosen = choose_layers(
        base.layers, "all-linear" if asked.lora_target_modules is None else asked.lora_target_modules
    )
    batch = _effective_batch(asked, rows)
    steps_per_epoch = math.ceil(rows / batch)
    epochs = asked.num_train_epochs or _epochs(steps_per_epoch)
    total = steps_per_epoch * epochs
    warmup = asked.warmup_steps if asked.warmup_steps is not None else min(max(3, round(0.05 * total)), total // 2)
    return TrainConfig(
        lora_r=asked.lora_r or min(32 if rows > 1000 else 16, hidden_size),
        lora_alpha=asked.lora_alpha or (8.0 if asked.use_rslora else 32.0),  # at rank 16 the two are the same
        lora_dropout=asked.lora_dropout if asked.lora_dropout is not None else (0.05 if rows < 300 else 0.0),
        lora_target_modules=sorted({name.rsplit(".", 1)[-1] for name in chosen}),
        use_rslora=asked.use_rslora or False,
        effective_batch_rows=batch,
        suffix_tokens=_suffix_tokens(asked, base, prefix),
        optimizer=asked.optimizer or "adamw",
        gradient_checkpointing=_or(asked.gradient_checkpointing, base.device.type == "cuda"),
        learning_rate=asked.learning_rate or _learning_rate(base.parameter_count),
        num_train_epochs=epochs,
        max_seq_length=max_seq_length(asked, base),
        warmup_steps=warmup,
        prompt_loss_weight=asked.prompt_loss_weight or 0.0,
        total_steps=total,
        save_steps=asked.save_steps or max(10, min(100, total // 10)),
        eval_steps=asked.eval_steps or _eval_steps(steps_per_epoch, batch, held_out),
        early_stopping_patience=3 if asked.early_stopping_patience is None else asked.early_stopping_patience,
        canaries=asked.canaries or 0,
        logging_steps=asked.logging_steps or 1,
        seed=asked.seed or 0,
    )


def _or(asked: bool | None, otherwise: bool) -> bool:
    return otherwise if asked is None else asked


def _effective_batch(asked: Hyperparameters, rows: int) -> int:
    """BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS where one of them is set, else 8 for small data and 16."""
    if asked.batch_size is None and asked.gradient_accumulation_steps is None:
        return 8 if rows < 500 else 16
    return (asked.batch_size or 4) * (asked.gradient_accumulation_steps or 4)


def _epochs(steps_per_epoch: int) -> int:
    """3, more where that makes fewer than 100 steps (at most 10), fewer where it makes more than 1,500."""
    epochs = max(3, min(10, math.ceil(MIN_STEPS / steps_per_epoch)))
    return max(1, min(epochs, MAX_STEPS // steps_per_epoch))


def _eval_steps(steps_per_epoch: int, batch: int, held_out: int) -> int | None:
    """Twice an epoch, or less often where it would take more than a tenth of the training; None, which is at the end
    only, where too few conversations are held out to tell a better adapter from a lucky one.
    """
    if held_out < ENOUGH_ROWS:
        return None
    return max(math.ceil(steps_per_epoch / 2), math.ceil(held_out / (0.1 * TRAINED_OVER_SCORED * batch)))


def _learning_rate(parameters: int) -> float:
    """Smaller models stand and want higher rates; the rank hardly matters while alpha is fixed.

    https://thinkingmachines.ai/blog/lora/ (about ten times the rate of full fine-tuning)
    """
    billions = parameters / 1e9
    if billions <= 3:
        return 5e-4
    return 2e-4 if billions < 30 else 1e-4


def _suffix_tokens(asked: Hyperparameters, base: Outline, prefix: int) -> int:
    """Tokens after the shared prefix of one forward: enough to keep the device busy and to pay for the prefix, few
    enough that a request which waits for the forward to end hardly notices; under the cap that BATCH_SIZE sets.
    """
    billions = base.parameter_count / 1e9
    if base.device.type == "cuda":
        busy = min(max(int(4096 / billions), 512), 16384)
    else:
        busy = min(max(int(86 / billions), 64), 640)  # about a second on 2 cores, for the bundled model
    rows = asked.batch_size or 4
    busy = busy * min(rows, 4) // 4  # who lowers BATCH_SIZE below its default is short of memory
    return min(max(busy, 2 * prefix), rows * max_seq_length(asked, base))
