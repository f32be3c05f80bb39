from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from time import perf_counter

import pytest
from sqlalchemy import insert, select

from repertory import manifest
from repertory.contracts import BaseKey
from repertory.errors import NotFound, Unavailable
from repertory.service.jobs import Jobs
from repertory.service.lease import Lease
from repertory.service.models import LATEST, Models
from repertory.service.store import Store, jobs, model_versions, now

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


def test_a_list_hashes_nothing_that_nobody_has_used(
    models: Models, publish: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand versions are tens of gigabytes."""
    short, same_size = publish("org"), publish("org")
    (models.folder("org", short) / "adapter_model.safetensors").write_bytes(b"short")
    (models.folder("org", same_size) / "adapter_model.safetensors").write_bytes(b"WEIGHTS")
    assert [version.training_id for version in models.list("org")] == [same_size]
    assert [version.training_id for version in models.versions("org")] == [same_size, short]
    with pytest.raises(Unavailable):
        models.find("org", same_size)  # before it is used, its contents count too


def test_a_list_of_a_thousand_versions_is_quick_and_reads_no_file_twice(
    models: Models, store: Store, publish: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("org")
    with store.write() as connection:
        job = connection.execute(select(jobs)).one()._mapping
        connection.execute(insert(jobs), [dict(job) | {"id": f"train_{at}"} for at in range(1000)])
        for at in range(1000):
            training_id = f"train_{at}"
            folder = models.folder("org", training_id)
            folder.mkdir(parents=True)
            (folder / "adapter_model.safetensors").write_bytes(b"weights")
            files = {"adapter_model.safetensors": {"size": 7, "sha256": sha256(b"weights").hexdigest()}}
            (folder / manifest.MANIFEST).write_text(json.dumps({"files": files}))
            row = {
                "training_id": training_id,
                "org_id": "org",
                "created_at": now(),
                "metadata": {"report": "x" * 20_000},
            }
            connection.execute(insert(model_versions).values(**row, **KEY.model_dump()))
    assert len(models.list(with_metadata=False)) == 1001

    def refuse(_folder: Path, **_how: object) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(manifest, "verify", refuse)
    begin = perf_counter()
    listed = models.list(with_metadata=False)
    assert perf_counter() - begin < 1.0  # a tenth of that on an idle machine; ten times it when every report is parsed
    assert len(listed) == 1001


def test_a_folder_that_may_not_be_read_is_damaged_and_no_error_of_the_list(
    models: Models, publish: Callable[[str], str]
) -> None:
    lost, other = publish("org"), publish("org")
    shutil.rmtree(models.folder("org", lost))
    models.folder("org", lost).symlink_to(models.folder("org", lost))  # a loop: not even root may look
    assert [version.training_id for version in models.list("org")] == [other]
    with pytest.raises(Unavailable, match="cannot be read"):
        models.find("org", lost)


def test_the_base_of_a_voice_is_that_of_the_newest(models: Models, publish: Callable[[str], str]) -> None:
    publish("org")
    assert models.base("org", "fake/base") == models.base(None, "fake/base") == KEY
    assert models.base("others", "fake/base") is None
    assert models.base("org", "fake/other") is None


def test_files_are_hashed_once_while_they_do_not_change(
    models: Models, publish: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("org")
    models.find("org", LATEST)

    def refuse(_folder: Path, **_how: object) -> str:
        raise AssertionError("verified again")

    monkeypatch.setattr(manifest, "verify", refuse)
    models.find("org", LATEST)
