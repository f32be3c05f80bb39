"""The same conversations of real people, exported by four programs, are the same prepared dataset."""

from __future__ import annotations

import json
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import pytest

import exports
from histories import Made, made_of
from repertory.data.history import Entry
from repertory.data.preparation.pipeline import PrepareOptions
from repertory.data.readers import open_history

PERSONA = "5e5f6bde-85ca-492e-8c7c-dfd1dbf39580"
CHATS = 120


@pytest.fixture(scope="module")
def said() -> list[Entry]:
    """The first chats of the person with the fourth most of them, times floored to the minute, as WhatsApp has them."""
    chats = json.loads(files("chitchat_dataset").joinpath("dataset.json").read_text())
    entries: list[Entry] = []
    taken = 0
    for chat, about in chats.items():
        messages = [message for burst in about["messages"] for message in burst]
        if PERSONA not in {message["sender"] for message in messages} or taken == CHATS:
            continue
        taken += 1
        for message in messages:
            minute = int(datetime.fromisoformat(message["timestamp"]).timestamp()) // 60 * 60
            name = f"Student {message['sender'][:6]}"
            number = str(len(entries) + 1)
            entries.append(Entry(chat, number, message["sender"], name, message["text"], float(minute)))
    return entries


def test_four_exports_of_the_same_chats_prepare_alike(said: list[Entry], tmp_path: Path) -> None:
    made = [
        _prepared(write(said, tmp_path))
        for write in (exports.discord, exports.slack, exports.telegram, exports.whatsapp)
    ]
    first = made[0]
    assert len(first.conversations) > CHATS / 2  # in some chats only one person spoke
    assert first.report.trained_turns > 500
    for other in made[1:]:
        assert other.conversations == first.conversations
        assert other.system_prompt == first.system_prompt
        assert other.split == first.split
        assert other.report.stages[1:] == first.report.stages[1:]  # the first counts WhatsApp's own notices too
        assert other.report.style == first.report.style
    assert first.report.leakage.held_out_turns > 0
    assert first.report.leakage.same_exchange == first.report.leakage.same_long_reply == 0


def _prepared(path: Path) -> Made:
    with open_history(path) as history:
        return made_of(history, PrepareOptions(persona=[f"Student {PERSONA[:6]}"]))
