"""What Telegram Desktop's export is known to get importers wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exports import read, write_json
from repertory.data.history import Entry, ImportReport


def test_telegram_escapes_that_are_no_json(tmp_path: Path) -> None:
    record = (
        r'{"id":1,"type":"message","from_id":"user1","date_unixtime":"1","text":"bell \x07 and \\x07 and \\\x1B end"}'
    )
    (tmp_path / "r.json").write_text('{"id": 5, "messages": [' + record + "]}")
    (entry,), report = read(tmp_path / "r.json")
    assert entry.text == "bell \x07 and \\x07 and \\\x1b end"
    assert not report.findings.kept


@pytest.mark.parametrize("chunk", range(1, 12))
def test_telegram_escapes_that_a_chunk_cuts(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repertory.data.jsonstream.CHUNK_BYTES", chunk)
    record = r'{"id":1,"type":"message","from_id":"user1","date_unixtime":"1","text":"\x07\x1B\\x07\\\\\x02é👋\\"}'
    (tmp_path / "r.json").write_text('{"id": 5, "messages": [' + record + "]}")
    (entry,), _ = read(tmp_path / "r.json")
    assert entry.text == "\x07\x1b\\x07\\\\\x02é👋\\"


def test_telegram_text_is_joined_as_it_is(tmp_path: Path) -> None:
    text = ["see ", {"type": "link", "text": "https://x.y"}, ",\n", {"type": "bold", "text": "now"}, "!"]
    entries, _ = _telegram(tmp_path, {"text": text}, {"text": ""}, {"text": "plain"})
    assert [entry.text for entry in entries] == ["see https://x.y,\nnow!", "", "plain"]


def test_telegram_kinds_media_forwards_bots_and_deleted_accounts(tmp_path: Path) -> None:
    entries, report = _telegram(
        tmp_path,
        {"type": "service", "actor": "Ana", "actor_id": "user1", "action": "pin_message", "from_id": None},
        {"media_type": "video_message", "file": "(File not included…)", "text": ""},
        {"photo": "p.jpg", "text": "look"},
        {"forwarded_from": "News", "text": "theirs"},
        {"via_bot": "@gif", "text": "x"},
        {"from": None, "from_id": "user9", "text": "gone"},
        {"type": "hologram", "text": "x"},
        {"reactions": [{"type": "emoji", "count": 2, "emoji": "👍"}], "edited_unixtime": "1700000009"},
    )
    assert [entry.kind for entry in entries] == ["service", "said", "said", "said", "said", "said", "service", "said"]
    assert entries[1].attachments == ("video_message", "file")
    assert entries[2].attachments == ("photo",)
    assert (entries[3].is_forwarded, entries[4].is_bot, entries[5].author) == (True, True, "user9")
    assert (entries[7].reactions, entries[7].edited) == ((("👍", 2),), 1700000009.0)
    assert report.findings.counts == {"kind_unknown": 1}


def test_telegram_topics_are_threads_and_not_replies(tmp_path: Path) -> None:
    entries, _ = _telegram(
        tmp_path,
        {"id": 10, "type": "service", "action": "topic_created", "actor": "Ana", "actor_id": "user1"},
        {"id": 11, "reply_to_message_id": 10},
        {"id": 12, "reply_to_message_id": 11},
        {"id": 13, "reply_to_message_id": 5, "reply_to_peer_id": "channel3"},
    )
    assert [(entry.thread, entry.reply_to) for entry in entries[1:]] == [("10", None), (None, "11"), (None, None)]


def test_telegram_ids_of_different_chats_do_not_meet(tmp_path: Path) -> None:
    message = {"id": 1, "type": "message", "date": "2024-05-01T12:00:00", "from": "A", "from_id": "user1", "text": "x"}
    chats = [{"type": "saved_messages", "id": 1, "messages": [message]}, {"name": None, "id": 2, "messages": [message]}]
    document = {
        "about": "",
        "chats": {"about": "", "list": chats},
        "left_chats": {"list": [{"id": 3, "messages": [message]}]},
    }
    entries, report = read(write_json(tmp_path / "result.json", document))
    assert [entry.channel for entry in entries] == ["1", "2", "3"]
    assert report.timezone_assumed == "UTC"


def _telegram(folder: Path, *messages: dict[str, Any]) -> tuple[list[Entry], ImportReport]:
    base = {"type": "message", "date": "2023-11-14T22:13:20", "from": "Ana", "from_id": "user1", "text": "hi"}
    records = [{"id": n, **base, "date_unixtime": f"{1_700_000_000 + n}", **m} for n, m in enumerate(messages, 1)]
    return read(
        write_json(folder / "result.json", {"name": "n", "type": "private_supergroup", "id": 5, "messages": records})
    )
