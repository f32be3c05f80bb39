"""What the persona said, after what it read; what is answered is marked."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from histories import run, say, shown
from repertory.data.history import Entry
from repertory.data.preparation import context
from repertory.data.preparation.context import Voices, target
from repertory.data.preparation.sessions import turns


def test_each_turn_of_the_persona_is_trained_exactly_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "MAX_CHARACTERS", 100)
    random = Random(2)
    minute, entries = 0.0, []
    for number in range(300):
        minute += random.choice([0.5, 3, 5, 50, 90])
        entries.append(say(random.choice(["ana", "bob", "carl"]), f"message number {number}", minute))
    made = run(entries, gap_seconds=3600)
    learned: Counter[str] = Counter()
    for conversation in made.conversations:
        for message in conversation.messages:
            if message.is_trained:
                learned.update(message.content.split("\n"))
    assert set(learned.values()) == {1}
    conversations = made.report.stages[-2]
    assert conversations.before == conversations.after + conversations.dropped["nobody_prompted"]
    assert len(learned) >= conversations.after > 40


def test_a_cut_session_repeats_what_came_before_as_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "MAX_CHARACTERS", 30)
    entries = [
        say("bob", "first question", 0),
        say("ana", "first answer", 1),
        say("bob", "second question", 9),
        say("ana", "second answer", 10),
    ]
    assert [shown(c) for c in run(entries).conversations] == [
        ["first question", "*first answer"],
        ["first question", "-first answer", "second question", "*second answer"],
    ]


def test_an_opening_of_the_persona_is_read_and_not_learned() -> None:
    entries = [say("ana", "anyone?", 0), say("bob", "me", 1), say("ana", "hi", 2), say("bob", "bye", 3)]
    made = run(entries)
    assert [shown(c) for c in made.conversations] == [["-anyone?", "me", "*hi"]]
    assert made.report.stages[-2].dropped == {"nobody_prompted": 1}


def test_speakers_are_named_where_more_than_two_speak() -> None:
    entries = [say("bob", "a", 0), say("carl", "b", 1), say("ana", "c", 2)]
    made = run(entries)
    assert shown(made.conversations[0]) == ["Bob: a\nCarl: b", "*c"]
    assert made.system_prompt == "You are Ana, chatting. Where several people speak, each line says who."


@pytest.mark.parametrize(
    ("reply", "more"),
    [
        ("the first", {"reply_to": "q1"}),
        ("the first", {"mentions": ("bob",)}),
        ("@Bob the first", {}),
        ("bob: the first", {}),
        ("Bob, the first", {}),
    ],
)
def test_the_message_that_is_answered_is_marked(reply: str, more: dict[str, Any]) -> None:
    entries = [
        say("bob", "which one do you want?", 0, id="q1"),
        say("carl", "nice weather", 1),
        say("dora", "indeed", 2),
        say("ana", reply, 3, **more),
    ]
    (made,) = run(entries).conversations
    assert made.messages[0].content.split("\n")[-1] == '(replying to Bob: "which one do you want?")'
    assert made.messages[1].content == reply


def test_the_mark_is_cut_and_the_last_message_is_not_marked() -> None:
    entries = [say("carl", "x", 0), say("bob", "y " * 100, 1, id="q"), say("ana", "ok", 2, reply_to="q")]
    assert "replying" not in shown(run(entries).conversations[0])[0]
    entries.insert(2, say("carl", "z", 1.5))
    assert shown(run(entries).conversations[0])[0].endswith('y y…")')


@pytest.mark.parametrize(("with_ids", "floor"), [(False, 0.6), (True, 0.99)])
def test_the_answered_message_is_found_in_busy_channels(with_ids: bool, floor: float) -> None:
    """Synthetic channels with the shape of Ubuntu's IRC: several conversations at once, so that the answered message is
    the last one by somebody else in about 3 of 10 cases; 59% of the replies begin with the addressee's nick."""
    right = total = last = 0
    for seed in range(20):
        said, answers = _busy_channel(Random(seed), with_ids)
        found = list(turns(said, 900))
        where = {ident: at for at, turn in enumerate(found) for ident in turn.ids}
        voices = Voices({"p0"}, {f"p{n}": f"nick{n}" for n in range(8)})
        for reply, answered in answers.items():
            at = where[reply]
            if found[at].ids[0] != reply:
                continue
            total += 1
            got, _ = target(found, at, voices)
            right += got == where[answered]
            others = [i for i in range(at) if found[i].author_id != found[at].author_id]
            last += others[-1] == where[answered]
    assert total > 2000
    assert 0.2 < last / total < 0.4, "the channels are not as busy as real ones"
    print(
        f"\nright target with_ids={with_ids}: {right / total:.1%} of {total}; last by somebody else: {last / total:.1%}"
    )
    assert right / total >= floor


def _busy_channel(random: Random, with_ids: bool) -> tuple[list[Entry], dict[str, str]]:
    """Three to five conversations of two or three people each, interleaved; each message answers its conversation."""
    people = [f"p{n}" for n in range(8)]
    running: list[tuple[list[str], list[Entry]]] = []
    said: list[Entry] = []
    answers: dict[str, str] = {}
    wanted = random.randint(3, 5)
    minute = 0.0
    for number in range(300):
        minute += random.expovariate(1)
        while len(running) < wanted:
            running.append((random.sample(people, random.choice([2, 2, 3])), []))
        members, messages = random.choice(running)
        author = random.choice([one for one in members if not messages or one != messages[-1].author_id])
        answered = messages[-1] if messages else None
        text = f"text {number}"
        if answered and random.random() < 0.59:
            text = f"nick{answered.author_id[1:]}: {text}"
        entry = say(author, text, minute, id=f"{number}", reply_to=answered.id if answered and with_ids else None)
        if answered:
            answers[entry.id] = answered.id
        messages.append(entry)
        said.append(entry)
        if random.random() < 0.05:
            running.remove((members, messages))
    return said, answers
