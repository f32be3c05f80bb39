"""Folders of base models that are damaged or hostile: each is refused with its reason, none does harm."""

from __future__ import annotations

import json
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from repertory.contracts import BaseKey, Dtype
from repertory.errors import BaseModelUnavailable, RepertoryError
from repertory.model import base as base_module
from repertory.model import bundled, weights
from repertory.model.hub import INDEX, SINGLE
from repertory.settings import Settings

NAME = "acme/hostile"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("original") / "model", "llama-gqa", max_shard_size="100KB")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A sound sharded model in a cache, to be spoilt."""
    return shutil.copytree(original, tmp_path / "cache" / NAME)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., base_module.Base]:
    def load(dtype: Dtype = "fp32") -> base_module.Base:
        settings = Settings(_env_file=None, model_cache_dir=tmp_path / "cache", hf_hub_offline=True)
        key = BaseKey(base_model=NAME, quantization="none", dtype=dtype)
        return base_module.load(NAME, settings, base_module.detect_device(), key, weights.silent)

    return load


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def with_config(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda config: config | values)


def with_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_text(text))


def void(_: object) -> None:
    """What a function that must return nothing may end with."""


def link_out(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/etc/passwd")


def shard_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(first_shard(folder), outside)
    edit(folder / INDEX, lambda index: renamed(index, "../outside.safetensors"))


def renamed(index: dict[str, Any], name: str) -> dict[str, Any]:
    first = min(index["weight_map"].values())
    return index | {
        "weight_map": {tensor: name if shard == first else shard for tensor, shard in index["weight_map"].items()}
    }


def huge_header(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def cut_short(folder: Path) -> None:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def tensor_twice(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})


def tensor_gone(folder: Path) -> None:
    """The index is honest; the model wants more than there is, and would be given random weights for it."""
    path = first_shard(folder)
    tensors = load_file(path)
    lost = min(name for name in tensors if "layernorm" not in name)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    edit(
        folder / INDEX,
        lambda index: index | {"weight_map": {name: at for name, at in index["weight_map"].items() if name != lost}},
    )


def wrong_shape(folder: Path) -> None:
    path = first_shard(folder)
    tensors = {name: torch.cat([tensor, tensor]) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def not_a_number(folder: Path) -> None:
    path = first_shard(folder)
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def link_out_of_templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "secret.jinja").symlink_to("/etc/passwd")


def several_templates(*names: str) -> Callable[[Path], None]:
    """As Cohere's Command R has them, in the older form."""

    def spoil(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        templates = [{"name": name, "template": tiny.CHATML} for name in names]
        edit(folder / "tokenizer_config.json", lambda config: config | {"chat_template": templates})

    return spoil


def fewer_embeddings_than_tokens(folder: Path) -> None:
    """As in a fine-tune that added the tokens of its template without room for them in the weights."""
    tokens = ("embed_tokens.weight", "lm_head.weight")
    for path in folder.glob("*.safetensors"):
        tensors = {
            name: tensor[:399].clone() if name.endswith(tokens) else tensor for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    edit(folder / "config.json", lambda config: config | {"vocab_size": 399})


def pickles_alone(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")


CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a link out of the folder": (link_out, "unsafe_path", "tokenizer.json"),
    "a shard outside the folder": (shard_outside, "unsafe_weights", "../outside.safetensors"),
    "an absolute shard": (
        lambda folder: edit(folder / INDEX, lambda index: renamed(index, "/etc/passwd")),
        "unsafe_weights",
        "/etc/passwd",
    ),
    "a missing shard": (lambda folder: first_shard(folder).unlink(), "base_model_unavailable", "shards are missing"),
    "an oversized header": (huge_header, "unsafe_weights", "no whole safetensors file"),
    "a shard cut short": (cut_short, "unsafe_weights", "no whole safetensors file"),
    "a tensor in two shards": (tensor_twice, "unsafe_weights", " and in "),
    "a tensor in no shard": (tensor_gone, "base_model_unavailable", "lack"),
    "tensors of another shape": (wrong_shape, "base_model_unavailable", "cannot be loaded"),
    "an index that is no JSON": (with_text(INDEX, "{"), "base_model_unavailable", "is damaged"),
    "pickles alone": (pickles_alone, "unsafe_weights", "can run code"),
    "a config that is no object": (with_text("config.json", "[]"), "unsafe_weights", "no JSON object"),
    "a config that is no JSON": (with_text("config.json", "x"), "unsafe_weights", "no JSON"),
    "a deep config": (with_text("config.json", "[" * 200_000), "unsafe_weights", "no JSON"),
    "a huge config": (with_text("config.json", " " * (5 << 20)), "unsafe_weights", "more than"),
    "a billion layers": (with_config(num_hidden_layers=10**9), "unsafe_weights", "num_hidden_layers"),
    "a billion columns": (with_config(hidden_size=10**9), "unsafe_weights", "hidden_size"),
    "a billion layers by GPT-2's name": (
        with_config(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_layer=10**9),
        "unsafe_weights",
        "n_layer",
    ),
    "a trillion labels": (with_config(num_labels=10**12), "unsafe_weights", "num_labels"),
    "a trillion positions": (with_config(max_position_embeddings=10**12), "unsafe_weights", "max_position_embeddings"),
    "no heads for keys": (with_config(num_key_value_heads=0), "base_model_unavailable", "cannot be loaded"),
    "heads of no size": (with_config(head_dim=0), "base_model_unavailable", "cannot be loaded"),
    "padding outside of the vocabulary": (
        with_config(pad_token_id=10**6),
        "base_model_unavailable",
        "Padding_idx must be within",
    ),
    "weights that are quantized already": (
        with_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "unsupported_quantization",
        "published quantized (gptq)",
    ),
    "a deep index": (with_text(INDEX, "[" * 200_000), "base_model_unavailable", "is damaged"),
    "weights that are no numbers": (not_a_number, "base_model_unavailable", "is no number"),
    "a token without an embedding": (fewer_embeddings_than_tokens, "template_unusable", "embeddings for 399 only"),
    "a link out of the templates": (link_out_of_templates, "unsafe_path", "secret.jinja"),
    "several templates, none the default": (
        several_templates("rag", "tool_use"),
        "template_unusable",
        "none is called 'default'",
    ),
    "negative layers": (with_config(num_hidden_layers=-1), "unsafe_weights", "num_hidden_layers"),
    "layers as text": (with_config(num_hidden_layers="2"), "base_model_unavailable", "cannot be loaded"),
    "code that it needs": (
        with_config(model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"}),
        "remote_code_required",
        "never run",
    ),
    "an adapter in disguise": (with_text("adapter_config.json", "{}"), "unsupported_architecture", "adapter"),
    "weights named by the config": (
        with_config(transformers_weights="../x.safetensors"),
        "unsupported_architecture",
        "names its weights itself",
    ),
    "a template that fails": (
        with_text("chat_template.jinja", "{{ 1 / 0 }}"),
        "template_unusable",
        "ZeroDivisionError",
    ),
    "a long template": (with_text("chat_template.jinja", "x" * (2 << 20)), "unsafe_weights", "chat_template.jinja"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_folder_is_refused(folder: Path, load: Callable[[], base_module.Base], case: str) -> None:
    spoil, code, words = CASES[case]
    spoil(folder)
    with pytest.raises(BaseModelUnavailable) as refused:
        load()
    assert (refused.value.code, words in refused.value.message) == (code, True), refused.value.message
    assert NAME in refused.value.message
    assert refused.value.cure


def test_of_several_templates_the_default_one_is_used(
    folder: Path, load: Callable[[], base_module.Base], tmp_path: Path
) -> None:
    template = load().renderer.template
    several_templates("tool_use", "default")(folder)
    renderer = load().renderer
    assert renderer.template == template
    saved = renderer.tokenizer.save_pretrained(tmp_path / "voice")
    assert all(Path(path).parent == tmp_path / "voice" for path in saved)  # as files of a voice must lie


@pytest.mark.parametrize("kind", ["flash_attention_2", "kernels-community/flash-attn"])
def test_the_attention_that_a_config_names_is_neither_needed_nor_fetched(
    folder: Path, load: Callable[[], base_module.Base], kind: str
) -> None:
    edit(folder / "config.json", lambda config: config | {"attn_implementation": kind})
    assert load().model.config._attn_implementation == base_module.ATTENTION


def test_a_model_that_exceeds_fp16_is_told_what_to_set(folder: Path, load: Callable[..., base_module.Base]) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor * 1e6 if "lm_head" in name else tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    assert load().dtype is torch.float32
    with pytest.raises(BaseModelUnavailable, match="in fp16 is no number") as refused:
        load("fp16")
    assert "DTYPE=bf16 or fp32" in refused.value.cure


def test_a_template_that_never_ends_is_given_up(
    folder: Path, load: Callable[[], base_module.Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(endless)
    monkeypatch.setattr(base_module, "TEMPLATE_SECONDS", 0.3)
    with pytest.raises(BaseModelUnavailable, match=r"does not end within 0\.3 seconds"):
        load()
    for thread in threading.enumerate():
        if thread.name == "chat-template":
            thread.join(20)
            assert not thread.is_alive(), "it goes on for hours and takes time from everything else"


def test_a_sharded_model_in_the_cache_is_loaded_and_computes_what_it_says(
    folder: Path, load: Callable[[], base_module.Base]
) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load()
    for name, tensor in load_file(first_shard(folder)).items():
        held = loaded.model.get_parameter(name) if name in dict(loaded.model.named_parameters()) else None
        assert held is None or torch.equal(held, tensor)
    assert loaded.fingerprint == weights.fingerprint(folder)


def test_code_that_comes_with_a_known_architecture_is_not_needed_and_not_run(
    folder: Path, load: Callable[[], base_module.Base], tmp_path: Path
) -> None:
    proof = tmp_path / "owned"
    (folder / "modeling_evil.py").write_text(f"open({str(proof)!r}, 'w')\n")
    edit(folder / "config.json", lambda config: config | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}})
    edit(
        folder / "tokenizer_config.json",
        lambda config: config | {"auto_map": {"AutoTokenizer": [None, "modeling_evil.E"]}},
    )
    assert load().parameter_count > 0
    assert not proof.exists()


def test_pickles_beside_safetensors_are_not_read(folder: Path, load: Callable[[], base_module.Base]) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    assert load().parameter_count > 0


def test_a_snapshot_of_the_hubs_own_cache_is_read_through_its_links(
    original: Path, tmp_path: Path, load: Callable[[], base_module.Base]
) -> None:
    repository = tmp_path / "models--acme--hostile"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40)
    shutil.copytree(original, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    weights.check(snapshot, NAME)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../elsewhere")
    with pytest.raises(RepertoryError, match="link that leads out"):
        weights.check(snapshot, NAME)


def test_a_single_file_is_preferred_to_an_index_as_transformers_does(folder: Path) -> None:
    everything = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file(everything, folder / SINGLE, metadata={"format": "pt"})
    assert weights.files(folder, NAME) == [folder / SINGLE]


def test_the_bundled_model_is_used_from_a_cache_where_no_lock_can_be_held(folder: Path) -> None:
    """As on a read-only disk, which root could still write to here: a folder lies where the lock would."""
    folder.with_name(f".{folder.name}.lock").mkdir()
    bundled.provide(folder, weights.silent)
    (folder / "config.json").unlink()
    with pytest.raises(IsADirectoryError):
        bundled.provide(folder, weights.silent)
