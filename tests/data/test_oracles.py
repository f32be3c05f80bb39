"""Agreement with parsers that others keep up, on their own ground: text they do not themselves change."""

from __future__ import annotations

from pathlib import Path

import discord_data.parse
import pytest
from irclog2html.irclog2html import LogParser
from whatstk.whatsapp.parser import df_from_whatsapp

import exports
from repertory.data.history import Entry
from repertory.data.readers import open_history

# No ZWJ and no combining marks: whatstk strips the one and normalises the other.
TEXTS = [
    "hello",
    "two\nlines: yes",
    "numbers 12/31/23",
    "naïve café",
    "🙂 ok",
    "a <b> c",
    "what? (really)",
    "https://x.y/z?a=b",
]


def _history(texts: list[str]) -> list[Entry]:
    people = [("1", "Ana"), ("2", "Bob B.")]
    return [
        Entry(
            channel="77", id=str(n), author_id=people[n % 2][0], author=people[n % 2][1], text=text, time=1.7e9 + 60 * n
        )
        for n, text in enumerate(texts, 1)
    ]


def test_discord_package_agrees_with_discord_data(tmp_path: Path) -> None:
    said = _history(TEXTS)
    path = exports.discord_package(said, tmp_path)
    theirs = [
        message
        for message in discord_data.parse.parse_messages(path / "messages")
        if not isinstance(message, Exception)
    ]
    with open_history(path) as history:
        ours = list(history)
    assert [(int(e.id), e.text, e.time) for e in ours] == [
        (m.message_id, m.content, m.timestamp.timestamp()) for m in theirs
    ]
    assert len(theirs) == len(said)


@pytest.mark.parametrize(
    "header",
    [
        "{t:%d/%m/%Y, %H:%M} - ",
        "{t:%m/%d/%y, %I:%M %p} - ",
        "[{t:%d.%m.%y, %H:%M:%S}] ",
        "{t:%Y-%m-%d, %H:%M} - ",
        "[{t:%d/%m/%y, %I:%M:%S %p}] ",
    ],
)
def test_whatsapp_agrees_with_whatstk(header: str, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    said = _history(TEXTS * 3)
    times = [datetime.fromtimestamp(1_700_000_000 + 86_400 * n, UTC) for n, _ in enumerate(said)]
    lines = [f"{header.format(t=time)}{e.author}: {e.text}" for time, e in zip(times, said, strict=True)]
    path = tmp_path / "chat.txt"
    path.write_text("\n".join(lines) + "\n")
    theirs = df_from_whatsapp(str(path))
    with open_history(path) as history:
        ours = list(history)
    assert [e.author for e in ours] == list(theirs["username"])
    assert [e.text for e in ours] == list(theirs["message"])
    assert [datetime.fromtimestamp(e.time or 0, UTC).replace(tzinfo=None) for e in ours] == [
        date.to_pydatetime() for date in theirs["date"]
    ]


@pytest.mark.parametrize(
    "stamp", ["[12:00:01] ", "2024-05-01T12:00:01 ", "12:00 ", "1714564801 ", "01-May-2024 12:00:01 "]
)
def test_irc_agrees_with_irclog2html(stamp: str, tmp_path: Path) -> None:
    lines = [
        "<ana> hello there",
        "<bob> ana: naïve café <b>",
        "* ana waves",
        "*** Joins: carl (c@host) has joined",
        "*** ana is now known as anna",
        "<anna> renamed",
        "*** carl (c@host) has quit (bye)",
        "<bob!~b@host> with a mask",
    ]
    path = tmp_path / "x.log"
    path.write_text("".join(f"{stamp}{line}\n" for line in lines))
    theirs = [(what, said) for _, what, said in LogParser(path.read_bytes().split(b"\n"))]
    with open_history(path) as history:
        ours = list(history)
    spoken = [(e.author, e.text) for e in ours if e.kind == "said" and not e.text.startswith("/me ")]
    assert spoken == [said for what, said in theirs if what == LogParser.COMMENT]
    acted = [f"* {e.author} {e.text.removeprefix('/me ')}" for e in ours if e.text.startswith("/me ")]
    assert acted == [said for what, said in theirs if what == LogParser.ACTION]
    notices = [e.text for e in ours if e.kind == "service"]
    others = {LogParser.JOIN, LogParser.PART, LogParser.SERVER}
    changes = [said[0] for what, said in theirs if what == LogParser.NICKCHANGE]
    assert sorted(notices) == sorted([said for what, said in theirs if what in others] + changes)
    assert len({e.author_id for e in ours if e.author in ("ana", "anna")}) == 1
