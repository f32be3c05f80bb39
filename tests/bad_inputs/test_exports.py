"""Rows of the catalogue about files that are sent: JSONL, archives, uploads. tests/data has the details."""

from __future__ import annotations

import io
import json
import socket
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from refusals import error_of
from repertory import cli, importer
from repertory.data.export import open_export
from repertory.data.readers import open_history
from repertory.data.readers.reading import ReadOptions
from repertory.errors import InvalidInput
from running_service import RunningService, eventually


def line(*said: str) -> str:
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    return json.dumps({"messages": turns})


def read(path: Path) -> tuple[list[str], dict[str, int]]:
    """The texts of an export, and how often each finding was made."""
    with open_history(path, "messages") as history:
        texts = [entry.text for entry in history]
    return texts, dict(history.report.findings.counts)


def written(folder: Path, content: bytes | str, name: str = "chats.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_row_061_mojibake_is_counted_and_kept(tmp_path: Path) -> None:
    texts, _ = read(written(tmp_path, line("CafÃ© â€œhiâ€\x9d", "yes")))
    assert texts[0] == "CafÃ© â€œhiâ€\x9d"


def test_row_063_names_in_a_terminal_carry_no_escapes(tmp_path: Path) -> None:
    name = "\x1b]0;owned\x07\x1b[31mAna\x9b1m"
    path = written(tmp_path, f"author,content\n{name},ahoy\n", "chat.csv")
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system=None)
    importer.authors(path, "csv", ReadOptions(columns={"author": "author", "text": "content"}), console)
    assert "Ana" in shown.getvalue()
    assert not [escape for escape in ("\x1b]", "\x1b[31m", "\x07", "\x9b") if escape in shown.getvalue()]


def test_row_063_names_in_an_error_on_a_terminal_carry_no_escapes(tmp_path: Path) -> None:
    path = written(tmp_path, "author,text\n\x1b]0;owned\x07\x1b[31mAna\x9b1m,ahoy\n", "chat.csv")
    refused = CliRunner().invoke(cli.app, ["import", str(path), "--persona", "Ann"])
    assert refused.exit_code == 5
    assert "Ana" in refused.stderr
    assert not [escape for escape in ("\x1b", "\x07", "\x9b") if escape in refused.stderr]


def test_row_066_conversations_without_messages_are_left_out_of_an_import(tmp_path: Path) -> None:
    texts, _ = read(written(tmp_path, "\n".join([line("hi", "hello"), '{"messages": []}', line("a", "b")])))
    assert texts == ["hi", "hello", "a", "b"]


JSONL: dict[str, tuple[bytes, list[str], dict[str, int]]] = {
    "098 blank lines": (f"\n\n{line('a', 'b')}\n\n".encode(), ["a", "b"], {}),
    "098 byte order mark": (b"\xef\xbb\xbf" + line("a", "b").encode(), ["a", "b"], {}),
    "098 ends of lines": (f"{line('a', 'b')}\r\n{line('c', 'd')}\r\n".encode(), ["a", "b", "c", "d"], {}),
    "098 a bad line": (
        f"{line('a', 'b')}\n{{oops\n{line('c', 'd')}\n".encode(),
        ["a", "b", "c", "d"],
        {"message_malformed": 1},
    ),
}


@pytest.mark.parametrize("case", JSONL)
def test_lines_of_json_are_read_and_what_is_none_is_told(tmp_path: Path, case: str) -> None:
    content, expected, findings = JSONL[case]
    texts, found = read(written(tmp_path, content))
    assert texts == expected
    assert found == findings


def test_row_098_a_line_without_an_end_costs_itself_alone(tmp_path: Path) -> None:
    endless = '{"messages": [{"role": "user", "content": "' + "x" * (30 << 20)
    texts, found = read(written(tmp_path, f"{line('a', 'b')}\n{endless}"))
    assert texts == ["a", "b"]
    assert found


