"""`python -m benchmarks.cards`: on which graphics cards a QLoRA job on Llama 2 7B fits, by estimate.

The table of the README. Nothing is downloaded and no card is needed. BATCH_SIZE=4 says how many rows make a step, which
memory does not feel: the rows of such a model go through a card one at a time.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import LlamaConfig

from repertory.contracts import BaseKey, Device, Hyperparameters
from repertory.model import base as base_module
from repertory.model import hyperparameters
from repertory.model.memory import GIB, BatchShape, Demand, gib
from repertory.model.probe import demand

LLAMA_2_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32000,
    max_position_embeddings=4096,
)
CARDS_GB = (8, 12, 16, 24)
CONTEXT_BYTES = GIB // 2  # what the CUDA context takes of a card before anything is loaded
ROWS = (2048, 1024, 512, 256)  # tokens
QLORA = Hyperparameters(lora_r=16, batch_size=4, max_seq_length=2048, lora_dropout=0.05)


def qlora_demand(asked: Hyperparameters = QLORA) -> Demand:
    """Of one job with rows as long as they may be, everything that `asked` leaves open resolved as on a card."""
    card = Device(kind="cuda", name="a card", memory_bytes=max(CARDS_GB) * GIB, has_bf16=True)
    key = BaseKey.resolve("meta-llama/Llama-2-7b-chat-hf", asked, card)
    with TemporaryDirectory() as folder:
        LLAMA_2_7B.save_pretrained(folder)
        outline = base_module.outline(Path(folder), key, card)
    config = hyperparameters.resolve(asked, outline, rows=200, prefix=0)
    return demand(outline, config, BatchShape(0, (config.max_seq_length,)))


def table() -> str:
    """In Markdown."""
    as_set = qlora_demand()
    jobs = [
        as_set,
        replace(as_set, gradient_checkpointing=False, dropout=0.0),
        replace(as_set, gradient_checkpointing=False),
    ]
    lines = [
        "| card | as set, with gradient checkpointing | without it, `LORA_DROPOUT=0` | without it |",
        "|---|---|---|---|",
    ]
    for card in CARDS_GB:
        cells = [longest_that_fits(job, card * GIB - CONTEXT_BYTES) for job in jobs]
        lines.append(f"| {card} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def longest_that_fits(job: Demand, available_bytes: int) -> str:
    for tokens in ROWS:
        taken = replace(job, batch=BatchShape(0, (tokens,))).estimate().total
        if taken <= available_bytes:
            return f"{tokens} ({gib(taken)})"
    return "no"


if __name__ == "__main__":
    print(table())
