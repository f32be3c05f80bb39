"""What `make install` puts into a fresh environment is enough to load the base model; the tests' own environment has
more, and would hide what is missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LOAD = """
from repertory.contracts import BUNDLED_MODEL, BaseKey
from repertory.model import base
from repertory.settings import settings
device = base.detect_device()
for quantization in ("none", "4bit"):
    key = BaseKey(base_model=BUNDLED_MODEL, quantization=quantization, dtype="fp32")
    print(base.load(BUNDLED_MODEL, settings(), device, key, print).parameter_count)
"""


def test_a_plain_installation_loads_the_bundled_model(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))}
    subprocess.run(["make", "install", f"VENV={tmp_path}/venv"], cwd=ROOT, env=clean, check=True)
    python = tmp_path / "venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import pytest"], capture_output=True, check=False).returncode != 0
    offline = clean | {"HF_HUB_OFFLINE": "1"}
    loaded = subprocess.run(
        [python, "-c", LOAD], cwd=tmp_path, env=offline, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.split().count("134515008") == 2
