"""What each format is known to get importers wrong, one hand-made file each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from repertory.data.findings import MAX_FINDINGS
from repertory.data.history import Entry, ImportReport
from repertory.data.readers import open_history
from repertory.data.readers.reading import ReadOptions
from repertory.errors import InvalidInput

# ---------------------------------------------------------------------------------------------- DiscordChatExporter


def _discord(folder: Path, *messages: dict[str, Any], **channel: str) -> tuple[list[Entry], ImportReport]:
    author = {"id": "7", "name": "ana", "nickname": "Ana Banana", "isBot": False}
    base = {"type": "Default", "timestamp": "2024-05-01T12:00:00.123+02:00", "content": "hi", "author": author}
    records = [{**base, "id": str(number), **message} for number, message in enumerate(messages, 1)]
    document = {"guild": {"id": "1"}, "channel": {"id": "9", "type": "GuildTextChat", **channel}, "messages": records}
    return _read(_json(folder / "c.json", document))


def test_discord_tells_kinds_by_type_and_keeps_unknown_ones(tmp_path: Path) -> None:
    entries, report = _discord(
        tmp_path,
        {"type": "GuildMemberJoin", "content": "Joined the server."},
        {"type": "ChannelPinnedMessage", "content": "Pinned a message."},
        {"content": "Joined the server."},
        {"type": "46", "content": "a poll"},
        {"type": "46", "content": "another poll"},
        {"type": "20", "content": "answer to a slash command", "interaction": {"id": "1", "name": "roll", "user": {}}},
    )
    assert [entry.kind for entry in entries] == ["service", "service", "said", "service", "service", "said"]
    assert report.findings.counts == {"kind_unknown": 1}
    assert (report.messages, report.other["service"]) == (2, 4)


def test_discord_replies_forwards_and_what_only_looks_like_a_reply(tmp_path: Path) -> None:
    entries, _ = _discord(
        tmp_path,
        {"type": "Reply", "reference": {"type": "Default", "messageId": "55", "channelId": "9"}},
        {"type": "Reply", "reference": {"messageId": "55", "channelId": "other"}},
        {"content": "", "reference": {"type": "Forward", "messageId": "5"}, "forwardedMessage": {"content": "theirs"}},
    )
    assert [entry.reply_to for entry in entries] == ["55", None, None]
    assert [entry.is_forwarded for entry in entries] == [False, False, True]
    assert entries[2].text == "theirs"


def test_discord_authors_are_ids_and_bots_are_marked(tmp_path: Path) -> None:
    author = {"id": "7", "name": "ana", "nickname": "Renamed", "isBot": False}
    entries, report = _discord(tmp_path, {}, {"author": author}, {"author": {**author, "id": "8", "isBot": True}})
    assert [entry.author_id for entry in entries] == ["7", "7", "8"]
    assert [entry.is_bot for entry in entries] == [False, False, True]
    assert report.authors["7"].names == {"Ana Banana": 1, "Renamed": 1}


def test_discord_times_markup_media_and_threads(tmp_path: Path) -> None:
    media = {"attachments": [{"fileName": "a.png"}], "stickers": [{"name": "s"}], "content": ""}
    reacted = {"content": "<@123> **raw** <:kek:1> `x`", "reactions": [{"emoji": {"name": "👍"}, "count": 3}]}
    edited = {"timestampEdited": "2024-05-01T10:00:05+00:00"}
    entries, _ = _discord(tmp_path, media, reacted, edited, type="GuildPublicThread")
    assert entries[0].time == pytest.approx(datetime(2024, 5, 1, 10, 0, 0, 123000, UTC).timestamp())
    assert entries[0].attachments == ("a.png", "sticker")
    assert (entries[1].text, entries[1].reactions) == ("<@123> **raw** <:kek:1> `x`", (("👍", 3),))
    assert entries[2].edited == datetime(2024, 5, 1, 10, 0, 5, tzinfo=UTC).timestamp()
    assert {entry.thread for entry in entries} == {"9"}


def test_discord_partitions_are_one_channel(tmp_path: Path) -> None:
    (tmp_path / "dump").mkdir()
    for part in ("c [part 1].json", "c [part 2].json"):
        message = {"id": part, "type": "Default", "timestamp": "2024-05-01T12:00:00+00:00", "content": part}
        message["author"] = {"id": "7", "name": "ana", "isBot": False}  # type: ignore[assignment]
        _json(tmp_path / "dump" / part, {"channel": {"id": "9", "type": "x"}, "messages": [message]})
    entries, report = _read(tmp_path / "dump")
    assert [entry.text for entry in entries] == ["c [part 1].json", "c [part 2].json"]
    assert report.channels == {"9"}


def test_discord_csv_has_seven_digits_of_a_second(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text(
        "AuthorID,Author,Date,Content,Attachments,Reactions\n"
        '"7","ana","2024-05-01T12:00:00.1234567+00:00","one\ntwo, ""three""","a.png,b.png",""\n'
    )
    (entry,), report = _read(path)
    assert report.format == "discord-csv"
    assert entry.text == 'one\ntwo, "three"'
    assert entry.time == pytest.approx(1714564800.123456)
    assert entry.attachments == ("a.png", "b.png")


