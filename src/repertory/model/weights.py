"""The files of base models: where each lies in the model cache, and how it gets there. No torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from repertory.contracts import BUNDLED_MODEL
from repertory.errors import BaseModelUnavailable
from repertory.model import bundled
from repertory.settings import Settings

WITHOUT_WEIGHTS = ("*.json", "*.model", "*.txt", "*.jinja")  # files of a base model on the hub
WANTED = (*WITHOUT_WEIGHTS, "*.safetensors")
FINGERPRINT_BYTES = 1 << 20  # 1 MiB, three times of each file


def locate(name: str, settings: Settings, say: Callable[[str], None]) -> Path:
    """The local folder of base model `name`: in the cache, or brought there. Raises BaseModelUnavailable."""
    cache = settings.model_cache_dir.resolve()
    folder = (cache / name).resolve()
    if not folder.is_relative_to(cache):
        raise BaseModelUnavailable(f"the base model {name} lies outside the model cache", code="base_model_not_allowed")
    if name == BUNDLED_MODEL:
        bundled.provide(folder, say)
    if not (folder / "config.json").is_file():
        folder = _download(name, cache, settings, say)
    if not any(folder.glob("*.safetensors")):
        raise BaseModelUnavailable(
            f"the base model {name} has no .safetensors weights; other formats can run code and are not loaded",
            code="unsafe_weights",
            cure="Choose a model that is published in safetensors, or convert it once with transformers.",
        )
    return folder


def locate_outline(name: str, settings: Settings) -> Path:
    """The folder that describes base model `name`, with or without its weights; a few files at the most are downloaded.

    Raises BaseModelUnavailable.
    """
    cache = settings.model_cache_dir.resolve()
    folder = (cache / name).resolve()
    if name == BUNDLED_MODEL or not folder.is_relative_to(cache):
        return locate(name, settings, lambda phase: None)
    if (folder / "config.json").is_file():
        return folder
    return _download(name, cache, settings, lambda phase: None, WITHOUT_WEIGHTS)


def weights_fingerprint(folder: Path) -> str:
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


def _download(
    name: str, cache: Path, settings: Settings, say: Callable[[str], None], wanted: Sequence[str] = WANTED
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BaseModelUnavailable(
            f"there is no base model folder {name} in the model cache, and it is no hub name (owner/model)",
            cure="Use owner/model as on the hub, or put the model's folder into MODEL_CACHE_DIR.",
        )
    say(f"downloading {name}")
    try:
        return Path(
            snapshot_download(
                name, cache_dir=cache / "hub", token=settings.huggingface_token, allow_patterns=list(wanted)
            )
        )
    except GatedRepoError as error:
        raise BaseModelUnavailable(
            f"{name} is gated on the hub and the access was refused",
            cure="Accept its licence on the model's page and set HUGGINGFACE_TOKEN, or use an open base model.",
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelUnavailable(
            f"the hub has no model {name}, or it is private",
            cure="Check the spelling; for a private model set HUGGINGFACE_TOKEN.",
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BaseModelUnavailable(
            f"{name} is not in the model cache and could not be downloaded: {_first_line(error)}",
            cure="Check the network (or HUGGINGFACE_TOKEN), copy the model's folder to "
            f"MODEL_CACHE_DIR/{name}, or leave base_model out to use the default.",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
