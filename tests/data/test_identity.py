"""Who is the persona, who opted out, and whose words are recorded."""

from __future__ import annotations

import pytest

from histories import T0, made_of, run, say, shown
from repertory.data.history import History, ImportReport
from repertory.data.preparation.pipeline import PrepareOptions
from repertory.errors import InvalidInput


def test_two_accounts_are_one_persona_and_a_third_is_suggested() -> None:
    entries = [
        say("bob", "hi", 0),
        say("ana", "one", 0.5),
        say("ana2", "two", 1),
        say("bob", "yes", 2),
        say("ana2", "three", 2.5),
        say("anna", "me too", 3, author="Ana_"),
    ]
    made = made_of(History(entries, ImportReport("test")), PrepareOptions(persona=["ana", "ana2"]))
    assert shown(made.conversations[0]) == ["Bob: hi", "*one\ntwo", "Bob: yes", "*three"]
    assert [f.what for f in made.report.findings.kept if f.code == "persona_alike"] == [
        "'Ana_' (1 messages) may be the persona too."
    ]


def test_somebody_unknown_is_an_error_with_near_matches() -> None:
    with pytest.raises(InvalidInput) as refused:
        run([say("robert", "hi"), say("ana", "yo", 1)], persona="Robart")
    assert refused.value.code == "persona_unknown"
    assert "Robert (1 messages)" in refused.value.cure


def test_a_name_of_two_people_is_an_error_with_their_ids() -> None:
    entries = [say("1", "hi", author="John Smith"), say("2", "ho", 1, author="John Smith")]
    with pytest.raises(InvalidInput) as refused:
        run(entries, persona="john smith")
    assert refused.value.code == "persona_ambiguous"
    assert "1, 2" in refused.value.cure


def test_words_after_the_clone_went_live_are_left_out() -> None:
    entries = [say("bob", "a", 0), say("ana", "b", 1), say("bob", "c", 10), say("ana", "the clone speaks", 11)]
    made = run(entries, live_since=T0 + 600)
    assert [shown(c) for c in made.conversations] == [["a", "*b"]]
    assert made.report.stages[1].dropped == {"after_clone_went_live": 2}


def test_a_bot_can_be_the_persona_and_other_bots_are_left_out() -> None:
    entries = [
        say("bob", "!roll", 0),
        say("ana", "hello", 1, is_bot=True),
        say("dice", "6", 1.5, is_bot=True),
        say("bob", "nice", 2),
        say("ana", "indeed", 3, is_bot=True),
    ]
    assert [shown(c) for c in run(entries).conversations] == [["-hello", "nice", "*indeed"]]


def test_excluded_people_are_nowhere_and_masked_ones_have_no_name() -> None:
    entries = [
        say("carl", "my secret", 0),
        say("bob", "carl said something, right Dora?", 1),
        say("ana", "dora knows Carl", 2),
        say("dora", "i do", 3),
        say("ana", "see", 4),
    ]
    made = run(entries, exclude=["Carl"], mask=["dora"])
    text = "\n".join(message.content for c in made.conversations for message in c.messages)
    assert "secret" not in text
    assert "carl" not in text.casefold()
    assert "dora" not in text.casefold()
    assert text.split("\n")[0] == "Bob: Person 1 said something, right Person 2?"
    assert "Person 2: i do" in text
    everyone = "\n".join(m.content for c in run(entries, mask_others=True).conversations for m in c.messages)
    assert not {"Bob", "Carl", "Dora"} & set(everyone.replace(":", " ").split())


def test_the_persona_cannot_be_excluded() -> None:
    with pytest.raises(InvalidInput, match="must not be used"):
        run([say("bob", "a"), say("ana", "b", 1)], exclude=["ana"])


def test_whose_words_are_in_it_is_recorded_hashed_and_per_organisation() -> None:
    entries = [say("bob", "a"), say("ana", "b", 1), say("carl", "c", 600), say("ana", "d", 601)]
    made = run(entries, org_id="one")
    assert [len(authors) for authors in made.authors] == [2, 2]
    assert made.authors[0] != made.authors[1]
    assert len({*made.authors[0]} & {*made.authors[1]}) == 1
    assert not {*made.authors[0]} & {*run(entries, org_id="two").authors[0]}
