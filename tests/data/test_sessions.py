"""Bursts, threads and pauses."""

from __future__ import annotations

from random import Random

from histories import run, say, shown
from repertory.data.preparation.sessions import gap_for, knee, turns


def test_bursts_within_two_minutes_are_one_turn() -> None:
    entries = [say("ana", "a", 0), say("ana", "b", 2), say("ana", "c", 4.1), say("bob", "d", 4.2), say("ana", "e", 4.3)]
    assert [turn.texts for turn in turns(entries, 1800)] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_message_that_answers_something_else_begins_a_turn() -> None:
    entries = [say("ana", "a", 0), say("ana", "b", 0.1, reply_to="x"), say("ana", "c", 0.2)]
    assert [turn.texts for turn in turns(entries, 1800)] == [["a"], ["b", "c"]]


def test_a_pause_of_a_day_and_five_minutes_is_not_five_minutes() -> None:
    entries = [say("bob", "a", 0), say("ana", "b", 1), say("bob", "c", 24 * 60 + 6), say("ana", "d", 24 * 60 + 7)]
    assert [shown(c) for c in run(entries).conversations] == [["a", "*b"], ["c", "*d"]]


def test_a_reply_after_a_pause_stays_with_what_it_answers() -> None:
    entries = [say("bob", "question", 0, id="q"), say("ana", "hm", 1), say("ana", "answer", 300, reply_to="q")]
    assert [shown(c) for c in run(entries).conversations] == [["question", "*hm\nanswer"]]


def test_threads_are_sessions_of_their_own_after_what_they_hang_from() -> None:
    entries = [
        say("bob", "who has the report?", 0, id="q"),
        say("carl", "lunch?", 1),
        say("ana", "yes, lunch", 2),
        say("ana", "I do", 500, thread="q", reply_to="q"),
        say("bob", "thanks", 501, thread="q", reply_to="q"),
        say("ana", "sure", 502, thread="q", reply_to="q"),
    ]
    made = run(entries)
    assert [shown(c) for c in made.conversations] == [
        ["Bob: who has the report?\nCarl: lunch?", "*yes, lunch"],
        ["who has the report?", "*I do", "thanks", "*sure"],
    ]


def test_channels_are_never_mixed() -> None:
    entries = [say("bob", "a", 0, channel="x"), say("carl", "b", 0.5, channel="y"), say("ana", "c", 1, channel="x")]
    assert [shown(c) for c in run(entries).conversations] == [["a", "*c"]]


def test_the_knee_lies_between_the_pauses_within_and_between_conversations() -> None:
    random = Random(1)
    within = [int(random.lognormvariate(3, 1.2)) + 1 for _ in range(5000)]  # median 20 s
    between = [int(random.lognormvariate(11, 1)) for _ in range(250)]  # median 17 h
    found = knee(within + between)
    assert found is not None
    assert 5 * 60 <= found <= 6 * 3600
    assert sum(gap > found for gap in within) / len(within) < 0.01
    assert sum(gap < found for gap in between) / len(between) < 0.05


def test_pauses_without_a_knee_have_a_default_for_two_and_for_a_group() -> None:
    two = [say("ana", "a", 0), say("bob", "b", 1)]
    assert run(two, "bob").report.gap_found_by == "two people"
    assert run([*two, say("carl", "c", 2)], "bob").report.gap_found_by == "a group"
    assert gap_for([60], in_groups=False) == (1800, "two people")
    assert gap_for([60], in_groups=True) == (900, "a group")
    assert knee([60] * 1000) is None
