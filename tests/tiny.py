"""Tiny random base models and a tokenizer, made on the spot: real architectures, no download, fast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Hello! Hey, how are you? I am fine, thank you. What do you like to do? Tell me a joke about the weather.",
    "user assistant system You are a helpful pirate. Arr, the sea is rough today and the rum is gone, matey!",
    "0123456789 ok yes no maybe later tomorrow morning evening coffee tea music games school work friends home",
]

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

# What each family adds to the sizes. Windows are shorter than the rows of the tests, so that they bind.
SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
WIDE_HEADS = {"head_dim": 32}  # as compiled loops take them
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 16} | WIDE_HEADS),
    "qwen2": ("qwen2", {"num_key_value_heads": 2} | WIDE_HEADS),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    # Caps this small bend the scores and logits of such a model far from where they would be without.
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        SLIDING_THEN_FULL
        | {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0, "tie_word_embeddings": True},
    ),
    "gemma3": (
        "gemma3_text",
        SLIDING_THEN_FULL
        | {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "phi3": ("phi3", {"num_key_value_heads": 2, "sliding_window": 16}),
    "phi": ("phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "cohere": ("cohere", {"num_key_value_heads": 2, "logit_scale": 0.5, "tie_word_embeddings": True}),
    "granite": (
        "granite",
        {"num_key_value_heads": 2, "logits_scaling": 2.0, "residual_multiplier": 0.5}
        | {"attention_multiplier": 0.3, "embedding_multiplier": 3.0},
    ),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "starcoder2": ("starcoder2", {"num_key_value_heads": 2, "sliding_window": 16}),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.25, "use_parallel_residual": True}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_inner": 64, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", MIXTURE | {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen2-moe": (
        "qwen2_moe",
        MIXTURE | {"num_key_value_heads": 2, "num_experts": 4, "shared_expert_intermediate_size": 32},
    ),
    "qwen3-moe": ("qwen3_moe", MIXTURE | {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4}),
}


def make_tokenizer(template: str | None = CHATML, added: Sequence[AddedToken] = ()) -> PreTrainedTokenizerFast:
    """Byte-level, as those of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_tokens(list(added))
    fast.chat_template = template
    return fast


def make_metaspace_tokenizer(
    template: str | None, special: Sequence[str] = (), spaces: Literal["every", "first", "none"] = "every"
) -> PreTrainedTokenizerFast:
    """One that marks spaces as ▁ and falls back to bytes, as SentencePiece does.

    It puts a space before `every` stretch of text between special tokens (Llama 2, Mistral, TinyLlama), before the
    `first` one (newer Mistral), or before `none` (Gemma).
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    bytes_of_all = [f"<0x{at:02X}>" for at in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *special, *bytes_of_all, "▁", *model["vocab"]]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif spaces == "every":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if spaces != "none":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.chat_template = template
    return fast


def make_model(
    folder: Path, family: str, template: str | None = CHATML, seed: int = 0, max_shard_size: str = "5GB"
) -> Path:
    """A checkpoint folder of `family` with random weights that make sharp, varied predictions."""
    model_type, more = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # fresh weights are so small that all tokens look alike
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(template).save_pretrained(folder)
    return folder


def make_gguf(path: Path, architecture: str = "llama", seed: int = 0) -> Any:
    """A GGUF file of a tiny Llama with tokenizer and chat template; returns the model that it was written from."""
    import gguf

    _, more = FAMILIES["llama-gqa"]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES | more))
    config, heads = model.config, {"q_proj": SIZES["num_attention_heads"], "k_proj": more["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    described = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].__getitem__)
    tokens += [f"<unused{at}>" for at in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        values = weight.float().numpy()
        for layer, count in heads.items():
            if f"{layer}.weight" in name:  # GGUF rotates neighbours, transformers halves
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
