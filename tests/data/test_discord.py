"""What DiscordChatExporter and Discord's data package are known to get importers wrong."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from exports import read, write_json
from repertory.data.history import Entry, ImportReport


def _discord(folder: Path, *messages: dict[str, Any], **channel: str) -> tuple[list[Entry], ImportReport]:
    author = {"id": "7", "name": "ana", "nickname": "Ana Banana", "isBot": False}
    base = {"type": "Default", "timestamp": "2024-05-01T12:00:00.123+02:00", "content": "hi", "author": author}
    records = [{**base, "id": str(number), **message} for number, message in enumerate(messages, 1)]
    document = {"guild": {"id": "1"}, "channel": {"id": "9", "type": "GuildTextChat", **channel}, "messages": records}
    return read(write_json(folder / "c.json", document))


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
    reacted = {
        "content": "<@123> <@!8> **raw** <:kek:1><a:d_1:22> <#9> `x`",
        "mentions": [{"id": "8", "name": "bob", "nickname": "Bobby"}],
        "reactions": [{"emoji": {"name": "👍"}, "count": 3}],
    }
    edited = {"timestampEdited": "2024-05-01T10:00:05+00:00"}
    entries, _ = _discord(tmp_path, media, reacted, edited, type="GuildPublicThread")
    assert entries[0].time == pytest.approx(datetime(2024, 5, 1, 10, 0, 0, 123000, UTC).timestamp())
    assert entries[0].attachments == ("a.png", "sticker")
    assert entries[1].text == "<@123> @Bobby **raw** :kek::d_1: <#9> `x`"
    assert (entries[1].mentions, entries[1].reactions) == (("8",), (("👍", 3),))
    assert entries[2].edited == datetime(2024, 5, 1, 10, 0, 5, tzinfo=UTC).timestamp()
    assert {entry.thread for entry in entries} == {"9"}


def test_discord_partitions_are_one_channel(tmp_path: Path) -> None:
    (tmp_path / "dump").mkdir()
    for part in ("c [part 1].json", "c [part 2].json"):
        message = {"id": part, "type": "Default", "timestamp": "2024-05-01T12:00:00+00:00", "content": part}
        message["author"] = {"id": "7", "name": "ana", "isBot": False}  # type: ignore[assignment]
        write_json(tmp_path / "dump" / part, {"channel": {"id": "9", "type": "x"}, "messages": [message]})
    entries, report = read(tmp_path / "dump")
    assert [entry.text for entry in entries] == ["c [part 1].json", "c [part 2].json"]
    assert report.channels == {"9"}


def test_discord_csv_has_seven_digits_of_a_second(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text(
        "AuthorID,Author,Date,Content,Attachments,Reactions\n"
        '"7","ana","2024-05-01T12:00:00.1234567+00:00","one\ntwo, ""three""","a.png,b.png",""\n'
    )
    (entry,), report = read(path)
    assert report.format == "discord-csv"
    assert entry.text == 'one\ntwo, "three"'
    assert entry.time == pytest.approx(1714564800.123456)
    assert entry.attachments == ("a.png", "b.png")


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_discord_package_has_one_voice_and_says_so(kind: str, tmp_path: Path) -> None:
    write_json(tmp_path / "p/Konto/user.json", {"id": "42", "username": "ana"})
    write_json(tmp_path / "p/Nachrichten/c9/channel.json", {"id": "9", "type": 0})
    folder = tmp_path / "p/Nachrichten/c9"
    if kind == "json":
        record = {
            "ID": 1,
            "Timestamp": "2024-05-01 12:00:00",
            "Contents": "hi",
            "Attachments": "https://x/y/a.png https://x/b.png",
        }
        write_json(folder / "messages.json", [record])
    else:
        row = '1,2024-05-01 12:00:00.000000+00:00,"hi",https://x/y/a.png https://x/b.png\n'
        (folder / "messages.csv").write_text("ID,Timestamp,Contents,Attachments\n" + row)
    (entry,), report = read(tmp_path / "p")
    assert (entry.author_id, entry.author, entry.channel, entry.id) == ("42", "ana", "9", "1")
    assert entry.time == 1714564800
    assert entry.attachments == ("a.png", "b.png")
    assert report.findings.counts == {"own_messages_only": 1}
    assert report.timezone_assumed is None


def test_a_discord_package_with_a_strange_user_still_has_its_words(tmp_path: Path) -> None:
    write_json(tmp_path / "p/account/user.json", {"id": "42", "global_name": None, "username": {"a": 1}})
    record = {"ID": 1, "Timestamp": "2024-05-01 12:00:00", "Contents": "hi", "Attachments": ""}
    write_json(tmp_path / "p/messages/c9/messages.json", [record])
    (entry,), _ = read(tmp_path / "p")
    assert (entry.author, entry.text) == ("42", "hi")
