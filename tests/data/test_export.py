"""Archives from outside: read in place, bounded, never extracted."""

from __future__ import annotations

import io
import json
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

import exports
from repertory.data import export as export_module
from repertory.data.export import open_export
from repertory.data.history import Entry
from repertory.data.readers import open_history
from repertory.errors import InvalidInput


def test_a_bomb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = _zip(tmp_path, {"general/2024-01-01.json": b"0" * (50 << 20)})
    with pytest.raises(InvalidInput, match="expands") as refused, open_export(path):
        pass
    assert refused.value.code == "archive_refused"


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "MAX_FILES", 3)
    for packed in (_zip(tmp_path, {f"{n}.json": b"[]" for n in range(5)}), _folder(tmp_path, 5)):
        with pytest.raises(InvalidInput, match="files"), open_export(packed):
            pass


def test_a_table_of_contents_of_millions_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Files without a byte and without a name: 46 bytes each in the archive, and ten times as much in memory."""
    path, size = tmp_path / "many.zip", 100 << 20
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(4 + size)  # a hole, which takes no room on the disk
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFE, 0xFFFE, size, 4, 0))
    with pytest.raises(InvalidInput, match="table of contents has 100 MiB") as refused, open_export(path):
        pass
    assert refused.value.code == "archive_refused"


def test_more_entries_than_files_may_be_are_refused_before_each_is_an_object(tmp_path: Path) -> None:
    path, count = tmp_path / "many.zip", export_module.MAX_FILES + 1
    contents = (b"PK\x01\x02" + bytes(42)) * count
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFE, 0xFFFE, len(contents), 4, 0)
    path.write_bytes(b"PK\x03\x04" + contents + end)
    tracemalloc.start()
    with pytest.raises(InvalidInput, match="more than 500,000 files"), open_export(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(contents)


def test_more_than_the_total_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "MAX_EXPANDED_BYTES", 10)
    with (
        pytest.raises(InvalidInput, match="expands to more"),
        open_export(_zip(tmp_path, {"a.json": b"[1, 2, 3, 4, 5]"})),
    ):
        pass


def test_files_that_overlap_are_refused(tmp_path: Path) -> None:
    """Every name of the table of contents points at the same packed bytes, as in a bomb without nesting."""
    path = _zip(tmp_path, {"a.json": bytes(range(256)) * 400}, zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "a") as archive:
        original = archive.infolist()[0]
        for number in range(20):
            twin = zipfile.ZipInfo(f"b{number}.json")
            twin.header_offset, twin.CRC = original.header_offset, original.CRC
            twin.file_size, twin.compress_size = original.file_size, original.compress_size
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput, match="overlap"), open_export(path):
        pass


def test_an_encrypted_or_unusual_archive_is_refused(tmp_path: Path) -> None:
    path = _zip(tmp_path, {"a.json": b"[]"}, zipfile.ZIP_LZMA)
    with pytest.raises(InvalidInput, match="unusual"), open_export(path):
        pass
    path = _zip(tmp_path, {"a.json": b"[]"}, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="encrypted"), open_export(path):
        pass


def test_a_size_that_is_a_lie_gives_no_more_than_it_says(tmp_path: Path) -> None:
    path = _zip(tmp_path, {"a.json": b"[" + b"1," * 5000 + b"1]"}, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (100).to_bytes(4, "little")
    path.write_bytes(content)
    with open_export(path) as export:
        (file,) = export.files
        assert len(file.head) <= 100


def test_names_that_lead_outside_write_nothing_and_links_are_not_followed(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped.json", "[]")
        archive.writestr("/etc/absolute.json", "[]")
        archive.writestr(link, "/etc/passwd")
    before = sorted(tmp_path.parent.rglob("*"))
    with open_export(path) as export:
        assert [file.name for file in export.files] == ["../../escaped.json", "/etc/absolute.json"]
        assert [file.head for file in export.files] == [b"[]", b"[]"]
    assert sorted(tmp_path.parent.rglob("*")) == before

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.json").symlink_to("/etc/passwd")
    (folder / "real.json").write_text("[]")
    with open_export(folder) as export:
        assert [file.name for file in export.files] == ["real.json"]


def test_an_archive_inside_an_archive_is_left_alone(tmp_path: Path) -> None:
    inner = _zip(tmp_path, {"a.json": b"[]"}).read_bytes()
    path = tmp_path / "outer.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inner.zip", inner)
    with pytest.raises(InvalidInput, match="no known format"), open_history(path):
        pass


def test_damage_inside_an_archive_is_found_where_it_is(tmp_path: Path) -> None:
    said = [
        Entry(channel=channel, id="1", author_id="u1", author="Ana", text=f"{channel} {'x' * 40}", time=1.7e9)
        for channel in ("aaa", "bbb")
    ]
    path = exports.slack(said, tmp_path)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("aaa/2023-11-14.json").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 60 : offset + 90] = b"\xff" * 30
    path.write_bytes(content)
    with open_history(path, "slack") as history:
        assert [entry.channel for entry in history] == ["bbb"]
    (broken,) = [f for f in history.report.findings.kept if f.code == "file_broken"]
    assert broken.path == "aaa/2023-11-14.json"


@pytest.mark.parametrize("sizes_follow", [False, True])
def test_an_archive_cut_at_any_byte_gives_the_files_before(sizes_follow: bool, tmp_path: Path) -> None:
    """A packer that writes to a stream puts the sizes of a file after it."""
    said = [
        Entry(channel=channel, id="1", author_id="u1", author="Ana", text=f"hi {channel}", time=1.7e9)
        for channel in "abc"
    ]
    path = exports.slack(said, tmp_path)
    if sizes_follow:
        path = _streamed(path)
    content = path.read_bytes()
    cut = tmp_path / "cut.zip"
    before = 3
    for length in range(len(content) - 1, 3, -1):
        cut.write_bytes(content[:length])
        entries, codes = _read_or_refused(cut)
        assert len(entries) <= before, "more is read of less"
        assert codes & {"file_broken", "archive_refused", "export_missing"}
        before = len(entries)
    assert before == 0
    cut.write_bytes(content[: content.index(b"PK\x01\x02")])
    entries, codes = _read_or_refused(cut)
    assert [entry.text for entry in entries] == ["hi a", "hi b", "hi c"]
    assert codes == {"file_broken"}


def test_a_bomb_without_a_table_of_contents_breaks_off(tmp_path: Path) -> None:
    path = _zip(tmp_path, {"general/2024-01-01.json": b'[{"ts": "1.0", "x": "' + b"0" * (50 << 20) + b'"}]'})
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"PK\x01\x02")])
    with open_history(path, "slack") as history:
        assert list(history) == []
    assert any("expands" in finding.what for finding in history.report.findings.kept)


@pytest.mark.parametrize("name", ["slack.zip", "export.zip"])
def test_an_archive_that_is_no_archive_is_an_error_with_a_cure(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 and then nothing of the kind")
    with pytest.raises(InvalidInput) as refused, open_history(tmp_path / name):
        pass
    assert refused.value.code == "archive_refused"
    assert "again" in refused.value.cure


def test_a_large_export_is_read_in_flat_memory(tmp_path: Path) -> None:
    def peak(messages: int) -> int:
        path = tmp_path / f"{messages}.json"
        record = {
            "id": 1,
            "type": "message",
            "from": "Ana",
            "from_id": "user1",
            "date_unixtime": "1600000000",
            "text": "x" * 100,
        }
        with path.open("w") as file:
            file.write('{"name": "n", "id": 1, "messages": [')
            file.write(",".join([json.dumps(record)] * messages))
            file.write("]}")
        tracemalloc.start()
        with open_history(path) as history:
            assert sum(1 for _ in history) == messages
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)  # what is loaded once
    assert peak(20_000) < peak(4_000) + (1 << 20)


def _read_or_refused(path: Path) -> tuple[list[Entry], set[str]]:
    try:
        with open_history(path, "slack") as history:
            return list(history), set(history.report.findings.counts) - {"author_unknown"}
    except InvalidInput as refused:
        return [], {refused.code}


def _streamed(path: Path) -> Path:
    """The same archive as it is written where nobody can go back to the beginning of a file."""

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

        def seek(self, *_: int) -> int:
            raise OSError

    stream = Stream()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as streamed:
        for info in archive.infolist():
            streamed.writestr(info.filename, archive.read(info))
    other = path.with_name("streamed.zip")
    other.write_bytes(stream.getvalue())
    return other


def _zip(folder: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    path = folder / "made.zip"
    path.write_bytes(buffer.getvalue())
    return path


def _folder(parent: Path, count: int) -> Path:
    folder = parent / "many"
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.json").write_text("[]")
    return folder
