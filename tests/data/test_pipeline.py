"""The stages together, and the report about them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from histories import T0, dialogue, made_of, run, say, shown
from repertory.data.history import Entry
from repertory.data.preparation.noise import MAX_CHARACTERS
from repertory.data.preparation.pipeline import MAX_STYLED, PrepareOptions
from repertory.data.preparation.scratch import Scratch
from repertory.data.preparation.style import style_card
from repertory.data.readers import open_history
from repertory.errors import InvalidInput


def test_style_card() -> None:
    card = style_card(["hey there 😂", "i don't know", "WHAT is it?", "Ok.", "не знаю"], messages=5, turns=2)
    assert (card.messages, card.messages_per_turn) == (5, 2.5)
    assert (card.lower_case, card.capital_first, card.emoji) == (0.6, 0.4, 0.2)
    assert card.ends_with == {"nothing": 0.4, "emoji": 0.2, "?": 0.2, ".": 0.2}
    assert card.top_emoji == [("😂", 1)]
    assert ("don't know", 1) in card.top_phrases
    assert card.languages == {"en": 0.5, "Cyrillic": 0.5}


def test_the_style_of_an_assistant_s_long_words_is_told_in_little_memory() -> None:
    turns = []
    for number in range(300):
        text = " ".join(f"w{number * at % 9973}" for at in range(10_000))
        turns += [Entry(f"{number}", "1", "user", "user", "go on"), Entry(f"{number}", "2", *["assistant"] * 2, text)]
    with Scratch() as scratch:
        scratch.keep(turns)
        tracemalloc.start()
        sample = scratch.texts_of("assistant", MAX_STYLED, MAX_CHARACTERS)
        card = style_card(sample, 300, 300)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (card.messages, card.median_characters) == (300, MAX_CHARACTERS)
    assert peak < 20e6  # the texts have 17 MB, their words and phrases some 60 times as much


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("das ist nicht gut, 5 µm und ℓ", "de"),
        ("the 𝓯𝓪𝓷𝓬𝔂 one", "en"),
        ("you say привет", "en"),
        ("say привет мир", "Cyrillic"),
        ("すごい", "Hiragana"),
        ("한글 ok", "Hangul"),
        ("😂", None),
    ],
)
def test_the_language_of_a_message(text: str, language: str | None) -> None:
    assert list(style_card([text], 1, 1).languages) == ([language] if language else [])


def test_the_report_warns_of_what_will_not_do() -> None:
    entries = [say("bob", f"line {n}", n) for n in range(100)] + [say("ana", "hm", 100)]
    report = run(entries).report
    assert {"little_data", "persona_speaks_little"} <= set(report.findings.counts)
    assert report.persona_share == 0.01
    monologue = run([say("bob", "hi", 0)] + [say("ana", f"line {n}", n) for n in range(1, 100)]).report
    assert (monologue.persona_share, monologue.findings.counts["one_sided"]) == (0.99, 1)
    with pytest.raises(InvalidInput) as refused:
        run([say("ana", "alone", 0), say("ana", "still", 10)])
    assert refused.value.code == "nothing_to_learn"
    assert "nobody_prompted 2" in refused.value.message


def test_where_nothing_is_read_the_refusal_says_why(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"messages": [{"role": "martian", "content": "hi"}]}]')
    with open_history(tmp_path / "t.json") as history, pytest.raises(InvalidInput) as refused:
        made_of(history, PrepareOptions())
    assert refused.value.code == "nothing_read"
    assert "t.json: Record 1: the role 'martian' is not known" in refused.value.message


def test_every_stage_adds_up() -> None:
    entries = [
        say("bob", "hi", 0),
        say("ana", "!cmd", 1),
        say("ana", "yo", 2),
        say("bot", "beep", 3, is_bot=True),
        say("bob", "", 4),
        Entry("c", "s", "bob", "Bob", "joined", T0 + 5.0, kind="service"),
    ]
    reading, people, noise_stage, bursts, *_ = run(entries).report.stages
    assert (reading.before, reading.after, reading.dropped) == (6, 5, {"service": 1})
    assert (people.before, people.after, people.dropped) == (5, 4, {"bot": 1})
    assert (noise_stage.before, noise_stage.after, noise_stage.dropped) == (4, 2, {"command": 1, "no_words": 1})
    assert (bursts.before, bursts.after) == (2, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1e300, 1e300])
def test_a_time_that_is_none_is_reported_and_stalls_nothing(wrong: float) -> None:
    entries = [say("bob", "hi"), say("ana", "yes", 1)]
    entries[0].time = wrong
    made = run(entries)
    assert [shown(c) for c in made.conversations] == [["hi", "*yes"]]
    assert made.report.findings.counts["time_missing"] == 1


def test_names_that_are_no_unicode_are_mended() -> None:
    entries = [say("bob", "hi", author="B\ud800b"), say("carl", "ho", 0.5, author="C\0"), say("ana", "yes", 1)]
    entries[0].author_id = "b\udfff"
    made = run(entries)
    assert shown(made.conversations[0]) == ["B\ufffdb: hi\nC\ufffd: ho", "*yes"]
    assert made.report.findings.counts["text_repaired"] == 2


def test_conversations_with_an_assistant_are_kept_as_they_are() -> None:
    def turn(channel: str, role: str, text: str, **more: Any) -> Entry:
        kind = "prompt" if role == "system" else "said"
        return Entry(channel, text, role, role, text, None, kind=kind, **more)  # type: ignore[arg-type]

    entries = [
        turn("1", "system", "be kind"),
        turn("1", "user", "!help"),
        turn("1", "assistant", "https://x.y"),
        turn("2", "user", "b"),
        turn("2", "assistant", "bad", is_trained=False),
        turn("2", "user", "again"),
        turn("2", "assistant", "good"),
    ]
    made = dialogue(entries)
    assert [shown(c) for c in made.conversations] == [
        ["#be kind", "!help", "*https://x.y"],
        ["b", "-bad", "again", "*good"],
    ]
    assert made.system_prompt is None
    long = [turn("3", role, f"{role} {n} " * 300) for n in range(3) for role in ("user", "assistant")]
    (uncut,) = dialogue(long).conversations
    assert len(uncut.messages) == 6
    swapped = dialogue(entries, persona=["user"])
    assert [shown(c) for c in swapped.conversations] == [["-b", "bad", "*again"]]
