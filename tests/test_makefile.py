"""Which torch `make` installs, by what it would say to pip. The driver is a script called nvidia-smi."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ("530.30.02", "--extra-index-url https://download.pytorch.org/whl/cu126 torch==2.13.0+cu126"),
        ("580.65.06", None),
    ],
)
def test_a_driver_of_cuda_12_gets_a_torch_that_runs_on_it(driver: str, expected: str | None, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text(f"#!/bin/sh\necho {driver}\n")
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["make", f"{tmp_path}/venv/.installed-torch", f"VENV={tmp_path}/venv", "PIP=echo pip install"],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    asked = [line.removeprefix("pip install ") for line in done.stdout.splitlines() if line.startswith("pip install")]
    assert asked == ([] if expected is None else [expected])
    assert f"NVIDIA driver {driver}" in done.stdout