def test_row_098_csv_that_is_called_jsonl_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as refused, open_history(written(tmp_path, "author,text\nana,ahoy\n")):
        pass
    assert refused.value.code == "format_not_recognised"


def archive(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members:
            packed.writestr(name, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


CHAT = line("a", "b").encode()


def test_row_099_names_that_lead_outside_are_names_and_links_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "inside"
    root.mkdir()
    names = ["../../evil.jsonl", "/etc/evil.jsonl", "C:\\evil.jsonl", "a/\xe9.jsonl"]
    path = archive(root / "export.zip", *[(name, CHAT) for name in names], (link("passwd"), b"/etc/passwd"))
    texts, _ = read(path)
    assert texts == ["a", "b"] * len(names)
    assert [each.relative_to(tmp_path).as_posix() for each in tmp_path.rglob("*")] == ["inside", "inside/export.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_row_099_a_name_that_is_there_twice_is_read_twice(tmp_path: Path) -> None:
    texts, _ = read(
        archive(tmp_path / "x.zip", ("a.jsonl", line("a", "b").encode()), ("a.jsonl", line("c", "d").encode()))
    )
    assert sorted(texts) == ["a", "b", "c", "d"]


def bomb(path: Path) -> Path:
    return archive(path, ("a.jsonl", b" " * (50 << 20)))


def encrypted(path: Path) -> Path:
    archive(path, ("a.jsonl", CHAT))
    packed = bytearray(path.read_bytes())
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        packed[packed.index(mark) + (6 if mark == b"PK\x03\x04" else 8)] |= 1
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("make", [bomb, encrypted])
def test_row_099_an_archive_that_would_do_harm_is_not_opened(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(InvalidInput) as refused, open_export(make(tmp_path / "export.zip")):
        pass
    assert refused.value.code == "archive_refused"


def test_row_099_an_archive_in_an_archive_is_left_alone(tmp_path: Path) -> None:
    inner = archive(tmp_path / "inner.zip", ("b.jsonl", CHAT)).read_bytes()
    texts, _ = read(archive(tmp_path / "outer.zip", ("a.jsonl", CHAT), ("inner.zip", inner)))
    assert texts == ["a", "b"]


# Uploads


def send(service: RunningService, content: bytes, name: str = "export.zip", kind: str = "application/zip") -> Any:
    return service.client.post("/datasets", data={"org_id": "uploads"}, files={"file": (name, content, kind)})


def uploads(service: RunningService) -> list[Path]:
    return list((service.folder / "models/datasets/_uploads").glob("*"))


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [(b"", "empty.zip", "application/zip"), (b"\x89PNG\r\n\x1a\n" * 9, "chat.json", "application/json")],
    ids=["nothing", "a picture that says it is JSON"],
)
def test_row_100_what_is_no_export_is_an_error_of_its_dataset(
    service: RunningService, content: bytes, name: str, kind: str
) -> None:
    answer = send(service, content, name, kind)
    if answer.status_code != 202:
        assert answer.status_code == 422
        assert error_of(answer)
        return
    at = f"/datasets/{answer.json()['dataset_id']}"
    ended = eventually(lambda: (now := service.client.get(at).json())["status"] in ("failed", "ready") and now)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "format_not_recognised")


def test_row_100_an_upload_that_breaks_off_leaves_nothing(service: RunningService) -> None:
    head = (
        "POST /api/v1/datasets HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="x.zip"\r\n\r\nPK'
    )
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode())
        eventually(lambda: uploads(service))
    eventually(lambda: not uploads(service))


def test_row_100_a_file_that_is_two_things_is_read_as_the_one_that_it_begins_as(tmp_path: Path) -> None:
    packed = archive(tmp_path / "inner.zip", ("a.jsonl", line("hidden", "words").encode())).read_bytes()
    texts, _ = read(written(tmp_path, CHAT + b"\n" + packed))
    assert texts[:2] == ["a", "b"]
    assert "hidden" not in texts
