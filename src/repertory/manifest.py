"""Folders that are whole or not there: files are written beside their place, and MANIFEST.json is renamed in last.

A folder counts only while its manifest verifies: every file it names has the recorded size and sha256. Files that it
does not name (TensorBoard events, say) may come and go.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

MANIFEST = "MANIFEST.json"


def write_durably(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it holds either what it held before or all of `content`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """What was being written beside its place when its process ended."""
    for beside in folder.glob(".*.tmp"):
        beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only after its directory is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, names: list[str]) -> None:
    """Seal `folder`: from now on it counts as whole. The named files must be on disk already."""
    files = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(names)}
    write_durably(folder / MANIFEST, json.dumps({"files": files}, indent=1).encode())


def amend(folder: Path, changed: Mapping[str, Callable[[bytes], bytes]]) -> None:
    """Change files of a sealed folder, those that it has, and what the manifest says of them.

    The other files keep what is recorded of them, so damage stays damage. Interrupted, the folder counts as damaged
    until this is done again.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    for name, change in changed.items():
        if name in files:
            content = change((folder / name).read_bytes())
            write_durably(folder / name, content)
            files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_durably(folder / MANIFEST, json.dumps({"files": files}, indent=1).encode())


def verify(folder: Path, *, with_contents: bool = True) -> str | None:
    """Why the folder is not whole, or None if it is; without contents, as far as names and sizes tell."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        recorded = {str(name): (int(facts["size"]), str(facts["sha256"])) for name, facts in files.items()}
    except FileNotFoundError:
        return f"{folder.name} has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder.name}/{MANIFEST} is damaged"
    for name, (size, digest) in recorded.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink() or not path.is_file():
            return f"{folder.name}/{name} is missing"
        if path.stat().st_size != size:
            return f"{folder.name}/{name} has {path.stat().st_size} bytes, not the {size} recorded"
        if with_contents and sha256(path) != digest:
            return f"{folder.name}/{name} differs from its recorded sha256"
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
