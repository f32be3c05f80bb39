"""What Twitch's and IRC's logs are known to get importers wrong."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from exports import read, write_json


def test_twitch_notices_deleted_users_and_emotes(tmp_path: Path) -> None:
    base = {"_id": "1", "created_at": "2024-05-01T12:00:00.5Z", "content_offset_seconds": 1}
    ana = {"_id": "7", "display_name": "Ana", "name": "ana"}
    comments = [
        {
            **base,
            "commenter": ana,
            "message": {"body": "Kappa hi", "user_badges": [{"_id": "bot-badge", "version": "1"}]},
        },
        {**base, "commenter": None, "message": {"body": "gone", "user_badges": None}},
        {**base, "commenter": ana, "message": {"body": "Ana subscribed", "user_notice_params": {"msg_id": "sub"}}},
    ]
    entries, _ = read(
        write_json(tmp_path / "v.json", {"streamer": {}, "video": {}, "comments": comments, "embeddedData": None})
    )
    assert [(entry.kind, entry.text, entry.author_id, entry.is_bot) for entry in entries] == [
        ("said", "Kappa hi", "7", True),
        ("said", "gone", "deleted", False),
        ("service", "Ana subscribed", "7", False),
    ]
    assert entries[0].time == 1714564800.5


def test_irc_of_irssi_with_days_in_lines_of_their_own(tmp_path: Path) -> None:
    log = (
        b"--- Log opened Wed May 01 23:50:00 2024\n"
        b"23:50 -!- ana [~a@host] has joined #x\n"
        b"23:51 <@ana> caf\xe9\n"
        b"23:52 < bob> ana: caf\xc3\xa9\n"
        b"23:53  * ana waves\n"
        b"--- Day changed Thu May 02 2024\n"
        b"00:01 -!- ana is now known as ana_away\n"
        b"00:02 <+ana_away> hi\n"
    )
    (tmp_path / "x.log").write_bytes(log)
    entries, _ = read(tmp_path / "x.log")
    said = [entry for entry in entries if entry.kind == "said"]
    assert [(entry.author, entry.author_id, entry.text) for entry in said] == [
        ("ana", "ana", "café"),
        ("bob", "bob", "ana: café"),
        ("ana", "ana", "/me waves"),
        ("ana_away", "ana", "hi"),
    ]
    assert [datetime.fromtimestamp(entry.time or 0, UTC).isoformat() for entry in said][::3] == [
        "2024-05-01T23:51:00+00:00",
        "2024-05-02T00:02:00+00:00",
    ]


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("znc_2024-05-01.log", "[12:00:01] <ana> hi", "2024-05-01T12:00:01+00:00"),
        ("x.weechatlog", "2024-05-01 12:00:01\t@ana\thi", "2024-05-01T12:00:01+00:00"),
        ("x.log", "2024-05-01T12:00:01 <ana> hi", "2024-05-01T12:00:01+00:00"),
        ("x.log", "01-May-2024 12:00:01 <ana> hi", "2024-05-01T12:00:01+00:00"),
        ("x-2024.log", "May 01 12:00:01 <ana> hi", "1970-05-01T12:00:01+00:00"),
        ("x.log", "1714564801 <ana> hi", "2024-05-01T12:00:01+00:00"),
        ("x.log", "12:00 <ana!~a@host> hi", "1970-01-01T12:00:00+00:00"),
    ],
)
def test_irc_of_other_clients(name: str, line: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"{line}\n{line}\n")
    entries, report = read(tmp_path / name)
    assert [(entry.author, entry.text) for entry in entries] == [("ana", "hi")] * 2
    assert datetime.fromtimestamp(entries[0].time or 0, UTC).isoformat() == expected
    assert report.findings.counts["time_missing"] == (line.startswith("12:00"))


def test_irc_nicks_that_were_changed_a_hundred_thousand_times_are_one_person(tmp_path: Path) -> None:
    """In either direction: each name becomes the next, or each becomes the name that the last one had."""
    for step in (1, -1):
        lines = [f"[12:00] *** n{at} is now known as n{at + step}\n" for at in range(100_000)[::step]]
        lines = lines[::step]
        (tmp_path / "x.log").write_text("[12:00] <n0> hi\n" + "".join(lines) + "[12:00] <n99999> hi\n")
        begun = time.process_time()
        entries, _ = read(tmp_path / "x.log")
        assert len({entry.author_id for entry in entries if entry.kind == "said"}) == 1
        assert time.process_time() - begun < 20


def test_irc_passes_midnight_where_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "c.2024-05-01.log").write_text("[23:59:58] <ana> a\n[00:00:02] <ana> b\n")
    entries, _ = read(tmp_path / "c.2024-05-01.log")
    assert (entries[1].time or 0) - (entries[0].time or 0) == 4
