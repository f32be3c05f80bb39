"""A base model that only the hub knows: what of it is told when a job is submitted. With real service and hosts."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_hub import FakeHub
from hub_service import JOB, service_beside
from repertory import architectures
from running_service import RunningService


@pytest.fixture(scope="module")
def service(hub: FakeHub, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with service_beside(hub, original, tmp_path_factory.mktemp("service")) as running:
        yield running


def test_a_sharded_model_becomes_a_voice_that_knows_its_commit(
    service: RunningService, hub: FakeHub, original: Path
) -> None:
    commit = hub.add("acme/sharded", original)
    training_id = service.trained("sharded", base_model="acme/sharded", **JOB)
    metadata = service.status(training_id)["metadata"]
    assert (metadata["base_model"], metadata["revision"]) == ("acme/sharded", commit)
    described = json.loads((service.folder / f"models/finetuned/sharded/{training_id}/adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == ("acme/sharded", commit)
    answer = service.client.post("/generate?org_id=sharded", json={"message": "Hello!", "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model_info"]["metadata"]["revision"] == commit


def refusal(service: RunningService, base_model: str) -> dict[str, Any]:
    answer = service.client.post("/training/start", json={"org_id": "refused", "base_model": base_model, **JOB})
    assert answer.status_code == 422, answer.text
    assert service.client.get("/training/jobs/refused").json() == {"jobs": []}
    error: dict[str, Any] = answer.json()["error"]
    assert error["param"] == "base_model"
    return error


def mamba(original: Path, folder: Path) -> Path:
    """A repository of an architecture that is not supported."""
    shutil.copytree(original, folder)
    (folder / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    return folder


def test_an_unsupported_architecture_is_refused_at_submit_with_the_list(
    service: RunningService, hub: FakeHub, original: Path, tmp_path: Path
) -> None:
    hub.add("acme/mamba", mamba(original, tmp_path / "mamba"))
    error = refusal(service, "acme/mamba")
    assert error["code"] == "unsupported_architecture"
    assert all(name in error["cure"] for name in architectures.SUPPORTED.values())
    assert not (service.folder / "cache/hub/acme/mamba").exists()


def test_a_model_or_revision_that_the_hub_has_not_is_refused_at_submit(
    service: RunningService, hub: FakeHub, original: Path
) -> None:
    hub.add("acme/known", original)
    assert refusal(service, "acme/nowhere")["code"] == "base_model_not_found"
    assert refusal(service, "acme/known@v9")["code"] == "revision_not_found"


def test_a_hub_that_is_silent_at_submit_refuses_when_the_job_is_prepared(
    service: RunningService, hub: FakeHub, original: Path, tmp_path: Path
) -> None:
    hub.add("acme/mute", mamba(original, tmp_path / "mamba"))
    hub.is_silent = True
    began = time.monotonic()
    training_id = service.train("silent", base_model="acme/mute", **JOB)
    assert time.monotonic() - began < 10
    hub.is_silent = False
    error = service.until(training_id, "failed", "completed")["error"]
    assert error["code"] == "unsupported_architecture"
    assert all(name in error["cure"] for name in architectures.SUPPORTED.values())
