"""Somebody's words taken out of an export, whatever it was; and a history that Repertory wrote itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import exports
from repertory.data.history import Entry
from repertory.data.imports import ImportOptions, ImportOrder
from repertory.data.preparation import worker
from repertory.data.preparation.forgetting import FORGET, REWRITTEN, forget, source
from repertory.data.readers import open_history, rewritten
from repertory.data.readers.reading import ReadOptions

SAID = [
    ("7", "Bob", "hello Carla, hello carla!", None),
    ("8", "Carla", "my walrus", None),
    ("7", "Bob", "> my walrus\nCarlas scarlatina", "2"),
    ("8", "Carla", "walrus again", "3"),
]


def dataset(folder: Path, write: exports.Write) -> Path:
    entries = [
        Entry("7", f"{n}", author_id, author, text, 1.7e9 + 60 * n, reply_to=reply)
        for n, (author_id, author, text, reply) in enumerate(SAID, 1)
    ]
    path = write(entries, folder / "made")
    (folder / "export").mkdir()
    path.rename(folder / "export" / path.name)
    (folder / FORGET).write_text(json.dumps(["8"]))
    return folder


@pytest.mark.parametrize("write", [exports.discord, exports.slack, exports.telegram, exports.generic_csv])
def test_words_names_and_quotes_go_and_the_rest_stays(write: exports.Write, tmp_path: Path) -> None:
    folder = dataset(tmp_path, write)
    author = "Carla" if write is exports.generic_csv else "8"
    (folder / FORGET).write_text(json.dumps([author]))
    forget(folder, "auto", ReadOptions())
    assert sorted(path.name for path in folder.iterdir() if path.name != "made") == [REWRITTEN]
    left = (folder / REWRITTEN).read_text().lower()
    assert "walrus" not in left
    assert 'carla"' not in left
    with open_history(*source(folder)[:1]) as history:
        entries = list(history)
    assert [entry.text for entry in entries] == ["hello Somebody, hello Somebody!", "Carlas scarlatina"]
    assert history.report.format == {exports.generic_csv: "csv"}.get(write, write.__name__)
    forget(folder, "auto", ReadOptions())  # nothing is left to do
    assert (folder / REWRITTEN).read_text().lower() == left


@pytest.mark.parametrize("cut_after", ["before", "first", "rewritten"])
def test_interrupted_it_is_done_again(cut_after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dataset(tmp_path, exports.telegram)
    written = 0
    write = rewritten.write

    def dying(*about: object) -> None:
        nonlocal written
        if cut_after == "before" or (cut_after == "first" and written == 1):
            raise KeyboardInterrupt
        write(*about)  # type: ignore[arg-type]
        written += 1
        if cut_after == "rewritten" and written == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rewritten, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            forget(folder, "auto", ReadOptions())
    assert (folder / FORGET).exists()
    order = ImportOrder(org_id="a", options=ImportOptions(persona=["Bob"], exclude=["Carla"]))
    end = worker.run(folder, order, lambda event: None)
    assert end.error is not None
    assert end.error.code == "nothing_to_learn"  # Bob is alone now
    assert not list(folder.rglob("export"))
    assert not (folder / FORGET).exists()
    files = [path for path in folder.rglob("*") if path.is_file() and "made" not in path.parts]
    assert not [path for path in files if b"walrus" in path.read_bytes()]


def test_what_a_reader_lacks_is_told_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = exports.parquet([Entry("1", "1", "user", "user", "hi")], tmp_path)
    (tmp_path / "export").mkdir()
    path.rename(tmp_path / "export" / path.name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    end = worker.run(tmp_path, ImportOrder(org_id="a", options=ImportOptions()), lambda event: None)
    assert end.error is not None
    assert (end.status, end.error.code) == ("failed", "package_missing")
    assert "pip install" in end.error.cure


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_written_is_read_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
    entry = st.builds(
        Entry,
        channel=text,
        id=text,
        author_id=text,
        author=text,
        text=text,
        time=st.none() | st.floats(0, 2e9),
        kind=st.sampled_from(["said", "service", "prompt", "deleted"]),
        thread=st.none() | text,
        reply_to=st.none() | text,
        is_bot=st.booleans(),
        is_trained=st.booleans(),
        mentions=st.lists(text, max_size=2).map(tuple),
        reactions=st.lists(st.tuples(text, st.integers(0, 9)), max_size=2).map(tuple),
    )
    entries = data.draw(st.lists(entry, max_size=4))
    path = tmp_path_factory.mktemp("history") / "h.jsonl"
    rewritten.write(path, "telegram", entries)
    with open_history(path) as history:
        read = list(history)
    for number, one in enumerate(entries, 1):
        one.file, one.line = path.name, number
    assert read == entries
    assert history.report.format == "telegram"
    content = path.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 40)):  # cut anywhere: what is whole
        path.write_bytes(content[:length])
        with open_history(path, "history") as history:
            cut = list(history)
        assert [one.text for one in cut] == [one.text for one in entries[: len(cut)]]
