"""Exports with values of another kind and with bytes that are none, read and prepared: a report or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

import exports
from repertory.data.history import Entry
from repertory.data.imports import ImportOptions, ImportOrder
from repertory.data.preparation import worker

CHATS = (
    exports.discord, exports.discord_csv, exports.discord_package, exports.slack, exports.telegram, exports.whatsapp,
    exports.messenger, exports.instagram_sealed, exports.twitch, exports.irc, exports.generic_csv,
)  # fmt: skip
DIALOGUES = (
    exports.chatgpt, exports.claude, exports.sharegpt, exports.alpaca, exports.openai_jsonl, exports.parquet,
    exports.native,
)  # fmt: skip
STRANGE = (None, True, -1, 1e308, 10**30, "", "x", "\ud800", "\0", [], {}, [None], {"id": None}, "2024-13-45", "nan")


def spoilt(value: Any, random: Random) -> Any:
    """A value of JSON in which some are other ones, and some are missing."""
    if random.random() < 0.03:
        return random.choice(STRANGE)
    if isinstance(value, dict):
        return {name: spoilt(one, random) for name, one in value.items() if random.random() > 0.01}
    if isinstance(value, list):
        return [spoilt(one, random) for one in value]
    return value


def spoilt_bytes(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 3, 20))):
        at = random.randrange(len(changed) or 1)
        changed[at : at + random.choice((0, 1, 1, 40))] = bytes(random.choices(range(256), k=random.choice((0, 1, 5))))
    return bytes(changed) or b"\0"


def said(write: exports.Write) -> list[Entry]:
    who = ("user", "assistant") if write in DIALOGUES else ("Ana", "Bob: x")
    return [
        Entry(f"{n // 8}", f"{n + 1}", who[n % 2], who[n % 2], f"words 👋 {n}\n> {n}", 1.6e9 + 90 * n)
        for n in range(16)
    ]


@pytest.mark.parametrize("write", [*CHATS, *DIALOGUES], ids=lambda write: write.__name__)
def test_a_spoilt_export_ends_in_a_report_or_a_refusal(write: exports.Write, tmp_path: Path) -> None:
    random, ends = Random(8300), set()
    persona = [] if write in DIALOGUES else ["Ana"]
    for number in range(60):
        folder = tmp_path / f"{number}"
        path = write(said(write), folder / "made")
        for file in [one for one in (path, *path.rglob("*")) if one.is_file()]:
            content = file.read_bytes()
            if file.suffix == ".json" and random.random() < 0.7:
                file.write_text(json.dumps(spoilt(json.loads(content), random)))
            else:
                file.write_bytes(spoilt_bytes(content, random))
        (folder / "export").mkdir()
        path.rename(folder / "export" / path.name)
        options = ImportOptions(persona=persona, exclude=["x"], mask_others=number % 2 == 0, day_first=True)
        end = worker.run(folder, ImportOrder(org_id="a", options=options), lambda event: None)
        assert end.model_dump_json()
        assert end.error is None or end.error.cure
        ends.add(end.status if end.error is None else end.error.code)
    assert len(ends) > 1, f"all of them ended alike: {ends}"
