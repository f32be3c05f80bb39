"""Words taken from what a job was trained on, whatever moment the process ends at; and the mark on its version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from repertory import manifest
from repertory.data.conversations import Conversation, Message
from repertory.data.preparation.identity import hashed
from repertory.data.prepare import read_conversations, read_numbered
from repertory.service.datasets import CONSENT, CONVERSATIONS, Datasets

TEXTS = ["first words", "the walrus", "last words"]


@pytest.fixture
def job(datasets: Datasets) -> str:
    """Trained on three conversations, the second with words of the author `b`."""
    said = [Conversation(messages=[Message(role="assistant", content=text)]) for text in TEXTS]
    datasets.write_pending("org", "train_1", said, {"counts": {"little_data": 1}})
    folder = datasets.settle("org", "train_1")
    consent = [["a"], ["a", "b"], ["a"]]
    (folder / CONSENT).write_text("".join(f"{json.dumps(authors)}\n" for authors in consent))
    (folder / "report.json").write_text('{"authors": ["Walrus"]}')
    manifest.write_manifest(folder, [CONSENT, CONVERSATIONS, "report.json"])
    return "train_1"


def texts(datasets: Datasets, job: str) -> dict[int, str]:
    kept = read_numbered(datasets.conversations_path("org", job))
    return {at: conversation.messages[0].content for at, conversation in kept.items()}


def remains(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and b"walrus" in path.read_bytes().lower()]


def test_what_is_left_keeps_its_number(datasets: Datasets, job: str, tmp_path: Path) -> None:
    datasets.forget("org", job, "b")
    assert texts(datasets, job) == {0: "first words", 2: "last words"}
    assert len(read_conversations(datasets.conversations_path("org", job))) == 2
    assert manifest.verify(datasets.folder("org", job)) is None
    assert datasets.with_words_of("org", "b") == {}
    assert datasets.with_words_of("org", "a") == {job: 2}
    assert datasets.findings("org", job) == {"counts": {"little_data": 1}}
    assert remains(tmp_path) == []
    assert [path.name for path in datasets.folder("org", job).parent.iterdir()] == [job]


@pytest.mark.parametrize("ends_at", range(1, 9))
def test_an_end_at_any_step_leaves_the_old_or_the_new(
    ends_at: int, datasets: Datasets, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its writes, renames and removals the process is gone; then the service starts, and is asked again."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == ends_at:
            raise KeyboardInterrupt

    rename, remove, write = Path.rename, shutil.rmtree, manifest.write_durably
    with monkeypatch.context() as dying:
        dying.setattr(Path, "rename", lambda *about: (step(), rename(*about))[1])
        dying.setattr(shutil, "rmtree", lambda *about, **how: (step(), remove(*about, **how))[1])
        dying.setattr("repertory.service.datasets.write_durably", lambda *about: (step(), write(*about))[1])
        with pytest.raises(KeyboardInterrupt):
            datasets.forget("org", job, "b")
    datasets.sweep("train_", {job}.__contains__, is_alone=True)
    old, new = dict(enumerate(TEXTS)), {0: TEXTS[0], 2: TEXTS[2]}
    found = texts(datasets, job)
    assert found in (old, new)
    if found == old:
        assert datasets.with_words_of("org", "b") == {job: 1}
        datasets.forget("org", job, "b")
        datasets.sweep("train_", {job}.__contains__, is_alone=True)
    assert texts(datasets, job) == new
    assert remains(tmp_path) == []


def test_conversations_are_recorded_where_they_say_whose_words_they_are(datasets: Datasets, job: str) -> None:
    said = Conversation(messages=[Message(role="assistant", content="yes")])
    for training_id, authors in {"train_told": ["x", "y"], "train_nobody": [], "train_untold": None}.items():
        own = said.model_copy(update={"authors": authors})
        datasets.write_pending("org", training_id, [own, said.model_copy(update={"authors": ["x"]})], {})
        stored = datasets.conversations_path("org", training_id)
        assert read_conversations(stored) == [said, said]
        assert "x" not in json.loads(stored.read_text().splitlines()[1])
    assert datasets.with_words_of("org", hashed("y", "org")) == {"train_told": 1}
    assert datasets.with_words_of("org", hashed("y", "other")) == {}
    assert datasets.unrecorded("org") == ["train_untold"]
    datasets.forget("org", "train_untold", hashed("x", "org"))
    assert datasets.unrecorded("org") == ["train_untold"]
    (datasets.folder("org", job) / CONSENT).unlink()  # as before there was a record
    assert datasets.unrecorded("org") == [job, "train_untold"]


def test_a_sealed_folder_is_amended_and_its_damage_stays(tmp_path: Path) -> None:
    for name in ("report.json", "adapter"):
        (tmp_path / name).write_bytes(b"{}")
    manifest.write_manifest(tmp_path, ["report.json", "adapter"])
    manifest.amend(tmp_path, {"report.json": lambda _: b"[]", "not_there.json": lambda _: b"[]"})
    assert ((tmp_path / "report.json").read_bytes(), manifest.verify(tmp_path)) == (b"[]", None)
    (tmp_path / "adapter").write_bytes(b"<>")
    manifest.amend(tmp_path, {"report.json": lambda _: b"{}"})
    assert "adapter" in (manifest.verify(tmp_path) or "")
