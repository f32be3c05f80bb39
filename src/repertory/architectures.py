"""Which architectures are supported: told from a base model's config.json alone, before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from repertory.settings import Settings

# `model_type` in config.json -> what people call it. Each of them trains, comes back from disk and speaks as in PEFT
# (tests/model/test_architectures.py, on random weights).
SUPPORTED = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "phi": "Phi",
    "phi3": "Phi-3",
    "gpt_neox": "GPT-NeoX",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "cohere": "Cohere",
    "granite": "Granite",
    "olmo2": "OLMo 2",
    "starcoder2": "StarCoder2",
}
CODE = "unsupported_architecture"
CURE = f"Choose a base model of one of the supported architectures: {', '.join(SUPPORTED.values())}."

MAX_CONFIG_BYTES = 1 << 20  # 1 MiB; published ones have a few KiB


def problem_with(name: str, folder: Path, settings: Settings) -> str | None:
    """Why the base model in `folder` is not supported, or None; also None where its config.json cannot be read.

    What the operator has set as the default base model is tried whatever it is: loading it compares our passes with the
    model's own, and refuses what computes otherwise.
    """
    if name == settings.default_base_model:
        return None
    config = _config_in(folder)
    if config is None:
        return None
    kind, classes = str(config.get("model_type")), config.get("architectures")
    classes = classes if isinstance(classes, list) else []
    if kind not in SUPPORTED:
        return f"the architecture of {name}, {kind[:64]}, is not supported"
    # As a classifier, say, it would lack the output embeddings, and nobody would notice that they are made up.
    if classes and not any(str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in classes):
        return f"{name} is no causal language model but {', '.join(map(str, classes))[:128]}"
    return None


def _config_in(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return None
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # who loads it says what is wrong with it
        return None
    return config if isinstance(config, dict) else None
