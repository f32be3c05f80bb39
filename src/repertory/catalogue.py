"""The base models of this machine: how they are named, which commit a name means, and where their folders lie.

In the model cache:

    bundled/NAME            the bundled model, unpacked
    local/NAME              a registered model: a link to the operator's folder, or the folder that a GGUF file became
    OWNER/NAME              a folder that the operator has put there
    hub/OWNER/NAME/COMMIT   a snapshot from the hub: renamed there when it is whole, COMMIT.partial until then
    hub/OWNER/NAME/revisions.json   which commit each branch or tag meant when it was last asked for

A name without a commit means what it meant when it was first downloaded here; only `repertory models download` looks
anew. So a voice, its resumed training and the next start stand on the same weights.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from repertory.contracts import BUNDLED_MODEL, BaseKey
from repertory.errors import BaseModelUnavailable, InvalidInput
from repertory.manifest import write_durably
from repertory.settings import Settings

MAIN = "main"
LOCAL = "local"
HUB = "hub"
PARTIAL = ".partial"
REVISIONS = "revisions.json"
MAX_CHARACTERS = 256

# A part neither begins with a dot (`..`) nor with a dash (it becomes a command's argument).
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
NAME = re.compile(rf"({_PART}/)?{_PART}")
HUB_NAME = re.compile(rf"{_PART}/{_PART}")
REVISION = re.compile(rf"{_PART}(/{_PART})*")
COMMIT = re.compile(r"[0-9a-f]{40}")
LOCAL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Source = Literal["bundled", "registered", "folder", "hub"]


def is_name(asked: str) -> bool:
    """`NAME`, `OWNER/NAME` or `OWNER/NAME@REVISION`; nothing that could be a path, an address or an option."""
    name, at, revision = asked.partition("@")
    return (
        len(asked) <= MAX_CHARACTERS
        and NAME.fullmatch(name) is not None
        and (not at or REVISION.fullmatch(revision) is not None)
        and ".." not in asked
        and not asked.startswith(f"{HUB}/")  # the downloads' own place
    )


def is_allowed(asked: str, settings: Settings) -> bool:
    """By ALLOWED_BASE_MODELS, where the operator has set it. The default base model always is."""
    patterns = [pattern.strip() for pattern in settings.allowed_base_models.split(",") if pattern.strip()]
    name = asked.partition("@")[0]
    return not patterns or name == BUNDLED_MODEL or any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """One base model on this machine's disk."""

    name: str  # as jobs name it
    revision: str | None  # the commit, of one from the hub
    folder: Path  # as it stands in the cache; may be a link
    source: Source
    is_whole: bool = True


