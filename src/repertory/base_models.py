"""What `repertory models` does: the base models on this disk, listed, fetched, registered and removed.

It works on files alone, with or without a service that runs beside it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from repertory.catalogue import HUB, LOCAL, LOCAL_NAME, BaseModel, Catalogue, named
from repertory.contracts import BUNDLED_MODEL, BaseKey, Download, Hyperparameters
from repertory.errors import BaseModelUnavailable, Conflict, InvalidInput, NotFound
from repertory.model import gguf, weights
from repertory.model.hub import Hub
from repertory.model.lock import alone
from repertory.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One base model, for people."""

    name: str
    revision: str | None  # the commit on the hub
    state: str  # "ready", or what is wrong
    size_bytes: int
    architecture: str  # model_type of config.json
    precision: str  # of the files: BF16, F32, ...
    source: str  # bundled, registered, folder or hub
    path: str  # of a registered model: the operator's folder
    voices: int  # that need it


def listed(settings: Settings) -> list[Listed]:
    voices = voices_by_base(settings)
    return [_listed(model, voices) for model in Catalogue(settings.model_cache_dir).all()]


def download(asked: str, settings: Settings, say: Callable[[str], None], tell: Callable[[Download], None]) -> Path:
    """The newest commit that the name's branch or tag means on the hub; older snapshots stay.

    Raises InvalidInput or BaseModelUnavailable.
    """
    name, revision = named(asked)
    if name == BUNDLED_MODEL:
        key = BaseKey(base_model=name, quantization="none", dtype="bf16")
        return weights.locate(key, settings, say, tell).folder
    weights.check_hub_name(name)
    folder = Hub(settings).fetch(
        name, revision, say, tell, lambda described: weights.check_described(name, described, settings)
    )
    weights.check(folder, name)
    return folder


def register(asked: str, path: Path, settings: Settings, say: Callable[[str], None]) -> str:
    """Give a folder on this machine, or a GGUF file, the name `local/NAME`; returns that.

    A folder is used where it is, and only if its files can be loaded. A GGUF file is unpacked into the model cache.
    Raises InvalidInput, Conflict or BaseModelUnavailable.
    """
    short = asked.removeprefix(f"{LOCAL}/")
    if not LOCAL_NAME.fullmatch(short) or ".." in short:
        raise InvalidInput(
            f"{asked[:80]!r} cannot be a name.", cure="Use up to 64 letters, digits, dots, dashes and underscores."
        )
    name = f"{LOCAL}/{short}"
    catalogue = Catalogue(settings.model_cache_dir)
    place = catalogue.registered(name)
    source = path.expanduser().absolute()
    file = _gguf_in(source)
    with alone(place.parent / ".lock", lambda: say("another process registers a model")):
        if place.is_symlink() or place.exists():
            raise Conflict(f"{name} is registered already.", cure=f"repertory models remove {name}, or another name.")
        if file is None:
            _check_loads(source, name, settings, say)
            beside = place.with_name(f".{short}.tmp")
            beside.unlink(missing_ok=True)
            beside.symlink_to(source.resolve(), target_is_directory=True)
            beside.rename(place)
        else:
            say(f"unpacking {file.name} into {place}")
            gguf.convert(file, place, name)
            try:
                _check_loads(place, name, settings, say)
            except BaseModelUnavailable:
                catalogue.remove(BaseModel(name=name, revision=None, folder=place, source="registered"))
                raise
    return name


def remove(asked: str, settings: Settings, say: Callable[[str], None], *, force: bool = False) -> list[BaseModel]:
    """Remove a base model, without a revision all its snapshots; returns what was removed.

    A registered folder itself is never touched. Raises InvalidInput, NotFound, and Conflict where voices need it.
    """
    name, revision = named(asked)
    catalogue = Catalogue(settings.model_cache_dir)
    found = [model for model in catalogue.all() if model.name == name]
    if revision is not None:
        commit = catalogue.revisions(name).get(revision, revision)
        found = [model for model in found if model.revision is not None and _is_commit(model.revision, commit)]
    if not found:
        raise NotFound(
            f"There is no base model {asked} on this machine.",
            code="base_model_not_found",
            cure="See the names with: repertory models list",
        )
    voices = voices_by_base(settings)
    needed = sum(voices[model.name, model.revision] for model in found)
    if needed and not force:
        raise Conflict(
            f"{needed} voices stand on {asked} and would be silent without it.",
            code="base_model_in_use",
            cure="Keep it, or remove it all the same with --force; then those voices answer again once it is back.",
        )
    with alone(_lock_of(found[0], catalogue), lambda: say(f"waiting for a download of {name} to end")):
        for model in found:
            if model.folder.is_symlink() or model.folder.exists():
                catalogue.remove(model)
    return found


