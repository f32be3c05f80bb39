"""The same is learned once, and nothing held out is learned."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from random import Random

import pytest

from histories import conversation, run, say, shown
from repertory.data.conversations import Conversation
from repertory.data.preparation import context
from repertory.data.preparation.duplicates import Duplicates, leakage, pairs
from repertory.data.preparation.scratch import Scratch
from repertory.data.prepare import split


def unrepeated(conversations: list[Conversation]) -> tuple[list[Conversation | None], Counter[str]]:
    with Scratch() as scratch:
        duplicates = Duplicates(scratch, sum(len(list(pairs(one))) for one in conversations))
        return [duplicates.revised(one) for one in conversations], duplicates.reasons


def test_the_same_exchange_is_learned_once_whatever_its_case_and_system_prompt() -> None:
    kept, reasons = unrepeated(
        [
            conversation("Hi there", "Hello"),
            conversation("hi  THERE", "hello", system="be kind"),
            conversation("other", "hello", "hi there", "hello"),
        ]
    )
    assert kept[1] is None
    assert kept[2] is not None
    assert shown(kept[2]) == ["other", "*hello", "hi there", "-hello"]
    assert reasons == {"exact_duplicate": 2}


def test_nearly_the_same_long_reply_is_learned_once() -> None:
    long = "I have been thinking about the garden all day and I really believe we should plant more tomatoes this year"
    kept, reasons = unrepeated(
        [
            conversation("a", long),
            conversation("b", long + "!"),
            conversation("c", "we should rather plant nothing at all this year, " * 2),
        ]
    )
    assert [one is not None for one in kept] == [True, False, True]
    assert reasons == {"near_duplicate": 1}


def test_a_reply_of_any_length_is_compared_in_little_memory() -> None:
    long = "".join(f"word {number} " for number in range(60_000))
    tracemalloc.start()
    kept, reasons = unrepeated([conversation("a", long), conversation("b", f"{long} end")])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(kept), reasons) == (2, {"near_duplicate": 1})
    assert peak < 40e6  # 600,000 shingles at once would be 300 MB of numbers, some times over


def test_short_replies_are_style_and_only_capped() -> None:
    kept, reasons = unrepeated([conversation(f"question {n}", "yeah") for n in range(40)])
    assert sum(one is not None for one in kept) == 5
    assert reasons == {"repeated_reply": 35}


def test_what_is_held_out_is_the_latest_and_nothing_of_it_is_trained_on() -> None:
    random = Random(3)
    entries, minute = [], 0.0
    for number in range(400):
        minute += random.choice([30, 60, 200])
        spam = random.random() < 0.3
        entries.append(say("bob", "again?" if spam else f"question {number}", minute))
        entries.append(
            say(
                "ana",
                "the very same long answer that is pasted each and every time" if spam else f"answer {number}",
                minute + 1,
            )
        )
    made = run(entries, gap_seconds=100)
    report = made.report
    assert report.leakage.held_out_turns > 10
    assert (report.leakage.same_exchange, report.leakage.same_long_reply) == (0, 0)
    times = [made.conversations[at].timestamp for at in made.split.training]
    later = [made.conversations[at].timestamp for at in made.split.held_out]
    assert max(t for t in times if t) < min(t for t in later if t)


def test_leakage_is_seen_where_there_is_some() -> None:
    one, two = conversation("hi", "a" * 50), conversation("hi there", "a" * 50)
    assert leakage([one], [one]) == (1, 1, 1)
    assert leakage([one], [two]) == (0, 1, 1)
    assert list(pairs(one)) == [("hi", "a" * 50)]


def test_parts_of_one_session_are_never_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "MAX_CHARACTERS", 40)
    entries = []
    for session in range(30):
        for turn in range(8):
            entries.append(say(("bob", "ana")[turn % 2], f"session {session} turn {turn}", 600 * session + turn))
    made = run(entries, gap_seconds=3600)
    parts = split([one.timestamp for one in made.conversations], 0.1, seed=0)
    held_out = {made.conversations[at].timestamp for at in parts.held_out}
    assert held_out
    assert not held_out & {made.conversations[at].timestamp for at in parts.training}
