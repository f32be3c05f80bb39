"""Downloads from the fake hub: fixtures and questions that several test files have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny
from fake_hub import TOKEN, FakeHub, running_hub
from repertory.contracts import BaseKey
from repertory.errors import BaseModelUnavailable
from repertory.model import transfer, weights
from repertory.settings import Settings

NAME = "acme/tiny-chat"


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards."""
    return tiny.make_model(tmp_path_factory.mktemp("sharded") / "model", "llama-gqa", max_shard_size="100KB")


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("single") / "model", "llama-gqa")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(transfer, "TELL_SECONDS", 0.0)


def settings_for(hub: FakeHub, cache: Path, **more: object) -> Settings:
    values = {"hf_endpoint": hub.url, "model_cache_dir": cache} | more
    return Settings(_env_file=None).model_copy(update=values)


def key(revision: str | None = None, name: str = NAME) -> BaseKey:
    return BaseKey(base_model=name, revision=revision, quantization="none", dtype="fp32")


def fetch(settings: Settings, revision: str | None = None) -> weights.Located:
    return weights.locate(key(revision), settings)


def refusal(settings: Settings, revision: str | None = None) -> BaseModelUnavailable:
    with pytest.raises(BaseModelUnavailable) as refused:
        fetch(settings, revision)
    assert TOKEN not in f"{refused.value.message} {refused.value.cure}"
    return refused.value


def same_files(folder: Path, original: Path) -> bool:
    weights_of = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return bool(weights_of) and weights_of == {path.name: path.read_bytes() for path in original.glob("*.safetensors")}
