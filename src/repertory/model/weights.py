"""The files of base models: from a key to a folder that is whole, holds safetensors and nothing that leads out of it.

Folders are hostile until they are checked: whoever published a model chose every byte of it. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from repertory import architectures
from repertory.catalogue import HUB_NAME, Catalogue
from repertory.contracts import BUNDLED_MODEL, BaseKey, Download
from repertory.errors import BaseModelUnavailable
from repertory.model import bundled
from repertory.model.hub import INDEX, MAX_DESCRIPTION_BYTES, SINGLE, Hub, shards_in, without_safetensors
from repertory.model.transfer import Patience
from repertory.settings import Settings

QUESTION_SECONDS = 4.0  # somebody waits for the answer; a hub that is well takes a fraction of one
OUTLINE_SECONDS = 10.0  # in which the hub must bring something of the few files that an estimate takes
FINGERPRINT_BYTES = 1 << 20  # 1 MiB, three times of each file
MAX_TEMPLATE_BYTES = 1 << 20  # the longest of well-known models, with tools, has some 20 KB
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20  # of hidden states and layers
MAX_VOCABULARY = 1 << 24
MAX_POSITIONS = 1 << 24  # the longest published ones have ten million
MAX_LABELS = 1 << 16  # of classifiers; transformers makes a name for each, whatever the model is
BOUNDS = {
    "num_hidden_layers": MAX_LAYERS,
    "hidden_size": MAX_WIDTH,
    "intermediate_size": MAX_WIDTH,
    "num_attention_heads": MAX_WIDTH,
    "vocab_size": MAX_VOCABULARY,
    "max_position_embeddings": MAX_POSITIONS,
    "num_labels": MAX_LABELS,
    # GPT-2's names
    "n_layer": MAX_LAYERS,
    "n_embd": MAX_WIDTH,
    "n_inner": MAX_WIDTH,
    "n_head": MAX_WIDTH,
    "n_positions": MAX_POSITIONS,
}
MORE_TEMPLATES = "additional_chat_templates/*"  # the one folder inside a model's that transformers looks into


def silent(_: object) -> None:
    """For callers that show no progress."""


@dataclass(frozen=True)
class Located:
    folder: Path
    key: BaseKey  # with the commit, of one from the hub


def locate(
    key: BaseKey, settings: Settings, say: Callable[[str], None] = silent, tell: Callable[[Download], None] = silent
) -> Located:
    """The base model's folder: in the cache, or brought there. Raises BaseModelUnavailable."""
    catalogue = Catalogue(settings.model_cache_dir)
    name = key.base_model
    if name == BUNDLED_MODEL:
        bundled.provide(catalogue.cache / name, say)
    key = catalogue.pinned(key)
    folder = catalogue.beside_hub(name) if key.revision is None else None
    if folder is None:
        check_hub_name(name)
        folder = catalogue.snapshot(name, key.revision or "none")
        if not folder.is_dir():
            folder = Hub(settings).fetch(
                name, key.revision, say, tell, lambda described: check_described(name, described, settings)
            )
            key = key.model_copy(update={"revision": folder.name})
    check_described(name, folder, settings)
    check(folder, name)
    return Located(folder, key)


def locate_outline(key: BaseKey, settings: Settings) -> Path:
    """The folder that describes the base model, with or without its weights; a few files at the most are downloaded.

    Raises BaseModelUnavailable.
    """
    catalogue = Catalogue(settings.model_cache_dir)
    key = catalogue.pinned(key)
    if key.base_model == BUNDLED_MODEL:
        return locate(key, settings).folder
    folder = catalogue.beside_hub(key.base_model) if key.revision is None else None
    if folder is None:
        check_hub_name(key.base_model)
        folder = catalogue.snapshot(key.base_model, key.revision or "none")
        if not folder.is_dir():
            patience = Patience(timeout_seconds=min(OUTLINE_SECONDS, settings.hf_hub_download_timeout), attempts=2)
            folder = Hub(settings, patience).describe(key.base_model, key.revision)
    check_described(key.base_model, folder, settings)
    return folder


def check_on_hub(key: BaseKey, settings: Settings) -> None:
    """All that the hub can tell within seconds of a base model that is not on this machine.

    Raises BaseModelUnavailable, also where it does not answer in time.
    """
    until = time.monotonic() + QUESTION_SECONDS
    patience = Patience(
        timeout_seconds=min(QUESTION_SECONDS, settings.hf_hub_download_timeout), attempts=1, until=until
    )
    with tempfile.TemporaryDirectory() as folder:
        Hub(settings, patience).bring_config(key.base_model, key.revision, Path(folder))
        check_described(key.base_model, Path(folder), settings)


def check_described(name: str, folder: Path, settings: Settings) -> None:
    """All that can be said without the weights, and so before they are downloaded. Raises BaseModelUnavailable."""
    check_description(folder, name)
    check_supported(name, folder, settings)


def check_supported(name: str, folder: Path, settings: Settings) -> None:
    """Raises BaseModelUnavailable where config.json tells already that loading it would be in vain."""
    if problem := architectures.problem_with(name, folder, settings):
        raise BaseModelUnavailable(problem, code=architectures.CODE, cure=architectures.CURE)


