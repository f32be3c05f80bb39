"""A service with real hosts that knows of a hub; for jobs on base models that are there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tiny
from fake_hub import FakeHub, running_hub
from repertory_fixtures import conversation
from running_service import RunningService

QUICK = {"learning_rate": 5e-3, "batch_size": 2, "gradient_accumulation_steps": 2}
CHATS = [conversation(1 + at % 3, at).model_dump(mode="json", exclude_none=True) for at in range(6)]
JOB: dict[str, Any] = {"conversations": CHATS, "num_epochs": 1, "hyperparameters": QUICK}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards."""
    return tiny.make_model(tmp_path_factory.mktemp("hub") / "sharded", "llama-gqa", max_shard_size="100KB")


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


@contextmanager
def service_beside(hub: FakeHub, original: Path, folder: Path, **environment: str) -> Iterator[RunningService]:
    """With `original` as its default base model, which is in its cache."""
    shutil.copytree(original, folder / "cache" / "tiny" / "default")
    running = RunningService(
        folder,
        HOST_MODULE="repertory.model.host",
        MODEL_CACHE_DIR=str(folder / "cache"),
        DEFAULT_BASE_MODEL="tiny/default",
        HF_ENDPOINT=hub.url,
        OMP_NUM_THREADS="1",
        **environment,
    )
    try:
        yield running.until_ready()
    finally:
        code = running.stop()
    assert code == 0
