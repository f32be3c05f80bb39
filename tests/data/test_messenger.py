"""What Messenger's and Instagram's exports are known to get importers wrong."""

from __future__ import annotations

from pathlib import Path

from exports import read, write_json


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
    entries, report = read(
        write_json(tmp_path / "e/inbox/t_1/message_1.json", {"messages": records, "title": "t"}).parents[2]
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
        write_json(tmp_path / "inbox/t" / part, {"messages": records})
    entries, report = read(tmp_path / "inbox")
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
    entries, _ = read(
        write_json(tmp_path / "t.json", {"participants": ["Zoë"], "threadName": "t", "messages": records})
    )
    assert [(entry.kind, entry.text) for entry in entries] == [
        ("said", "Ã© is what I typed"),
        ("said", ""),
        ("deleted", ""),
    ]
