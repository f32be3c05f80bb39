"""Who is the persona, who opted out, and whose words are recorded."""

from __future__ import annotations

import json
import time

import pytest

from histories import T0, made_of, run, say, shown
from repertory.data.history import History, ImportReport
from repertory.data.preparation.identity import hashed, masking, record
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


def test_a_name_of_a_million_letters_is_compared_as_far_as_it_matters() -> None:
    entries = [say("bob", "hi", author="b" * 10**6), say("ana", "yo", 1, author="ab" * 10**6)]
    made = run(entries)
    assert made.report.persona == "ab" * 10**6


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
    assert "dora" not in str(made.report.style).casefold()
    everyone = "\n".join(m.content for c in run(entries, mask_others=True).conversations for m in c.messages)
    assert not {"Bob", "Carl", "Dora"} & set(everyone.replace(":", " ").split())


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Ana, ANA and @ana", "P1, P1 and @P1"),
        ("Banana, anas and ana_b", "Banana, anas and ana_b"),
        ("Ana Maria came", "P2 came"),
        ("Groß, GROSS and gross", "P3, P3 and P3"),
        ("🦊 fox x🦊 fox", "P4 x🦊 fox"),
        ("[Dr.] No said no", "P5 said no"),
        ("Jo stays", "Jo stays"),
        ("", ""),
    ],
)
def test_names_are_masked_where_they_are_words_of_their_own(text: str, masked: str) -> None:
    labels = {"ana": "P1", "Ana Maria": "P2", "Groß": "P3", "🦊 fox": "P4", "[Dr.] No": "P5", "Jo": "P6", " ": "P7"}
    assert masking(labels)(text) == masked


def test_masking_ten_thousand_names_takes_as_long_as_masking_one() -> None:
    mask = masking({f"User {number}": f"Person {number}" for number in range(10_000)})
    begun = time.process_time()
    for _ in range(10_000):
        assert mask("hello User 77, how are you today, and where is user 9999?").endswith("is Person 9999?")
    assert time.process_time() - begun < 10


def test_the_persona_cannot_be_excluded() -> None:
    with pytest.raises(InvalidInput, match="must not be used"):
        run([say("bob", "a"), say("ana", "b", 1)], exclude=["ana"])


def test_whose_words_are_in_it_is_recorded_hashed_and_per_organisation() -> None:
    entries = [say("bob", "a"), say("ana", "b", 1), say("carl", "c", 600), say("ana", "d", 601)]
    made = run(entries)
    assert made.authors == [["ana", "bob"], ["ana", "carl"]]
    lines = [json.loads(record(authors, "one")) for authors in made.authors]
    assert [len(hashes) for hashes in lines] == [2, 2]
    assert {*lines[0]} & {*lines[1]} == {hashed("ana", "one")}
    assert not {*lines[0]} & {*json.loads(record(made.authors[0], "two"))}
    assert "ana" not in str(lines)


def test_somebody_on_a_list_who_does_not_speak_is_told() -> None:
    made = run([say("bob", "a"), say("ana", "b", 1)], exclude=["Bbo", "carl"], mask=["bob"])
    told = [finding.what for finding in made.report.findings.kept if finding.code == "listed_unknown"]
    assert told == ["Nobody who speaks in this history is 'Bbo'.", "Nobody who speaks in this history is 'carl'."]
