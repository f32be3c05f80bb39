"""Histories written as the exports of other programs, for tests and measurements.

Each writer writes what its format can hold of an entry, the way the program does: Slack's markup, WhatsApp's lines,
Messenger's escaped bytes. Reading it back must give the same words.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from repertory.data.history import Entry, ImportReport
from repertory.data.readers import open_history
from repertory.data.readers.reading import ReadOptions

Write = Callable[[list[Entry], Path], Path]  # entries in order of time, a folder -> the export


def discord(entries: list[Entry], folder: Path) -> Path:
    folder = folder / "discord"
    for channel, said in _channels(entries):
        messages = [
            {
                "id": entry.id,
                "type": "Reply" if entry.reply_to else "Default",
                "timestamp": _time(entry).isoformat(),
                "timestampEdited": None,
                "callEndedTimestamp": None,
                "isPinned": False,
                "content": entry.text,
                "author": {
                    "id": entry.author_id,
                    "name": entry.author,
                    "discriminator": "0000",
                    "nickname": entry.author,
                    "color": None,
                    "isBot": entry.is_bot,
                    "roles": [],
                    "avatarUrl": "https://cdn.discordapp.com/embed/avatars/0.png",
                },
                "attachments": [],
                "embeds": [],
                "stickers": [],
                "reactions": [],
                "mentions": [],
                **(
                    {"reference": {"messageId": entry.reply_to, "channelId": channel, "guildId": "1"}}
                    if entry.reply_to
                    else {}
                ),
                "inlineEmojis": [],
            }
            for entry in said
        ]
        document = {
            "guild": {"id": "1", "name": "Guild", "iconUrl": "https://cdn.discordapp.com/embed/avatars/0.png"},
            "channel": {
                "id": channel,
                "type": "GuildTextChat",
                "categoryId": "2",
                "category": "Text",
                "name": channel,
                "topic": None,
            },
            "dateRange": {"after": None, "before": None},
            "exportedAt": "2024-01-01T00:00:00+00:00",
            "messages": messages,
            "messageCount": len(messages),
        }
        _write(
            folder / f"Guild - Text - {channel} [{channel}].json", json.dumps(document, indent=2, ensure_ascii=False)
        )
    return folder


def discord_csv(entries: list[Entry], folder: Path) -> Path:
    text = io.StringIO(newline="")
    rows = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    rows.writerow(["AuthorID", "Author", "Date", "Content", "Attachments", "Reactions"])
    for entry in entries:
        date = _time(entry).strftime("%Y-%m-%dT%H:%M:%S.%f0+00:00")  # seven digits, as .NET writes them
        rows.writerow([entry.author_id, entry.author, date, entry.text, "", ""])
    return _write(folder / "channel.csv", text.getvalue())


def slack(entries: list[Entry], folder: Path) -> Path:
    """A zip. Times within one second get their own microseconds, since `ts` is the key of a message."""
    path = folder / "slack.zip"
    names = {entry.author_id: entry.author for entry in entries}
    with zipfile.ZipFile(_made(path), "w", zipfile.ZIP_DEFLATED) as archive:
        users = [{"id": user, "name": name, "profile": {"display_name": name}} for user, name in names.items()]
        archive.writestr("users.json", json.dumps(users))
        archive.writestr("channels.json", "[]")
        for channel, said in _channels(entries):
            used: set[str] = set()
            stamps: dict[str, str] = {}
            for entry in said:
                stamps[entry.id] = _slack_ts(entry, used)
            for day, of_day in groupby(said, key=lambda entry: _time(entry).date()):
                messages = [_slack_message(entry, stamps) for entry in of_day]
                archive.writestr(f"{channel}/{day}.json", json.dumps(messages, indent=4))
    return path


def _slack_ts(entry: Entry, used: set[str]) -> str:
    seconds, micros = int(entry.time or 0), 0
    while (ts := f"{seconds}.{micros:06d}") in used:
        micros += 1
    used.add(ts)
    return ts


def _slack_message(entry: Entry, stamps: dict[str, str]) -> dict[str, object]:
    text = entry.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    message: dict[str, object] = {"type": "message", "user": entry.author_id, "text": text, "ts": stamps[entry.id]}
    if entry.reply_to:
        message |= {"thread_ts": stamps[entry.reply_to], "parent_user_id": "U0"}
    return message


def telegram(entries: list[Entry], folder: Path) -> Path:
    chats = []
    for number, (channel, said) in enumerate(_channels(entries), 1):
        messages: list[dict[str, object]] = [
            {
                "id": int(entry.id),
                "type": "message",
                "date": _time(entry).strftime("%Y-%m-%dT%H:%M:%S"),
                "date_unixtime": str(int(entry.time or 0)),
                "from": entry.author,
                "from_id": entry.author_id,
                **({"reply_to_message_id": int(entry.reply_to)} if entry.reply_to else {}),
                "text": entry.text,
                "text_entities": [{"type": "plain", "text": entry.text}],
            }
            for entry in said
        ]
        chats.append({"name": channel, "type": "private_supergroup", "id": number, "messages": messages})
    document = {"about": "Here is the data you requested.", "chats": {"about": "", "list": chats}}
    text = json.dumps(document, indent=1, ensure_ascii=False)
    for code in (*range(0x20), 0x7F):  # control characters, as its writer spells them
        text = text.replace(f"\\u{code:04x}", f"\\x{code:02X}")
    return _write(folder / "result.json", text)


def whatsapp(entries: list[Entry], folder: Path) -> Path:
    """One Android chat per channel. It has minutes only, and no way to say where a message ends but the next one."""
    folder = folder / "whatsapp"
    for channel, said in _channels(entries):
        lines = ["12/31/16, 11:59\u202fPM - Messages and calls are end-to-end encrypted. Tap to learn more."]
        for entry in said:
            time = _time(entry)
            clock = f"{(time.hour + 11) % 12 + 1}:{time.minute:02d}\u202f{'AM' if time.hour < 12 else 'PM'}"
            lines.append(f"{time.month}/{time.day}/{time.year % 100:02d}, {clock} - {entry.author}: {entry.text}")
        _write(folder / f"WhatsApp Chat with {channel}.txt", "\n".join(lines) + "\n")
    return folder


def messenger(entries: list[Entry], folder: Path) -> Path:
    folder = folder / "messenger"
    for channel, said in _channels(entries):
        document = {
            "participants": [{"name": name} for name in dict.fromkeys(_escaped(entry.author) for entry in said)],
            "messages": [
                {
                    "sender_name": _escaped(entry.author),
                    "timestamp_ms": round((entry.time or 0) * 1000),
                    "content": _escaped(entry.text),
                    "is_geoblocked_for_viewer": False,
                }
                for entry in reversed(said)
            ],
            "title": _escaped(channel),
            "is_still_participant": True,
            "thread_path": f"inbox/{channel}",
            "magic_words": [],
        }
        _write(folder / "messages/inbox" / channel / "message_1.json", json.dumps(document, indent=2))
    return folder


def _escaped(text: str) -> str:
    return text.encode().decode("latin-1")


def instagram_sealed(entries: list[Entry], folder: Path) -> Path:
    """The end-to-end shape."""
    document = {
        "participants": sorted({entry.author for entry in entries}),
        "threadName": "thread",
        "messages": [
            {
                "isUnsent": False,
                "media": [],
                "reactions": [],
                "senderName": entry.author,
                "text": entry.text,
                "timestamp": round((entry.time or 0) * 1000),
                "type": "text",
            }
            for entry in reversed(entries)
        ],
    }
    return _write(folder / "thread_1.json", json.dumps(document, ensure_ascii=False))


def twitch(entries: list[Entry], folder: Path) -> Path:
    comments = [
        {
            "_id": entry.id,
            "created_at": _time(entry).isoformat().replace("+00:00", "Z"),
            "channel_id": "1",
            "content_type": "video",
            "content_id": "2",
            "content_offset_seconds": number,
            "commenter": {"display_name": entry.author, "_id": entry.author_id, "name": entry.author.lower()},
            "message": {
                "body": entry.text,
                "bits_spent": 0,
                "fragments": [{"text": entry.text, "emoticon": None}],
                "user_badges": [],
                "user_color": "#FF0000",
                "emoticons": [],
            },
        }
        for number, entry in enumerate(entries)
    ]
    document = {"streamer": {"name": "s", "id": 1}, "video": {"title": "t", "id": "2"}, "comments": comments}
    return _write(folder / "chat.json", json.dumps(document))


def irc(entries: list[Entry], folder: Path) -> Path:
    """irssi, with dates in every line. One line is one message."""
    lines = [f"{_time(entry):%Y-%m-%d %H:%M:%S} <{entry.author}> {entry.text}" for entry in entries]
    return _write(folder / "channel.log", "\n".join(lines) + "\n")


def generic_csv(entries: list[Entry], folder: Path) -> Path:
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(["id", "channel", "author", "timestamp", "text", "reply_to"])
    for entry in entries:
        rows.writerow(
            [entry.id, entry.channel, entry.author, _time(entry).isoformat(), entry.text, entry.reply_to or ""]
        )
    return _write(folder / "chat.csv", text.getvalue())


def discord_package(entries: list[Entry], folder: Path) -> Path:
    folder = folder / "package"
    _write(folder / "account/user.json", json.dumps({"id": entries[0].author_id, "username": entries[0].author}))
    _write(folder / "messages/index.json", json.dumps({channel: channel for channel, _ in _channels(entries)}))
    for channel, said in _channels(entries):
        messages = [
            {
                "ID": int(entry.id),
                "Timestamp": _time(entry).strftime("%Y-%m-%d %H:%M:%S"),
                "Contents": entry.text,
                "Attachments": "",
            }
            for entry in said
        ]
        _write(folder / f"messages/c{channel}/channel.json", json.dumps({"id": channel, "type": 0, "name": "general"}))
        _write(folder / f"messages/c{channel}/messages.json", json.dumps(messages))
    return folder


def chatgpt(entries: list[Entry], folder: Path) -> Path:
    return _write(folder / "conversations.json", json.dumps([_chatgpt_tree(c, said) for c, said in _channels(entries)]))


def _chatgpt_tree(channel: str, said: list[Entry]) -> dict[str, object]:
    mapping: dict[str, object] = {"root": {"id": "root", "message": None, "parent": None, "children": ["n0"]}}
    for number, entry in enumerate(said):
        mapping[f"n{number}"] = {
            "id": f"n{number}",
            "parent": f"n{number - 1}" if number else "root",
            "children": [f"n{number + 1}"] if number + 1 < len(said) else [],
            "message": {
                "id": entry.id,
                "author": {"role": entry.author_id, "metadata": {}},
                "create_time": entry.time,
                "content": {"content_type": "text", "parts": [entry.text]},
                "recipient": "all",
                "weight": 1.0,
                "metadata": {},
            },
        }
    return {
        "id": channel,
        "conversation_id": channel,
        "title": "t",
        "create_time": said[0].time,
        "mapping": mapping,
        "current_node": f"n{len(said) - 1}",
    }


def claude(entries: list[Entry], folder: Path) -> Path:
    conversations = [
        {
            "uuid": channel,
            "name": "n",
            "created_at": _time(said[0]).isoformat(),
            "chat_messages": [
                {
                    "uuid": entry.id,
                    "sender": "human" if entry.author_id == "user" else entry.author_id,
                    "text": entry.text,
                    "content": [{"type": "text", "text": entry.text}],
                    "created_at": _time(entry).isoformat(),
                    "attachments": [],
                    "files": [],
                }
                for entry in said
            ],
        }
        for channel, said in _channels(entries)
    ]
    return _write(folder / "conversations.json", json.dumps(conversations))


def sharegpt(entries: list[Entry], folder: Path) -> Path:
    names = {"user": "human", "assistant": "gpt"}
    rows = [
        {"id": channel, "conversations": [{"from": names[e.author_id], "value": e.text} for e in said]}
        for channel, said in _channels(entries)
    ]
    return _write(folder / "sharegpt.json", json.dumps(rows, ensure_ascii=False))


def openai_jsonl(entries: list[Entry], folder: Path) -> Path:
    rows = [
        json.dumps({"messages": [{"role": e.author_id, "content": e.text} for e in said]}, ensure_ascii=False)
        for _, said in _channels(entries)
    ]
    return _write(folder / "train.jsonl", "\n".join(rows) + "\n")


def parquet(entries: list[Entry], folder: Path) -> Path:
    """Rows of Hugging Face's `messages`."""
    import pyarrow
    from pyarrow import parquet as files

    rows = [{"messages": [{"role": e.author_id, "content": e.text} for e in said]} for _, said in _channels(entries)]
    path = _made(folder / "train.parquet")
    files.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def alpaca(entries: list[Entry], folder: Path) -> Path:
    rows = []
    for _, said in _channels(entries):
        turns = [entry.text for entry in said]
        pairs = list(zip(turns[::2], turns[1::2], strict=True))
        rows.append({"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1], "history": pairs[:-1]})
    return _write(folder / "alpaca.json", json.dumps(rows))


def native(entries: list[Entry], folder: Path) -> Path:
    conversations = [
        {"messages": [{"role": e.author_id, "content": e.text} for e in said], "platform": "discord"}
        for _, said in _channels(entries)
    ]
    return _write(folder / "request.json", json.dumps({"org_id": "org_1", "conversations": conversations}))


def _channels(entries: Iterable[Entry]) -> list[tuple[str, list[Entry]]]:
    channels: dict[str, list[Entry]] = {}
    for entry in entries:
        channels.setdefault(entry.channel, []).append(entry)
    return list(channels.items())


def _time(entry: Entry) -> datetime:
    return datetime.fromtimestamp(entry.time or 0, UTC)


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(path: Path, text: str) -> Path:
    _made(path).write_bytes(text.encode())
    return path


def read(path: Path, options: ReadOptions | None = None) -> tuple[list[Entry], ImportReport]:
    """What an export is read as, all of it."""
    with open_history(path, options=options) as history:
        return list(history), history.report


def write_json(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path