# ------------------------------------------------------------------------------------------------- Discord package


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_discord_package_has_one_voice_and_says_so(kind: str, tmp_path: Path) -> None:
    _json(tmp_path / "p/Konto/user.json", {"id": "42", "username": "ana"})
    _json(tmp_path / "p/Nachrichten/c9/channel.json", {"id": "9", "type": 0})
    folder = tmp_path / "p/Nachrichten/c9"
    if kind == "json":
        record = {
            "ID": 1,
            "Timestamp": "2024-05-01 12:00:00",
            "Contents": "hi",
            "Attachments": "https://x/y/a.png https://x/b.png",
        }
        _json(folder / "messages.json", [record])
    else:
        row = '1,2024-05-01 12:00:00.000000+00:00,"hi",https://x/y/a.png https://x/b.png\n'
        (folder / "messages.csv").write_text("ID,Timestamp,Contents,Attachments\n" + row)
    (entry,), report = _read(tmp_path / "p")
    assert (entry.author_id, entry.author, entry.channel, entry.id) == ("42", "ana", "9", "1")
    assert entry.time == 1714564800
    assert entry.attachments == ("a.png", "b.png")
    assert report.findings.counts == {"own_messages_only": 1}
    assert report.timezone_assumed is None


# ----------------------------------------------------------------------------------------------------------- Slack


def _slack(folder: Path, *messages: dict[str, Any]) -> tuple[list[Entry], ImportReport]:
    users = [
        {"id": "U1", "name": "ana", "profile": {"display_name": "", "real_name": "Ana B."}},
        {"id": "U2", "name": "bob", "profile": {"display_name": "bobby"}},
        {"id": "U3", "name": "robot", "is_bot": True, "profile": {}},
    ]
    _json(folder / "export/users.json", users)
    base = {"type": "message", "user": "U1", "text": "hi"}
    records = [{"ts": f"{1_700_000_000 + n}.000100", **base, **message} for n, message in enumerate(messages)]
    _json(folder / "export/general/2023-11-14.json", records)
    return _read(folder / "export")


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


# -------------------------------------------------------------------------------------------------------- Telegram


def test_telegram_escapes_that_are_no_json(tmp_path: Path) -> None:
    record = (
        r'{"id":1,"type":"message","from_id":"user1","date_unixtime":"1","text":"bell \x07 and \\x07 and \\\x1B end"}'
    )
    (tmp_path / "r.json").write_text('{"id": 5, "messages": [' + record + "]}")
    (entry,), report = _read(tmp_path / "r.json")
    assert entry.text == "bell \x07 and \\x07 and \\\x1b end"
    assert not report.findings.kept


