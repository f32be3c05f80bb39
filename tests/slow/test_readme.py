"""The README's commands as a newcomer pastes them, against a real service.

A block fenced as `sh` or `python` is meant to be run as it stands; the other fences are not.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from running_service import RunningService

README = Path(__file__).parents[2] / "README.md"
JOB_SECONDS = 240.0

pytestmark = pytest.mark.slow

Paste = Callable[..., Any]


@pytest.fixture(scope="module")
def paste(service: RunningService) -> Paste:
    """Run a block of the README and return the JSON it prints. Its example id stands for the real one."""

    def run(block: str, training_id: str = "") -> Any:
        command = block.replace("train_abc123", training_id)
        # The same address, unless somebody else has the README's port.
        command = command.replace("http://localhost:8300", service.url.replace("127.0.0.1", "localhost"))
        done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, timeout=120, check=True)
        return json.loads(done.stdout)

    return run


def test_the_quick_start_ends_with_a_reply_in_the_new_voice(paste: Paste, service: RunningService) -> None:
    start, _, status, generate = _blocks()
    job = paste(start)
    assert job["training_id"].startswith("train_")
    assert (job["org_id"], job["status"], job["progress"]) == ("org_123", "queued", 0.0)

    done = _finished(lambda: paste(status, job["training_id"]))
    assert (done["status"], done["progress"], done["error"]) == ("completed", 1.0, None)

    reply = paste(generate)
    assert reply["response"].strip()
    assert reply["model_info"]["org_id"] == "org_123"
    assert job["training_id"] in reply["model_info"]["model_path"]

    (snippet,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    script = snippet.replace("http://localhost:8300", service.url)
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.strip()


def test_a_base_model_out_of_reach_ends_as_a_failed_job_that_says_why(paste: Paste) -> None:
    _, start_llama, status, _ = _blocks()
    job = paste(start_llama)
    done = _finished(lambda: paste(status, job["training_id"]))
    assert done["status"] == "failed"
    assert "meta-llama/Llama-2-7b-chat-hf" in done["error"]["message"]
    assert done["error"]["code"]
    assert done["error"]["cure"]


def _blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def _finished(look: Callable[[], Any]) -> Any:
    ends = time.monotonic() + JOB_SECONDS
    while time.monotonic() < ends:
        job = look()
        assert 0.0 <= job["progress"] <= 1.0
        assert (job["progress"] == 1.0) == (job["status"] == "completed")
        if job["status"] in ("completed", "failed", "cancelled"):
            return job
        time.sleep(1)
    pytest.fail(f"the job has not ended after {JOB_SECONDS:.0f} s: {job}")
