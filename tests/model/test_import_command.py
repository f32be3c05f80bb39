"""`repertory import` on a tiny base model: tables, preview, what is written, and how it refuses."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

import exports
from repertory import cli, importer
from repertory.data import imports
from repertory.data.findings import CODES
from repertory.data.history import Entry
from repertory.data.imports import ImportOptions
from repertory.data.readers import FORMATS
from repertory.errors import InvalidInput
from repertory.service.api.body import MAX_BODY_BYTES
from repertory.service.api.schemas import StartTraining

Import = Callable[..., Result]


@pytest.fixture
def imported(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_CACHE_DIR", str(cache))
    monkeypatch.setenv("DEFAULT_BASE_MODEL", "tiny/llama-gqa")
    monkeypatch.setenv("MAX_SEQ_LENGTH", "128")
    return lambda *arguments: CliRunner().invoke(cli.app, ["import", *map(str, arguments)])


@pytest.fixture
def export(tmp_path: Path) -> Path:
    entries = []
    for number in range(40):
        for at, (author, text) in enumerate((("bob", f"question {number}?"), ("ana", f"answer {number} to bob@x.yz"))):
            time = 1_700_000_000.0 + 7200 * number + 60 * at
            entries.append(
                Entry(channel="7", id=f"{2 * number + at + 1}", author_id=author, author=author, text=text, time=time)
            )
    return exports.telegram(entries, tmp_path)


def test_without_a_persona_it_shows_who_speaks(imported: Import, export: Path) -> None:
    shown = imported(export)
    assert shown.exit_code == 0
    assert "telegram: 80 messages, 1 channels" in shown.stdout
    assert "bob" in shown.stdout
    assert "--persona NAME" in shown.stdout


def test_what_it_writes_can_be_sent_to_the_service(imported: Import, export: Path, tmp_path: Path) -> None:
    shown = imported(export, "--persona", "ana", "--org", "org_1", "--gap", "30m")
    assert shown.exit_code == 0, shown.output
    body = StartTraining.model_validate_json((tmp_path / "ana.json").read_text())
    assert body.org_id == "org_1"
    assert body.system_prompt == "You are ana, chatting."
    assert [one.authors for one in body.conversations or []] == [["ana", "bob"]] * 40
    assert "-d @ana.json" in shown.stdout
    assert "EMAIL 40" in shown.stdout
    assert "30 min (given)" in shown.stdout
    assert re.search(r"authors +bob 40, ana 40", shown.stdout)
    assert re.search(r"words +.*answer", shown.stdout)
    assert not list(tmp_path.glob("*.partial"))


def test_a_dry_run_writes_nothing_and_the_preview_marks_what_is_learned(
    imported: Import, export: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    shown = imported(export, "--persona", "ana", "--dry-run", "--preview", "2")
    assert shown.exit_code == 0, shown.output
    assert sorted(tmp_path.rglob("*")) == before
    assert "<|im_start|>assistant\n⟦answer 0 to <EMAIL_1><|im_end|>⟧\n" in shown.stdout
    assert shown.stdout.count("You are ana, chatting.") == 2
    assert "Tokens of a row (tiny/llama-gqa)" in shown.stdout


def test_the_report_as_json(imported: Import, export: Path) -> None:
    shown = imported(export, "--persona", "ana", "--dry-run", "--json")
    report = json.loads(shown.stdout)
    assert report["trained_turns"] == 40
    assert report["stages"][0] == {"name": "reading", "unit": "messages", "before": 80, "after": 80, "dropped": {}}
    assert report["findings"]["counts"] == {"little_data": 1}
    assert report["tokens"]["measured"] == 40
    assert report["tokens"]["max_tokens"] == 128
    assert [author["messages"] for author in report["authors"]] == [40, 40]


def test_an_assistant_s_conversations_need_no_persona(imported: Import, tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "hello")]
    said = [Entry(channel="1", id=f"{n}", author_id=r, author=r, text=t) for n, (r, t) in enumerate(turns)]
    shown = imported(exports.sharegpt(said, tmp_path))
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "assistant.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--persona", "anna"], "persona_unknown"),
        (["--persona", "ana", "--gap", "soon"], "invalid_gap"),
        (["--persona", "ana", "--format", "word"], "format_unknown"),
        (["--persona", "ana", "--timezone", "Mars/Phobos"], "invalid_timezone"),
        (["--persona", "ana", "--timezone", "../../etc/passwd"], "invalid_timezone"),
        (["--persona", "ana", "--column", "author"], "invalid_column"),
        (["--persona", "ana", "--live-since", "yesterday"], "invalid_date"),
        (["--persona", "ana", "--exclude", "ana"], "persona_excluded"),
    ],
)
def test_what_is_refused_has_a_code_and_a_cure(
    arguments: list[str], code: str, imported: Import, export: Path, tmp_path: Path
) -> None:
    refused = imported(export, *arguments)
    assert refused.exit_code == 5
    assert refused.stderr.startswith(f"{code}: ")
    assert "Cure: " in refused.stderr
    assert not list(tmp_path.glob("*.json.partial"))


def test_cures_name_flags_here_and_fields_over_http(imported: Import, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("author,text,time\nana,hi,2024-07-01 12:00:00\n")
    shown = imported(tmp_path / "a.csv").stdout
    assert "--timezone Europe/Berlin" in shown
    assert "timezone=" not in shown
    (tmp_path / "chat.txt").write_text("3/4/23, 10:00 - Ana: a\n")
    assert "--day-first or --month-first" in imported(tmp_path / "chat.txt").stderr
    (tmp_path / "b.csv").write_text("wer,was\nana,x\n")
    assert "--column author=HEADER" in imported(tmp_path / "b.csv", "--format", "csv").stderr
    flags = [code for code, about in CODES.items() if re.search(r"(^|\s)--[a-z]", about.cure)]
    assert flags == []
    fields = [name for about in CODES.values() for name in re.findall(r"\b(\w+)=", about.cure)]
    assert set(fields) <= set(ImportOptions.model_fields)
    assert not [about.cure for about in CODES.values() if re.search(r"\b\w+=", importer.with_flags(about.cure))]


def test_a_path_that_is_not_there(imported: Import) -> None:
    refused = imported("nowhere.zip", "--persona", "ana")
    assert (refused.exit_code, refused.stderr.split(":")[0]) == (5, "export_missing")


@pytest.mark.parametrize(("written", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1 d", 86_400)])
def test_pauses(written: str, seconds: int) -> None:
    assert imports.seconds(written) == seconds
    with pytest.raises(InvalidInput):
        imports.seconds("0m")


def test_rows_that_do_not_fit_are_counted(imported: Import, tmp_path: Path) -> None:
    said = []
    for channel, length in (("1", 5), ("2", 60), ("3", 400)):
        for number, (role, words) in enumerate(
            (("user", 3), ("assistant", 2), ("user", length), ("assistant", length))
        ):
            text = " ".join(f"{channel}{number}w{at}" for at in range(words))
            said.append(Entry(channel=channel, id=f"{number}", author_id=role, author=role, text=text))
    shown = imported(exports.openai_jsonl(said, tmp_path), "--json", "--dry-run")
    tokens = json.loads(shown.stdout)["tokens"]
    assert (tokens["measured"], tokens["shortened"] + tokens["left_out"]) == (3, 2)
    assert tokens["left_out"] >= 1


def test_a_body_that_the_service_would_refuse_is_told(
    imported: Import, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert importer.MAX_BODY_BYTES == MAX_BODY_BYTES
    monkeypatch.setattr(importer, "MAX_BODY_BYTES", 100)
    assert "import less of the history" in imported(export, "--persona", "ana").stdout


def test_every_format_can_be_named(imported: Import, export: Path) -> None:
    for name in FORMATS:
        assert imported(export, "--format", name, "--dry-run").exit_code in (0, 5)


def test_a_terminal_gets_a_bar_with_rate_and_time_left(export: Path, tmp_path: Path) -> None:
    rows = "".join(f"ana,message number {number} of very many,{1_700_000_000 + number}\n" for number in range(60_000))
    (tmp_path / "long.csv").write_text(f"author,text,time\n{rows}")
    shown = _on_a_terminal([sys.executable, "-m", "repertory.cli", "import", "long.csv"], tmp_path)
    assert re.search(r"reading .*\d+\.\d/\d+\.\d MB .*\d+\.\d MB/s .*\d:\d\d:\d\d", shown), shown
    assert "csv: 60,000 messages" in shown


def _on_a_terminal(command: list[str], folder: Path) -> str:
    """What it writes where its standard error is a terminal; it is there a while for the bar to be drawn again."""
    main, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    with process:
        while True:
            try:
                shown += os.read(main, 65536)
            except OSError:  # EIO: nobody holds the other end any more
                break
    os.close(main)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