@pytest.mark.parametrize("chunk", range(1, 12))
def test_telegram_escapes_that_a_chunk_cuts(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repertory.data.jsonstream.CHUNK_BYTES", chunk)
    record = r'{"id":1,"type":"message","from_id":"user1","date_unixtime":"1","text":"\x07\x1B\\x07\\\\\x02é👋\\"}'
    (tmp_path / "r.json").write_text('{"id": 5, "messages": [' + record + "]}")
    (entry,), _ = _read(tmp_path / "r.json")
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
    entries, report = _read(_json(tmp_path / "result.json", document))
    assert [entry.channel for entry in entries] == ["1", "2", "3"]
    assert report.timezone_assumed == "UTC"


def _telegram(folder: Path, *messages: dict[str, Any]) -> tuple[list[Entry], ImportReport]:
    base = {"type": "message", "date": "2023-11-14T22:13:20", "from": "Ana", "from_id": "user1", "text": "hi"}
    records = [{"id": n, **base, "date_unixtime": f"{1_700_000_000 + n}", **m} for n, m in enumerate(messages, 1)]
    return _read(
        _json(folder / "result.json", {"name": "n", "type": "private_supergroup", "id": 5, "messages": records})
    )


# -------------------------------------------------------------------------------------------------------- WhatsApp


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["12/31/23, 9:05 PM - Ana: hi"], "2023-12-31 21:05:00"),
        (["12/31/23, 9:05\u202fPM - Ana: hi"], "2023-12-31 21:05:00"),
        (["31/12/2023, 9:05 a. m. - Ana: hi"], "2023-12-31 09:05:00"),
        (["31/12/23 12:05 am - Ana: hi"], "2023-12-31 00:05:00"),
        (["[31.12.23, 21:05:33] Ana: hi"], "2023-12-31 21:05:33"),
        (["\u200e[31/12/23, 9:05:33 PM] Ana: hi"], "2023-12-31 21:05:33"),
        (["31.12.23, 21:05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["2023-12-31, 21:05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["2023/12/31 21:05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["31-12-2023 21.05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["٣١/١٢/٢٠٢٣، ٩:٠٥ م - Ana: hi"], "2023-12-31 21:05:00"),
        (["۲۰۲۳/۱۲/۳۱, ۲۱:۰۵ - Ana: hi"], "2023-12-31 21:05:00"),
        (["2023/12/31 下午9:05 - Ana: hi"], "2023-12-31 21:05:00"),
        (["[2023. 12. 31. 오후 9:05:00] Ana: hi"], "2023-12-31 21:05:00"),
    ],
)
def test_whatsapp_headers_of_many_locales(lines: list[str], expected: str, tmp_path: Path) -> None:
    (entry,), report = _whatsapp(tmp_path, *lines)
    assert (entry.author, entry.text) == ("Ana", "hi")
    assert datetime.fromtimestamp(entry.time or 0, UTC) == datetime.fromisoformat(expected + "+00:00")
    assert report.format == "whatsapp"


def test_whatsapp_day_and_month_are_decided_by_the_whole_file(tmp_path: Path) -> None:
    entries, _ = _whatsapp(tmp_path, "3/4/23, 10:00 - Ana: a", "3/25/23, 10:00 - Ana: b")
    assert _days(entries) == ["2023-03-04", "2023-03-25"]
    entries, _ = _whatsapp(tmp_path, "3/4/23, 10:00 - Ana: a", "25/4/23, 10:00 - Ana: b")
    assert _days(entries) == ["2023-04-03", "2023-04-25"]


def test_whatsapp_day_and_month_are_decided_by_time_that_runs_forward(tmp_path: Path) -> None:
    entries, _ = _whatsapp(tmp_path, "11/1/23, 10:00 - Ana: a", "2/2/23, 10:00 - Ana: b", "1/3/23, 10:00 - Ana: c")
    assert _days(entries) == ["2023-01-11", "2023-02-02", "2023-03-01"]


def test_whatsapp_asks_where_both_orders_would_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as refused:
        _whatsapp(tmp_path, "3/4/23, 10:00 - Ana: a")
    assert refused.value.code == "date_order_unknown"
    for day_first, day in ((True, "2023-04-03"), (False, "2023-03-04")):
        entries, _ = _whatsapp(tmp_path, "3/4/23, 10:00 - Ana: a", options=ReadOptions(day_first=day_first))
        assert _days(entries) == [day]


def test_whatsapp_messages_of_several_lines_keep_them(tmp_path: Path) -> None:
    entries, _ = _whatsapp(tmp_path, "31.12.23, 21:05 - Ana: one", "", "  - three", "", "31.12.23, 21:06 - Bob: x")
    assert [entry.text for entry in entries] == ["one\n\n  - three\n", "x"]


