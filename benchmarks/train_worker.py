"""One system training on one workload in a process of its own, so that its memory is its own. Prints one JSON line."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import Workload, workload
from repertory.contracts import BUNDLED_MODEL, BaseKey, Hyperparameters, RunSpec
from repertory.data.prepare import with_system
from repertory.data.render import Row
from repertory.model import base as base_module
from repertory.model.adapter import Adapter
from repertory.model.base import Base, padded_length
from repertory.model.engine import Engine
from repertory.model.evaluation import score
from repertory.model.training import TrainingRun
from repertory.model.weights import locate
from repertory.settings import settings

RANK, ALPHA, RATE = 16, 32, 5e-4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=["repertory", "trl"])
    parser.add_argument("workload", choices=["A", "B", "C"])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not; 0: a whole job")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--loss", default="nll")
    args = parser.parse_args()
    work = workload(args.workload, args.rows)
    measured = repertory(work, args.steps) if args.system == "repertory" else trl(work, args)
    print(json.dumps({"system": args.system, "workload": args.workload} | measured))


def load(dtype: str) -> Base:
    device = base_module.detect_device()
    key = BaseKey(base_model=BUNDLED_MODEL, quantization="none", dtype=dtype)  # type: ignore[arg-type]
    return base_module.load(BUNDLED_MODEL, settings(), device, key, lambda phase: None)


def rendered(base: Base, work: Workload) -> list[Row]:
    rows = [base.renderer.row(with_system(chat, work.system_prompt)) for chat in work.conversations]
    return [row for row in rows if row is not None]


def repertory(work: Workload, steps: int) -> dict[str, Any]:
    base = load("bf16")
    idle = peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "conversations.jsonl"
        data.write_text("".join(chat.model_dump_json() + "\n" for chat in work.conversations))
        asked = Hyperparameters(
            lora_r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0,
            learning_rate=RATE,
            num_train_epochs=1,
            batch_size=work.batch_rows,
            gradient_accumulation_steps=1,
        )
        spec = RunSpec(
            org_id="bench",
            training_id="train_bench",
            base_model=BUNDLED_MODEL,
            conversations_path=str(data),
            output_dir=f"{folder}/out",
            checkpoint_dir=f"{folder}/checkpoints",
            hyperparameters=asked,
            validation_split=1 / 6 if steps == 0 else 0,
            system_prompt=work.system_prompt,
        )
        begin = time.perf_counter()
        engine = Engine(base)
        run = TrainingRun(spec, base, engine)
        ends: list[float] = []
        while steps == 0 or len(ends) < steps + 1:
            while engine.has_work:
                engine.step()
            try:
                event = run.step()
            except StopIteration:
                break
            if event is not None and event.kind == "step":
                ends.append(time.perf_counter())
        whole = time.perf_counter() - begin
        rows = rendered(base, work)
        if steps == 0:
            report = json.loads((Path(spec.output_dir) / "report.json").read_text())
            return {"seconds": whole, "val_nll": report["val_nll"], "peak_bytes": peak_bytes() - idle}
        tokens = step_tokens(rows, work, steps)
        return {
            "tokens_per_second": tokens / (ends[-1] - ends[0]),
            "peak_bytes": peak_bytes() - idle,
            "flops_per_second": executed_flops(base, rows, work, steps) / (ends[-1] - ends[0]),
        }


def executed_flops(base: Base, rows: list[Row], work: Workload, steps: int) -> float:
    """Of the matrix products of the timed steps, from what really goes through the model: 2 a weight and token forward,
    2 backward for the inputs but those of the first layers (the base is frozen), 6 for adapters, and the output
    embeddings where there is a label; of attention 12 a query, a key that it sees and a number of a head, not what the
    backward pass computes again.
    """
    from repertory.model.hyperparameters import resolve
    from repertory.model.microbatch import MicroBatch, common_prefix
    from repertory.model.plan import Plan

    asked = Hyperparameters(batch_size=work.batch_rows, gradient_accumulation_steps=1, num_train_epochs=1, lora_r=RANK)
    plan = Plan(rows, resolve(asked, base, len(rows), common_prefix(rows)))
    linear = sum(layer.shape[0] * layer.shape[1] for layer in base.layers.values())
    lora = sum(RANK * (layer.shape[0] + layer.shape[1]) for layer in base.layers.values())
    head = base.model.get_output_embeddings().weight.numel()  # type: ignore[operator, union-attr]
    first = sum(
        layer.shape[0] * layer.shape[1]
        for name, layer in base.layers.items()
        if ".0.self_attn." in name and not name.endswith("o_proj")
    )
    query_size = next(layer.shape[1] for name, layer in base.layers.items() if name.endswith("q_proj"))
    flops = 0.0
    for step in range(2, steps + 2):
        for indices in plan.microbatches(step):
            batch = MicroBatch.of([rows[at] for at in indices], base.device)
            tokens = padded_length(batch.layout.token_count)
            flops += tokens * (4 * linear - 2 * first + 6 * lora) + 4 * head * padded_length(len(batch.targets))
            flops += 12 * base.layer_count * query_size * int((batch.layout.positions + 1).sum())
    return flops


def trl(work: Workload, args: argparse.Namespace) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ours = load(args.dtype)  # for the rows, and to score the result with the same code
    rows = rendered(ours, work)
    held_out = rows[-len(rows) // 6 :] if args.steps == 0 else []
    trained = rows[: len(rows) - len(held_out)]
    folder = locate(BaseKey.resolve(BUNDLED_MODEL, Hyperparameters(), base_module.detect_device()), settings()).folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=base_module.DTYPES[args.dtype])
    idle = peak_bytes()
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    micro_batch = min(args.micro_batch, work.batch_rows)
    targets = sorted({name.rsplit(".", 1)[-1] for name in ours.layers})
    mean_length = sum(len(row.input_ids) for row in trained) / len(trained)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=output,
                per_device_train_batch_size=1 if args.packing else micro_batch,
                gradient_accumulation_steps=work.batch_rows // micro_batch,
                max_steps=args.steps + 1 if args.steps else -1,
                num_train_epochs=1,
                learning_rate=RATE,
                lr_scheduler_type="linear",
                max_length=int(mean_length * micro_batch) if args.packing else 2048,
                packing=args.packing,
                loss_type=args.loss,
                bf16=args.dtype == "bf16",
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=Dataset.from_list([{"input_ids": r.input_ids, "labels": r.labels} for r in trained]),
            processing_class=ours.renderer.tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0, target_modules=targets),
            callbacks=[Clock()],
        )
        begin = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - begin
        peak = peak_bytes() - idle
        if args.steps == 0:
            trainer.model.save_pretrained(f"{output}/adapter")
            adapter = Adapter.load(Path(output) / "adapter", ours.layers)
            return {"seconds": whole, "val_nll": nll(ours, held_out, adapter), "peak_bytes": peak}
    tokens = step_tokens(trained, work, args.steps)
    if args.packing:  # a step holds blocks, each of about as many rows as a micro-batch
        block = sum(len(row.input_ids) for row in trained) / len(trainer.train_dataset)
        tokens = block * (work.batch_rows / micro_batch) * args.steps
    return {"tokens_per_second": tokens / (ends[-1] - ends[0]), "peak_bytes": peak}


def nll(base: Base, rows: list[Row], adapter: Adapter) -> float:
    portions = score(base, rows, adapter)
    while True:
        try:
            next(portions)
        except StopIteration as end:
            return float(end.value.mean_nll)


def step_tokens(rows: list[Row], work: Workload, steps: int) -> float:
    """Of the original rows in `steps` optimizer steps, on average, padding not counted."""
    return sum(len(row.input_ids) for row in rows) / len(rows) * work.batch_rows * steps


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
