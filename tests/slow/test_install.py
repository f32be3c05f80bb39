"""Fresh environments hold what the README's commands need; the tests' own has more, and would hide what is missing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from running_service import eventually

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON", "PYTEST"))}
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
    subprocess.run(["make", "install", f"VENV={tmp_path}/venv"], cwd=ROOT, env=CLEAN, check=True)
    python = tmp_path / "venv" / "bin" / "python"
    assert subprocess.run([python, "-c", "import pytest"], capture_output=True, check=False).returncode != 0
    offline = CLEAN | {"HF_HUB_OFFLINE": "1"}
    loaded = subprocess.run(
        [python, "-c", LOAD], cwd=tmp_path, env=offline, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.split().count("134515008") == 2


def test_the_three_plain_commands_work_in_this_order(tmp_path: Path) -> None:
    """`pip install -r requirements.txt`, `python -m src.main`, `pytest`, as in the quick start of the README."""
    block = re.search(r"^```bash\n(pip install .*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    install, start, test = block[1].splitlines()
    copy = tmp_path / "copy"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    activated = CLEAN | {"PATH": f"{tmp_path}/venv/bin:{CLEAN['PATH']}", "HF_HUB_OFFLINE": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=copy, env=activated, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    run(*install.split())

    log = tmp_path / "log"
    with log.open("wb") as file:
        service = subprocess.Popen(start.split(), cwd=copy, env=activated | {"PORT": "0"}, stderr=file)
    try:
        url = eventually(lambda: re.search(r'"url": "([^"]+)"', log.read_text()) or service.poll() is not None)
        assert isinstance(url, re.Match), log.read_text()
        health = httpx.get(f"{url[1]}/api/v1/health", trust_env=False).json()
        assert health["status"] in ("starting", "healthy")
    finally:
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0

    collected = run(test, "--collect-only", "-m", "slow or not slow")
    assert re.search(r"\d{3,} tests collected", collected), collected[-500:]
    assert re.search(r"\d+ passed", run(test, "-k", "test_store or test_lora"))