@pytest.mark.parametrize(
    ("body", "kind", "text", "attachments"),
    [
        ("<Media omitted>", "said", "", ("media",)),
        ("<Medien ausgeschlossen>", "said", "", ("media",)),
        ("\u200eimage omitted", "said", "", ("image",)),
        ("\u200eBild weggelassen", "said", "", ("Bild",)),
        ("\u200e<attached: 0001-PHOTO.jpg>", "said", "", ("0001-PHOTO.jpg",)),
        ("look \u200e<attached: 0001-PHOTO.jpg>", "said", "look", ("0001-PHOTO.jpg",)),
        ("IMG-20231231-WA0001.jpg (file attached)\nlook", "said", "look", ("IMG-20231231-WA0001.jpg",)),
        ("This message was deleted", "deleted", "", ()),
        ("\u200eYou deleted this message.", "deleted", "", ()),
        ("Diese Nachricht wurde gelöscht.", "deleted", "", ()),
        ("hello <This message was edited>", "said", "hello", ()),
        ("hello \u200e<Diese Nachricht wurde bearbeitet>", "said", "hello", ()),
        ("Waiting for this message. This may take a while.", "service", None, ()),
        ("\u200eAna changed the group description", "service", None, ()),
        ("<lol>", "said", "<lol>", ()),
        ("a (b) c.", "said", "a (b) c.", ()),
        ("note: this: that", "said", "note: this: that", ()),
        ("", "said", "", ()),
        ("مرحبا \u200fשלום 👩‍👩‍👧", "said", "مرحبا \u200fשלום 👩‍👩‍👧", ()),
    ],
)
def test_whatsapp_bodies(body: str, kind: str, text: str | None, attachments: tuple[str, ...], tmp_path: Path) -> None:
    (entry, _), _ = _whatsapp(tmp_path, f"[31.12.23, 21:05:33] Ana: {body}", "[31.12.23, 21:06:33] Bob: ok")
    assert (entry.kind, entry.attachments) == (kind, attachments)
    assert text is None or entry.text == text


def test_whatsapp_notices_have_no_author(tmp_path: Path) -> None:
    entries, report = _whatsapp(
        tmp_path,
        "31.12.23, 21:05 - Messages and calls are end-to-end encrypted. Tap to learn more.",
        "31.12.23, 21:05 - Ana created group “Trip: Rome”",
        '31.12.23, 21:05 - Ana changed the subject from "x: y" to "z"',
        "31.12.23, 21:05 - Ana: hi",
    )
    assert [entry.kind for entry in entries] == ["service", "service", "service", "said"]
    assert list(report.authors) == ["Ana"]


def test_whatsapp_names_with_a_colon_and_push_names(tmp_path: Path) -> None:
    lines = [f"31.12.23, 21:0{n} - Work: Carla: message {n}" for n in range(4)]
    lines += ["31.12.23, 21:06 - Ana: re: that", "31.12.23, 21:07 - Ana: plain", "31.12.23, 21:08 - Ana: plain"]
    lines += [
        "31.12.23, 21:08 - ~\u202fPush Name: hi",
        "31.12.23, 21:09 - \u202a+49 170 1234567\u202c: @491701234567 yes",
    ]
    entries, _ = _whatsapp(tmp_path, *lines)
    assert [entry.author for entry in entries] == ["Work: Carla"] * 4 + ["Ana"] * 3 + ["Push Name", "+49 170 1234567"]
    assert [entry.text for entry in entries][3:5] == ["message 3", "re: that"]
    assert entries[-1].mentions == ("491701234567",)


def test_whatsapp_media_in_a_language_nobody_listed(tmp_path: Path) -> None:
    lines = [f"31.12.23, 21:0{n} - Ana: <Meedia jäeti välja>" for n in range(3)] + ["31.12.23, 21:05 - Ana: <rare>"]
    entries, _ = _whatsapp(tmp_path, *lines)
    assert [(entry.text, entry.attachments) for entry in entries] == [("", ("media",))] * 3 + [("<rare>", ())]


def _whatsapp(folder: Path, *lines: str, options: ReadOptions | None = None) -> tuple[list[Entry], ImportReport]:
    path = folder / "chat.txt"
    path.write_text("\n".join(lines) + "\n", newline="")
    return _read(path, options)


def _days(entries: Iterable[Entry]) -> list[str]:
    return [str(datetime.fromtimestamp(entry.time or 0, UTC).date()) for entry in entries]


