from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from repertory import manifest
from repertory.contracts import BaseKey
from repertory.errors import NotFound, Unavailable
from repertory.service.jobs import Jobs
from repertory.service.lease import Lease
from repertory.service.models import LATEST, Models
from repertory.service.store import Store

KEY = BaseKey(base_model="fake/base", quantization="none", dtype="fp32")


@pytest.fixture
def models(store: Store, tmp_path: Path) -> Models:
    return Models(store, tmp_path / "finetuned")


@pytest.fixture
def publish(jobs: Jobs, store: Store, models: Models, submit: Callable[..., str]) -> Callable[[str], str]:
    def make(org_id: str) -> str:
        job = jobs.claim(submit(org_id), "us")
        assert job is not None
        folder = models.folder(org_id, job.id)
        manifest.write_durably(folder / "adapter_model.safetensors", b"weights")
        manifest.write_manifest(folder, ["adapter_model.safetensors"])
        Lease(store, job).publish(KEY, {"report": {}})
        return job.id

    return make


def test_latest_is_the_promoted_version(models: Models, publish: Callable[[str], str]) -> None:
    publish("org")
    newer = publish("org")
    version = models.find("org", LATEST)
    assert version.training_id == newer
    assert version.key == KEY
    assert version.adapter.path == str(models.folder("org", newer).resolve())


def test_versions_are_listed_newest_first(models: Models, publish: Callable[[str], str]) -> None:
    older, newer = publish("org"), publish("org")
    assert [version.training_id for version in models.list("org")] == [newer, older]
    assert models.organisations() == {"org"}


def test_an_organisation_without_models_has_none(models: Models) -> None:
    assert models.list("nobody") == []
    assert models.promoted("nobody") is None
    with pytest.raises(NotFound) as missing:
        models.find("nobody", LATEST)
    assert missing.value.code == "model_not_found"


def test_a_version_of_another_organisation_is_not_found(models: Models, publish: Callable[[str], str]) -> None:
    theirs = publish("them")
    publish("us")
    with pytest.raises(NotFound):
        models.find("us", theirs)


@pytest.mark.fault("F10")
def test_a_damaged_version_is_neither_listed_nor_served(models: Models, publish: Callable[[str], str]) -> None:
    training_id = publish("org")
    assert models.find("org", LATEST)
    (models.folder("org", training_id) / "adapter_model.safetensors").write_bytes(b"WEIGHTS")
    assert models.list("org") == []
    assert models.promoted("org") is None
    with pytest.raises(Unavailable) as damaged:
        models.find("org", LATEST)
    assert damaged.value.code == "adapter_damaged"


def test_files_are_hashed_once_while_they_do_not_change(
    models: Models, publish: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("org")
    models.find("org", LATEST)

    def refuse(_folder: Path) -> str:
        raise AssertionError("verified again")

    monkeypatch.setattr(manifest, "verify", refuse)
    models.find("org", LATEST)
