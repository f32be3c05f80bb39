"""One serving system in a process of its own, asked over standard input. `benchmarks.serve` starts one for each.

    python -m benchmarks.serve_worker SYSTEM MODEL_FOLDER VOICES_FOLDER [--gguf FILE]

A line in, as JSON: {"prompts": [{"messages": …, "ids": […]}, …], "voices": [name or null, …], "new_tokens": 64}.
A line out: {"seconds": …, "first_seconds": … or null}. Greedy, and a turn's end does not end a reply.
Other systems' interpreters run this file too, so nothing outside the standard library is imported at its top.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# Prompts, the voice of each, and how many tokens; returns how many came, and when the first did if that can be told.
Ask = Callable[[list[dict[str, Any]], list[str | None], int], tuple[int, float | None]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=list(SYSTEMS))
    parser.add_argument("model", type=Path)
    parser.add_argument("voices", type=Path)
    parser.add_argument("--gguf", type=Path)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    version, ask = SYSTEMS[args.system](args)
    print(json.dumps({"version": version}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.perf_counter()
        came, first = ask(asked["prompts"], asked["voices"], asked["new_tokens"])
        seconds = time.perf_counter() - begin
        wanted = len(asked["prompts"]) * asked["new_tokens"]
        if came != wanted:
            raise SystemExit(f"{came} tokens came, not {wanted}")
        print(json.dumps({"seconds": seconds, "first_seconds": first and first - begin}), file=answers)


def repertory(args: argparse.Namespace) -> tuple[str, Ask]:
    """The host's own loop over the device, on a thread of its own, without HTTP before it."""
    from importlib.metadata import version

    from benchmarks.voices import ref_to
    from repertory.contracts import BUNDLED_MODEL, BaseKey, GenerateRequest
    from repertory.model import base as base_module
    from repertory.model.loop import DeviceLoop
    from repertory.model.voices import read_voice
    from repertory.settings import settings

    key = BaseKey(base_model=BUNDLED_MODEL, quantization="none", dtype="bf16")
    base = base_module.load(BUNDLED_MODEL, settings(), base_module.detect_device(), key, lambda phase: None)
    loop = DeviceLoop(base, settings().training_share)
    threading.Thread(target=loop.run_forever, daemon=True).start()
    adapter_of = cache(lambda name: read_voice(ref_to(args.voices / name), base).adapter)

    def ask(prompts: list[dict[str, Any]], voices: list[str | None], new_tokens: int) -> tuple[int, float | None]:
        told: list[float] = []
        ended = threading.Semaphore(0)

        def hear(chunk: Any) -> None:
            told.append(time.perf_counter())
            if chunk.error or chunk.finish_reason:
                ended.release()

        sequences = []
        for at, (prompt, name) in enumerate(zip(prompts, voices, strict=True)):
            ref = ref_to(args.voices / name) if name else None
            request = GenerateRequest(
                request_id=str(at),
                org_id=name or f"org{at % 8}",
                adapter=ref,
                messages=prompt["messages"],
                temperature=0,
                top_p=1,
                top_k=0,
                max_tokens=new_tokens,
            )
            sequence = loop.engine.sequence(request, adapter_of(name) if name else None, None, hear)
            assert list(sequence.prompt_ids) == prompt["ids"], "not the prompt that the others get"
            sequence.stop_ids = set()
            sequences.append(sequence)
            loop.submit(sequence)
        for _ in sequences:
            ended.acquire()
        return sum(len(sequence.output_ids) for sequence in sequences), told[0]

    return version("repertory"), ask


def transformers(args: argparse.Namespace) -> tuple[str, Ask]:
    from transformers import __version__

    return __version__, _generating(_transformers_model(args.model))


def peft(args: argparse.Namespace) -> tuple[str, Ask]:
    from peft import PeftModel, __version__

    names = sorted(folder.name for folder in args.voices.iterdir())
    model: Any = _transformers_model(args.model)
    for at, name in enumerate(names):  # in bf16 as the base, which is faster than its default of fp32
        about = {"adapter_name": name, "autocast_adapter_dtype": False}
        if at == 0:
            model = PeftModel.from_pretrained(model, args.voices / name, **about)
        else:
            model.load_adapter(args.voices / name, **about)
    return __version__, _generating(model)


def _transformers_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _generating(model: Any) -> Ask:
    """All prompts as one batch, padded on the left."""
    import torch

    def ask(prompts: list[dict[str, Any]], voices: list[str | None], new_tokens: int) -> tuple[int, float | None]:
        longest = max(len(prompt["ids"]) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt["ids"]) :] = torch.tensor(prompt["ids"])
            mask[row, longest - len(prompt["ids"]) :] = 1
        mixed = {"adapter_names": voices} if any(voices) else {}
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, **mixed)
        return out[:, longest:].numel(), None

    return ask


def vllm(args: argparse.Namespace, voices: bool = False) -> tuple[str, Ask]:
    """On all cores: by default it leaves one to its scheduler, which on two cores costs it half."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams, __version__
    from vllm.lora.request import LoRARequest

    numbers = {folder.name: at for at, folder in enumerate(sorted(args.voices.iterdir()), 1)}
    with_lora = {"enable_lora": True, "max_loras": len(numbers), "max_lora_rank": 16} if voices else {}
    llm = LLM(str(args.model), dtype="bfloat16", max_num_seqs=32, max_model_len=2048, **with_lora)

    def ask(prompts: list[dict[str, Any]], voices: list[str | None], new_tokens: int) -> tuple[int, float | None]:
        replies = llm.generate(
            [{"prompt_token_ids": prompt["ids"]} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True),
            lora_request=[name and LoRARequest(name, numbers[name], str(args.voices / name)) for name in voices],
            use_tqdm=False,
        )
        return sum(len(reply.outputs[0].token_ids) for reply in replies), None

    return __version__, ask


def vllm_lora(args: argparse.Namespace) -> tuple[str, Ask]:
    """Apart from `vllm`, which without adapters runs compiled."""
    return vllm(args, voices=True)


def llama_cpp(args: argparse.Namespace) -> tuple[str, Ask]:
    """4-bit weights, one request at a time."""
    from llama_cpp import Llama, __version__

    llama = Llama(str(args.gguf), n_ctx=2048, n_threads=os.cpu_count(), verbose=False)

    def ask(prompts: list[dict[str, Any]], voices: list[str | None], new_tokens: int) -> tuple[int, float | None]:
        came = 0
        for prompt in prompts:
            for _, _token in zip(range(new_tokens), llama.generate(prompt["ids"], temp=0), strict=False):
                came += 1
        return came, None

    return __version__, ask


SYSTEMS: dict[str, Callable[[argparse.Namespace], tuple[str, Ask]]] = {
    "repertory": repertory,
    "transformers": transformers,
    "peft": peft,
    "vllm": vllm,
    "vllm-lora": vllm_lora,
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    main()