# ------------------------------------------------------------------------------------------------------- Messenger


def test_messenger_bytes_as_latin_1_in_every_string_and_notices(tmp_path: Path) -> None:
    def escaped(text: str) -> str:
        return text.encode().decode("latin-1")

    base = {"sender_name": escaped("Zoë 🦊"), "timestamp_ms": 1_700_000_000_123}
    records = [
        {**base, "content": escaped("naïve 👩‍👩‍👧"), "reactions": [{"reaction": escaped("❤"), "actor": "Bob"}] * 2},
        {**base, "content": "already right: é 👋"},
        {**base, "content": escaped("Reacted ❤ to your message ")},
        {**base, "content": "You sent an attachment.", "photos": [{"uri": "x"}]},
        {**base, "is_unsent": True},
        {**base, "call_duration": 5, "content": "Call ended"},
        {**base, "photos": [{"uri": "x"}]},
    ]
    for number, record in enumerate(records):
        record["timestamp_ms"] = 1_700_000_009_000 - number  # newest first
    entries, report = _read(
        _json(tmp_path / "e/inbox/t_1/message_1.json", {"messages": records, "title": "t"}).parents[2]
    )
    assert [entry.kind for entry in entries] == ["said", "said", "service", "service", "deleted", "service", "said"]
    assert (entries[0].author, entries[0].text, entries[0].reactions) == ("Zoë 🦊", "naïve 👩‍👩‍👧", (("❤", 2),))
    assert entries[1].text == "already right: é 👋"
    assert entries[6].attachments == ("photos",)
    assert entries[0].channel == "inbox/t_1"
    assert report.findings.counts["authors_by_name"] == 1


def test_messenger_of_one_moment_keeps_its_order_and_parts_are_one_thread(tmp_path: Path) -> None:
    for part, texts in (("message_1.json", ["third", "second"]), ("message_2.json", ["first"])):
        records = [
            {"sender_name": "Ana", "timestamp_ms": 5000 if part[8] == "1" else 1000, "content": t} for t in texts
        ]
        _json(tmp_path / "inbox/t" / part, {"messages": records})
    entries, report = _read(tmp_path / "inbox")
    assert [entry.text for entry in sorted(entries, key=lambda entry: entry.time or 0)] == ["first", "second", "third"]
    assert report.channels == {"t"}


def test_messenger_end_to_end_export_is_clean_text(tmp_path: Path) -> None:
    records = [
        {
            "senderName": "Zoë",
            "text": "Ã© is what I typed",
            "timestamp": 1_700_000_000_123,
            "type": "text",
            "isUnsent": False,
        },
        {"senderName": "Zoë", "text": "", "timestamp": 1_700_000_000_122, "type": "media", "media": [{"uri": "x"}]},
        {"senderName": "Zoë", "text": "", "timestamp": 1_700_000_000_121, "type": "text", "isUnsent": True},
    ]
    entries, _ = _read(_json(tmp_path / "t.json", {"participants": ["Zoë"], "threadName": "t", "messages": records}))
    assert [(entry.kind, entry.text) for entry in entries] == [
        ("said", "Ã© is what I typed"),
        ("said", ""),
        ("deleted", ""),
    ]


# -------------------------------------------------------------------------------------------------- Twitch and IRC


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
    entries, _ = _read(
        _json(tmp_path / "v.json", {"streamer": {}, "video": {}, "comments": comments, "embeddedData": None})
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
    entries, _ = _read(tmp_path / "x.log")
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
    entries, report = _read(tmp_path / name)
    assert [(entry.author, entry.text) for entry in entries] == [("ana", "hi")] * 2
    assert datetime.fromtimestamp(entries[0].time or 0, UTC).isoformat() == expected
    assert report.findings.counts["time_missing"] == (line.startswith("12:00"))


def test_irc_passes_midnight_where_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "c.2024-05-01.log").write_text("[23:59:58] <ana> a\n[00:00:02] <ana> b\n")
    entries, _ = _read(tmp_path / "c.2024-05-01.log")
    assert (entries[1].time or 0) - (entries[0].time or 0) == 4


# ------------------------------------------------------------------------------------- conversations with assistants