class Catalogue:
    """The folders of the model cache. It holds nothing in memory: several processes may look and change at once."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache.resolve()

    def snapshot(self, name: str, commit: str) -> Path:
        """Where a snapshot lies once it is whole."""
        return self.cache / HUB / name / commit

    def partial(self, name: str, commit: str) -> Path:
        return self.snapshot(name, commit).with_name(commit + PARTIAL)

    def registered(self, name: str) -> Path:
        """Where `local/NAME` lies or would lie."""
        return self.cache / LOCAL / name.removeprefix(f"{LOCAL}/")

    def beside_hub(self, name: str) -> Path | None:
        """The folder of a model that is not from the hub: bundled, registered, or put into the cache.

        Raises BaseModelUnavailable for one that leads out of the cache without being registered.
        """
        folder = self.cache / name
        if name.startswith(f"{LOCAL}/"):
            if folder.is_symlink() and not folder.is_dir():
                raise BaseModelUnavailable(
                    f"the folder of {name}, {folder.readlink()}, is not there any more",
                    cure=f"Put it back, or: repertory models remove {name}",
                )
            return folder if folder.is_dir() else None
        if not folder.resolve().is_relative_to(self.cache):
            raise BaseModelUnavailable(
                f"the base model {name} lies outside the model cache",
                code="base_model_not_allowed",
                cure="Register it: repertory models register NAME PATH.",
            )
        return folder if (folder / "config.json").is_file() else None

    def pinned(self, key: BaseKey) -> BaseKey:
        """`key` with the commit that its revision means here; as it is where nothing of the kind is on this disk."""
        if key.revision is None and self.is_beside_hub(key.base_model):
            return key
        if key.revision is not None and COMMIT.fullmatch(key.revision):
            return key
        folder = self.folder(key.name)
        return key if folder is None else key.model_copy(update={"revision": folder.name})

    def folder(self, asked: str) -> Path | None:
        """Of `NAME` or `OWNER/NAME@REVISION`, where it is whole on this disk."""
        name, _, revision = asked.partition("@")
        if not revision and self.is_beside_hub(name):
            return self.cache / name
        commit = revision if COMMIT.fullmatch(revision) else self.revisions(name).get(revision or MAIN)
        folder = None if commit is None else self.snapshot(name, commit)
        return folder if folder is not None and folder.is_dir() else None

    def is_beside_hub(self, name: str) -> bool:
        return name == BUNDLED_MODEL or name.startswith(f"{LOCAL}/") or (self.cache / name / "config.json").is_file()

    def revisions(self, name: str) -> dict[str, str]:
        """Branch or tag to commit, as last asked for."""
        try:
            read = json.loads((self.cache / HUB / name / REVISIONS).read_text())
        except (OSError, ValueError):
            return {}
        return {str(revision): str(commit) for revision, commit in read.items()} if isinstance(read, dict) else {}

    def remember(self, name: str, revision: str, commit: str) -> None:
        revisions = self.revisions(name) | {revision: commit}
        write_durably(self.cache / HUB / name / REVISIONS, json.dumps(revisions, indent=1).encode())

    def all(self) -> list[BaseModel]:
        """Sorted by name; snapshots that are not whole are marked."""
        return sorted(self._all(), key=lambda model: (model.name, model.revision or ""))

    def _all(self) -> Iterator[BaseModel]:
        for link in self.cache.glob(f"{LOCAL}/*"):
            if link.is_symlink() and not (link / "config.json").is_file():
                yield BaseModel(
                    name=f"{LOCAL}/{link.name}", revision=None, folder=link, source="registered", is_whole=False
                )
        for config in self.cache.glob("*/*/config.json"):
            owner, name = config.parts[-3:-1]
            if owner != HUB and not name.startswith("."):
                source: Source = {"bundled": "bundled", LOCAL: "registered"}.get(owner, "folder")  # type: ignore[assignment]
                yield BaseModel(name=f"{owner}/{name}", revision=None, folder=config.parent, source=source)
        for config in self.cache.glob("*/config.json"):
            yield BaseModel(name=config.parent.name, revision=None, folder=config.parent, source="folder")
        for folder in self.cache.glob(f"{HUB}/*/*/*"):
            commit = folder.name.removesuffix(PARTIAL)
            if COMMIT.fullmatch(commit) and folder.is_dir():
                yield BaseModel(
                    name="/".join(folder.parts[-3:-1]),
                    revision=commit,
                    folder=folder,
                    source="hub",
                    is_whole=commit == folder.name,
                )

    def remove(self, model: BaseModel) -> None:
        """Of a registered folder only the link in the cache; everything else with its files."""
        if model.folder.is_symlink():
            model.folder.unlink()
            return
        doomed = model.folder.with_name(f".{model.folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        model.folder.rename(doomed)  # at once: nobody finds half of it
        shutil.rmtree(doomed)


def named(asked: str) -> tuple[str, str | None]:
    """Name and revision. Raises InvalidInput where it is not the name of a base model."""
    if not is_name(asked):
        raise InvalidInput(
            f"{asked[:MAX_CHARACTERS]!r} is not the name of a base model.",
            code="base_model_not_allowed",
            cure="Use owner/name or owner/name@revision as on the hub, or local/NAME.",
            param="base_model",
        )
    name, _, revision = asked.partition("@")
    return name, revision or None