def fingerprint(folder: Path) -> str:
    """Changes when the model's files are exchanged for others: sizes, and samples of the contents, not gigabytes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - FINGERPRINT_BYTES, 0)):
                file.seek(start)
                digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()


def files(folder: Path, name: str) -> list[Path]:
    """The weights that transformers would load. Raises BaseModelUnavailable."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise without_safetensors(name, [path.name for path in folder.iterdir()])
    shards = [folder / shard for shard in shards_in(folder / INDEX, name)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise BaseModelUnavailable(
            f"the base model {name} is not whole: {len(missing)} of its {len(shards)} shards are missing, such as"
            f" {missing[0]}",
            cure="Copy the missing files into its folder, or download it again.",
        )
    return shards


def check(folder: Path, name: str) -> None:
    """Refuse a folder that is damaged or hostile. Raises BaseModelUnavailable."""
    check_description(folder, name)
    weights = files(folder, name)
    where: dict[str, str] = {}
    for path in weights:
        try:
            with safe_open(path, "np") as shard:
                tensors = list(shard.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(name, f"{path.name} is no whole safetensors file ({_first_line(error)})") from error
        for tensor in tensors:
            if tensor in where:
                raise _damaged(name, f"{tensor[:80]!r} is in {where[tensor]} and in {path.name}")
            where[tensor] = path.name
    if (folder / SINGLE).is_file():
        return
    for tensor, shard in json.loads((folder / INDEX).read_text())["weight_map"].items():
        if where.get(tensor) != shard:
            raise _damaged(name, f"{INDEX} says that {tensor[:80]!r} is in {shard}, where it is not")


def check_description(folder: Path, name: str) -> None:
    """What must hold before transformers reads a folder, with or without its weights. Raises BaseModelUnavailable."""
    _check_links(folder, name)
    config = _read_config(folder, name)
    if (folder / "adapter_config.json").exists():
        raise BaseModelUnavailable(
            f"{name} is an adapter (it has adapter_config.json), or pretends to be one",
            code="unsupported_architecture",
            cure="Name the base model itself.",
        )
    _check_bounds(config, name)
    if "transformers_weights" in config:
        raise BaseModelUnavailable(
            f"config.json of {name} names its weights itself, which is not supported",
            code="unsupported_architecture",
        )
    _check_not_quantized(config, name)
    for path in (*folder.iterdir(), *folder.glob(MORE_TEMPLATES)):
        if path.suffix in (".json", ".model", ".txt") and path.stat().st_size > MAX_DESCRIPTION_BYTES:
            raise _damaged(name, f"{path.name} has more than {MAX_DESCRIPTION_BYTES} bytes")
        if path.suffix == ".jinja" and path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise _damaged(name, f"{path.name} has more than {MAX_TEMPLATE_BYTES} bytes")
    _check_needs_no_code(config, name)


def _check_links(folder: Path, name: str) -> None:
    """A link that leads out of the folder could make any file of this machine part of a voice."""
    root = folder.resolve()
    inside = [root]
    if root.parent.name == "snapshots":  # of the hub's own cache, whose files are links to blobs beside it
        inside.append(root.parent.parent / "blobs")
    for path in (*root.iterdir(), *root.glob(MORE_TEMPLATES)):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
            raise BaseModelUnavailable(
                f"{path.name} of the base model {name} is a link that leads out of its folder",
                code="unsafe_path",
                cure="Put the file itself into the folder.",
            )


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise BaseModelUnavailable(
            f"the folder of the base model {name} has no config.json",
            cure="Copy the whole folder of a model, or register a .gguf file.",
        )
    if path.stat().st_size > architectures.MAX_CONFIG_BYTES:
        raise _damaged(name, f"config.json has more than {architectures.MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(name, "config.json is no JSON") from error
    if not isinstance(config, dict):
        raise _damaged(name, "config.json is no JSON object")
    return config


def _check_bounds(config: dict[str, Any], name: str) -> None:
    """Numbers that would keep this process building layers for ever."""
    for described in (config, config.get("text_config")):
        for field, bound in BOUNDS.items():
            value = described.get(field) if isinstance(described, dict) else None
            if isinstance(value, int | float) and not 0 < value <= bound:
                raise _damaged(name, f"{field} in config.json is {str(value)[:40]}, not a number up to {bound}")


def _check_not_quantized(config: dict[str, Any], name: str) -> None:
    """transformers would keep the quantization that a model comes with, whatever the key says."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "quantized") if isinstance(quantization, dict) else "quantized"
    raise BaseModelUnavailable(
        f"the weights of the base model {name} are published quantized ({str(method)[:40]}), which is not supported",
        code="unsupported_quantization",
        cure="Choose the model that they were made from; it is quantized here, with USE_4BIT=true or USE_8BIT=true.",
    )


def _check_needs_no_code(config: dict[str, Any], name: str) -> None:
    """Code beside a model is never downloaded nor run; most models that bring some also work without it."""
    if not config.get("auto_map"):
        return
    from transformers import CONFIG_MAPPING  # takes a second

    if config.get("model_type") not in CONFIG_MAPPING:
        raise BaseModelUnavailable(
            f"the base model {name} works only with Python code that comes with it, which is never run",
            code="remote_code_required",
            cure="Choose a base model whose architecture is part of transformers.",
        )


def check_hub_name(name: str) -> None:
    """Raises BaseModelUnavailable where no hub can have it."""
    if not HUB_NAME.fullmatch(name) or name.startswith("local/"):
        raise BaseModelUnavailable(
            f"there is no base model {name} on this machine, and it is no hub name (owner/model)",
            cure="See what there is with `repertory models list`; use owner/model as on the hub, or register a folder:"
            " repertory models register NAME PATH.",
        )


def _damaged(name: str, why: str) -> BaseModelUnavailable:
    return BaseModelUnavailable(
        f"the files of the base model {name} are damaged or hostile: {why}",
        code="unsafe_weights",
        cure="Download or copy it again from a source you trust, or choose another base model.",
    )


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:200] or type(error).__name__
