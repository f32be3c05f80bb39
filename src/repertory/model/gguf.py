"""GGUF files: unpacked once into an ordinary safetensors folder, with the tokenizer and chat template they carry."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from repertory.errors import BaseModelUnavailable
from repertory.manifest import sync_folder

# What transformers raises for files that are damaged or that it does not understand.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    struct.error,
)


def convert(gguf: Path, folder: Path, name: str) -> None:
    """Make `folder` from the file, whole or not at all; whoever calls is alone. Raises BaseModelUnavailable."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        _unpack(gguf, beside, name)
        sync_folder(beside)
        beside.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _unpack(gguf: Path, folder: Path, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize` the weights would stay in GGUF blocks, which cannot be saved or trained on.
    unpacked = GgufConfig(gguf_file=gguf.name, dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=unpacked,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
        ).to(torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False, local_files_only=True
        )
    except UNREADABLE as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseModelUnavailable(
            f"the GGUF file of {name} cannot be unpacked: {reason}",
            code="unsupported_architecture",
            cure="Use the model's safetensors instead: by its hub name, or its folder with `repertory models register`."
            " transformers reads GGUF files of Llama, Mistral, Qwen2 and a few more families.",
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