def _is_commit(commit: str, named: str) -> bool:
    """Whether `named` is the commit, or enough of its beginning to mean no other, as git shortens them."""
    return commit == named or (len(named) >= 7 and commit.startswith(named))


def voices_by_base(settings: Settings) -> Counter[tuple[str, str | None]]:
    """How many voices stand on each base model and commit, counted from the folders of the voices."""
    counted: Counter[tuple[str, str | None]] = Counter()
    for manifest in settings.finetuned_model_dir.glob("*/*/MANIFEST.json"):
        try:
            metadata = json.loads((manifest.parent / "training_metadata.json").read_text())
            counted[str(metadata["base_model"]), metadata["revision"]] += 1
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged voice needs no base model
    return counted


def _lock_of(model: BaseModel, catalogue: Catalogue) -> Path:
    if model.source == HUB:
        return model.folder.parent / ".lock"
    return catalogue.cache / LOCAL / ".lock"


def _listed(model: BaseModel, voices: Counter[tuple[str, str | None]]) -> Listed:
    files = [path for path in model.folder.iterdir() if path.is_file()] if model.folder.is_dir() else []
    unfinished = "not whole: download it again to go on" if model.source == HUB else "its folder is not there"
    state = "ready" if model.is_whole else unfinished
    architecture = precision = "?"
    if model.is_whole:
        try:
            architecture = str(json.loads((model.folder / "config.json").read_text()).get("model_type", "?"))[:40]
            precision = precision_of(weights.files(model.folder, model.name))
        except (OSError, ValueError, AttributeError, RecursionError, SafetensorError):
            state = "damaged"
        except BaseModelUnavailable as error:
            state = error.message
    return Listed(
        name=model.name,
        revision=model.revision,
        state=state,
        size_bytes=sum(path.stat().st_size for path in files),
        architecture=architecture,
        precision=precision,
        source=model.source,
        path=str(model.folder.resolve()) if model.source == "registered" else str(model.folder),
        voices=voices[model.name, model.revision],
    )


def precision_of(files: list[Path]) -> str:
    """The data types of the weights, the most frequent first."""
    counted: Counter[str] = Counter()
    for path in files:
        with safe_open(path, "np") as shard:
            counted.update(shard.get_slice(name).get_dtype() for name in shard.keys())  # noqa: SIM118
    return " ".join(kind for kind, _ in counted.most_common(2))


def _gguf_in(source: Path) -> Path | None:
    """The GGUF file that is to be registered, if it is one. Raises InvalidInput."""
    if source.is_file():
        if source.suffix == ".gguf":
            return source
        raise InvalidInput(f"{source.name} is no folder and no .gguf file.", cure="Name the model's folder.")
    if not source.is_dir():
        raise InvalidInput(f"{source} is not there.", cure="Name the folder of a model, or a .gguf file.")
    files = sorted(source.glob("*.gguf"))
    if not files or any(source.glob("*.safetensors")):
        return None
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:5])
        raise InvalidInput(f"{source} holds several GGUF files: {names}.", cure="Name one of the files.")
    return files[0]


def _check_loads(folder: Path, name: str, settings: Settings, say: Callable[[str], None]) -> None:
    """All that can be said without loading it: files, architecture, tokenizer and chat template."""
    say(f"checking {folder}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InvalidInput(f"{folder} may not be read.", cure="Give the service's user the right to read it.")
    weights.check_described(name, folder, settings)
    weights.check(folder, name)
    from repertory.model import base  # imports torch, which takes seconds

    device = base.detect_device()
    base.outline(folder, BaseKey.resolve(name, Hyperparameters(), device), device)
    if base.renderer_in(folder, name) is None:
        raise BaseModelUnavailable(
            f"{name} has no tokenizer that can be loaded",
            cure="Copy tokenizer.json and tokenizer_config.json of the model into its folder.",
        )