def test_chatgpt_walks_the_branch_that_was_seen(tmp_path: Path) -> None:
    def node(ident: str, parent: str | None, role: str, text: object, **message: Any) -> dict[str, Any]:
        content = {"content_type": "text", "parts": [text]}
        return {
            "id": ident,
            "parent": parent,
            "children": [],
            "message": {"id": ident, "author": {"role": role}, "content": content, "create_time": 5, **message},
        }

    nodes = [
        {"id": "root", "parent": None, "children": ["s"], "message": None},
        node("s", "root", "system", "hidden", metadata={"is_visually_hidden_from_conversation": True}),
        node("q", "s", "user", "question"),
        node("bad", "q", "assistant", "regenerated away"),
        node("tool", "q", "assistant", "search(…)", recipient="web"),
        node("t", "tool", "assistant", "x", content={"content_type": "thoughts", "thoughts": []}),
        node("img", "t", "user", "x", content={"content_type": "multimodal_text", "parts": [{"asset": 1}, "see"]}),
        node("good", "img", "assistant", "answer\ue200cite\ue202turn0\ue201."),
    ]
    tree = {"id": "c", "mapping": {n["id"]: n for n in nodes}, "current_node": "good", "create_time": 1.0}
    loop = {
        "id": "l",
        "mapping": {"a": node("a", "b", "user", "x"), "b": node("b", "a", "user", "y")},
        "current_node": "a",
    }
    without = {"id": "w", "mapping": {n["id"]: n for n in nodes[:4]}, "create_time": 2.0}
    entries, report = _read(_json(tmp_path / "conversations.json", [tree, loop, without]))
    assert [(e.author, e.text) for e in entries if e.channel == "c"] == [
        ("user", "question"),
        ("user", "see"),
        ("assistant", "answer."),
    ]
    assert [e.text for e in entries if e.channel == "l"] == ["y", "x"]
    assert [e.text for e in entries if e.channel == "w"] == ["question", "regenerated away"]
    assert report.findings.counts == {"provider_voice": 1}


def test_chatgpt_citations_that_never_end_take_no_time(tmp_path: Path) -> None:
    message = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["\ue200" * 300_000]}}
    tree = {"id": "c", "mapping": {"a": {"id": "a", "parent": None, "message": message}}, "current_node": "a"}
    begun = time.process_time()
    (entry,), _ = _read(_json(tmp_path / "conversations.json", [tree]))
    assert len(entry.text) == 300_000
    assert time.process_time() - begun < 5


def test_claude_prefers_text_parts_and_follows_parents(tmp_path: Path) -> None:
    def message(ident: str, parent: str, sender: str, text: str, *content: dict[str, str]) -> dict[str, Any]:
        times = {"created_at": "2024-05-01T12:00:00.123456Z"}
        return {
            "uuid": ident,
            "parent_message_uuid": parent,
            "sender": sender,
            "text": text,
            "content": content,
            **times,
        }

    thought = {"type": "thinking", "thinking": "hm"}
    messages = [
        message("1", "0", "human", "question"),
        message("2", "1", "assistant", "edited away"),
        message("3", "1", "assistant", "flat", thought, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}),
    ]
    entries, _ = _read(_json(tmp_path / "conversations.json", [{"uuid": "c", "chat_messages": messages}]))
    assert [(entry.author, entry.text) for entry in entries] == [("user", "question"), ("assistant", "a\nb")]


def test_sharegpt_roles_and_odd_conversations_are_kept(tmp_path: Path) -> None:
    turns = [
        {"from": f, "value": v}
        for f, v in (("system", "be"), ("human", "a"), ("human", "b"), ("gpt", "c"), ("tool", "{}"))
    ]
    rows = [{"conversations": turns, "system": "first"}, {"conversations": [{"from": "martian", "value": "x"}]}]
    entries, report = _read(_json(tmp_path / "s.json", rows))
    kinds = [("prompt", "first"), ("prompt", "be"), ("said", "a"), ("said", "b"), ("said", "c"), ("service", "{}")]
    assert [(entry.kind, entry.text) for entry in entries] == kinds
    assert report.findings.kept[0].line == 2
    assert "martian" in report.findings.kept[0].what


