"""What Slack's export is known to get importers wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exports import read, write_json
from repertory.data.history import Entry, ImportReport


def _slack(folder: Path, *messages: dict[str, Any]) -> tuple[list[Entry], ImportReport]:
    users = [
        {"id": "U1", "name": "ana", "profile": {"display_name": "", "real_name": "Ana B."}},
        {"id": "U2", "name": "bob", "profile": {"display_name": "bobby"}},
        {"id": "U3", "name": "robot", "is_bot": True, "profile": {}},
    ]
    write_json(folder / "export/users.json", users)
    base = {"type": "message", "user": "U1", "text": "hi"}
    records = [{"ts": f"{1_700_000_000 + n}.000100", **base, **message} for n, message in enumerate(messages)]
    write_json(folder / "export/general/2023-11-14.json", records)
    return read(folder / "export")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a &lt;b&gt; &amp;amp; c", "a <b> &amp; c"),
        ("<@U2> look", "@bobby look"),
        ("<@U9|carl> look", "@carl look"),
        ("&lt;@U2&gt; typed", "<@U2> typed"),
        ("<#C1|general> and <#C2>", "#general and #C2"),
        ("<!here> <!channel> <!subteam^S1|@ops>", "@here @channel @ops"),
        ("<https://x.y/z|the page> <https://x.y>", "the page https://x.y"),
        ("<mailto:a@b.c|a@b.c>", "a@b.c"),
        (":smile: :+1::skin-tone-3: :partyparrot:", "😄 👍🏼 :partyparrot:"),
        ("at 10:30:45: now", "at 10:30:45: now"),
        ("one\ntwo", "one\ntwo"),
    ],
)
def test_slack_markup_becomes_what_people_saw(text: str, seen: str, tmp_path: Path) -> None:
    (entry,), _ = _slack(tmp_path, {"text": text})
    assert entry.text == seen


def test_slack_kinds_threads_and_bots(tmp_path: Path) -> None:
    entries, report = _slack(
        tmp_path,
        {"subtype": "channel_join", "text": "<@U1> has joined the channel"},
        {"ts": "1700000100.000200", "thread_ts": "1700000100.000200", "reply_count": 1, "text": "parent"},
        {"ts": "1700000200.000300", "thread_ts": "1700000100.000200", "user": "U2", "text": "reply"},
        {"subtype": "thread_broadcast", "thread_ts": "1700000100.000200", "text": "also here"},
        {"subtype": "me_message", "text": "waves"},
        {"user": "U3", "text": "beep"},
        {"bot_id": "B1", "user": "U2", "text": "beep"},
        {"subtype": "tombstone", "text": "This message was deleted."},
        {"subtype": "from_the_future", "text": "?"},
        {"user": "U404", "text": "from another workspace"},
        {"edited": {"user": "U1", "ts": "1700000300.000000"}, "files": [{"name": "a.pdf"}], "text": ""},
    )
    kinds = ["service", "said", "said", "said", "said", "said", "said", "deleted", "service", "said", "said"]
    assert [entry.kind for entry in entries] == kinds
    assert [entry.thread for entry in entries[1:4]] == ["1700000100.000200"] * 3
    assert [entry.reply_to for entry in entries[1:4]] == [None, "1700000100.000200", "1700000100.000200"]
    assert entries[4].text == "/me waves"
    assert [entry.is_bot for entry in entries[5:7]] == [True, True]
    assert (entries[1].author, entries[2].author, entries[9].author) == ("Ana B.", "bobby", "U404")
    assert (entries[10].edited, entries[10].attachments) == (1700000300.0, ("a.pdf",))
    assert report.findings.counts == {"kind_unknown": 1, "author_unknown": 1}
