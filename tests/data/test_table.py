"""What plain CSV is known to get importers wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from exports import read
from repertory.data.findings import MAX_FINDINGS
from repertory.data.readers import open_history
from repertory.data.readers.reading import ReadOptions
from repertory.errors import InvalidInput


def test_csv_columns_are_known_by_name_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('Author;Timestamp;Text\nana;1714564800000;"x;\ny"\nbob;2024-05-01T12:00:01Z;z\n')
    entries, _ = read(tmp_path / "a.csv")
    assert [(entry.author, entry.text, entry.time) for entry in entries] == [
        ("ana", "x;\ny", 1714564800),
        ("bob", "z", 1714564801),
    ]
    (tmp_path / "b.csv").write_text("wer,was\nana,x\n")
    with pytest.raises(InvalidInput, match="no known format"):
        read(tmp_path / "b.csv")
    with (
        pytest.raises(InvalidInput, match="author, text") as refused,
        open_history(tmp_path / "b.csv", "csv") as history,
    ):
        list(history)
    assert "column=author=HEADER" in refused.value.cure
    options = ReadOptions(columns={"author": "wer", "text": "was"})
    with open_history(tmp_path / "b.csv", "csv", options) as history:
        assert [(entry.author, entry.text) for entry in history] == [("ana", "x")]


def test_csv_rows_without_an_author_or_with_a_broken_time_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("author,text,time\n,x,\nana\nana,x,yesterday\nana,ok,\n")
    entries, report = read(tmp_path / "a.csv")
    assert [entry.text for entry in entries] == ["ok"]
    assert [finding.line for finding in report.findings.kept] == [1, 2, 3]


def test_csv_that_ends_within_a_cell_says_so(tmp_path: Path) -> None:
    rows = 'author,text\nana,a 5" disk\nana,"two\nlines"\nana,"and "" th'
    (tmp_path / "a.csv").write_text(rows)
    entries, report = read(tmp_path / "a.csv")
    assert [entry.text for entry in entries] == ['a 5" disk', "two\nlines", 'and " th']
    assert [(f.code, f.line) for f in report.findings.kept] == [("file_broken", 5)]
    (tmp_path / "a.csv").write_text('author,text\nana,"x"\nana,a 5" disk')
    assert not read(tmp_path / "a.csv")[1].findings.kept


def test_findings_are_kept_up_to_a_thousand_and_counted_beyond(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("author,text\n" + ",x\n" * (MAX_FINDINGS + 500))
    _, report = read(tmp_path / "a.csv")
    assert len(report.findings.kept) == MAX_FINDINGS
    assert report.findings.counts["message_malformed"] == MAX_FINDINGS + 500