def test_alpaca_input_and_history(tmp_path: Path) -> None:
    row = {"instruction": "do", "input": "this", "output": "done", "system": "s", "history": [["q", "a"]]}
    entries, _ = _read(_json(tmp_path / "a.json", [row]))
    assert [(entry.author_id, entry.text) for entry in entries] == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "do\nthis"),
        ("assistant", "done"),
    ]


def test_openai_lines_weights_tools_parts_and_broken_lines(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "developer", "content": "be"},
                {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]},
                {"role": "assistant", "content": None, "tool_calls": [{}]},
                {"role": "tool", "content": "5"},
                {"role": "assistant", "content": "no", "weight": 0},
                {"role": "assistant", "content": "yes", "weight": 1},
            ]
        },
        {"prompt": "p", "completion": "c"},
    ]
    lines = [json.dumps(rows[0]), "", "{not json", json.dumps(rows[1]), '{"messages": 7}', '{"messages": [{"role": "us']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    entries, report = _read(tmp_path / "t.jsonl")
    assert [(e.author_id, e.text, e.is_trained) for e in entries if e.kind != "service"] == [
        ("system", "be", True),
        ("user", "see", True),
        ("assistant", "no", False),
        ("assistant", "yes", True),
        ("user", "p", True),
        ("assistant", "c", True),
    ]
    assert [(f.code, f.line) for f in report.findings.kept] == [
        ("turns_not_trained", 1),
        ("message_malformed", 3),
        ("message_malformed", 5),
        ("file_broken", None),
    ]


def test_hugging_face_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b 👩‍👩‍👧"}]}] * 600
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    entries, report = _read(tmp_path / "t.parquet")
    assert (len(entries), entries[-1].text, report.format) == (1200, "b 👩‍👩‍👧", "messages")
    content = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(content[: len(content) // 2])
    entries, report = _read(tmp_path / "t.parquet")
    assert (entries, report.findings.counts) == ([], {"file_broken": 1})


def test_native_request_with_its_time(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    conversation = {"messages": messages, "platform": "discord", "timestamp": "2024-05-01T12:00:00Z"}
    entries, report = _read(
        _json(tmp_path / "r.json", {"org_id": "o", "base_model": "m", "conversations": [conversation]})
    )
    assert [(entry.kind, entry.time) for entry in entries] == [
        ("prompt", 1714564800),
        ("said", 1714564800),
        ("said", 1714564800),
    ]
    assert report.format == "native"


# ------------------------------------------------------------------------------------------------------- plain CSV


def test_csv_columns_are_known_by_name_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('Author;Timestamp;Text\nana;1714564800000;"x;\ny"\nbob;2024-05-01T12:00:01Z;z\n')
    entries, _ = _read(tmp_path / "a.csv")
    assert [(entry.author, entry.text, entry.time) for entry in entries] == [
        ("ana", "x;\ny", 1714564800),
        ("bob", "z", 1714564801),
    ]
    (tmp_path / "b.csv").write_text("wer,was\nana,x\n")
    with pytest.raises(InvalidInput, match="no known format"):
        _read(tmp_path / "b.csv")
    with (
        pytest.raises(InvalidInput, match="author, text") as refused,
        open_history(tmp_path / "b.csv", "csv") as history,
    ):
        list(history)
    assert "--column" in refused.value.cure
    options = ReadOptions(columns={"author": "wer", "text": "was"})
    with open_history(tmp_path / "b.csv", "csv", options) as history:
        assert [(entry.author, entry.text) for entry in history] == [("ana", "x")]


def test_csv_rows_without_an_author_or_with_a_broken_time_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("author,text,time\n,x,\nana\nana,x,yesterday\nana,ok,\n")
    entries, report = _read(tmp_path / "a.csv")
    assert [entry.text for entry in entries] == ["ok"]
    assert [finding.line for finding in report.findings.kept] == [1, 2, 3]


def test_findings_are_kept_up_to_a_thousand_and_counted_beyond(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("author,text\n" + ",x\n" * (MAX_FINDINGS + 500))
    _, report = _read(tmp_path / "a.csv")
    assert len(report.findings.kept) == MAX_FINDINGS
    assert report.findings.counts["message_malformed"] == MAX_FINDINGS + 500


def _read(path: Path, options: ReadOptions | None = None) -> tuple[list[Entry], ImportReport]:
    with open_history(path, options=options) as history:
        return list(history), history.report


def _json(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path
