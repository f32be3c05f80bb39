"""What teaches no voice is left out, and what is style is kept."""

from __future__ import annotations

import time

import pytest

from histories import dialogue, run, say, shown
from repertory.data.history import Entry
from repertory.data.preparation.noise import noise
from repertory.data.preparation.privacy import Surrogates
from repertory.data.preparation.style import style_card


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!play song", "command"),
        ("/roll 2d6", "command"),
        ("/me waves", None),
        ("!!!", None),
        ("...what", None),
        ("?", None),
        ("$5 is fine", None),
        ("https://x.y/z", "link_only"),
        ("<https://x.y/z> https://a.b", "link_only"),
        ("look https://x.y/z", None),
        ("lol", None),
        ("ok", None),
        ("   \n", "no_words"),
        ("```\n" + "x = 1\n" * 20 + "```", "code"),
        ("```\nx = 1\n```", None),
        ("a" * 4001, "too_long"),
    ],
)
def test_noise(text: str, reason: str | None) -> None:
    assert noise(say("ana", text), is_persona=True) == reason


PARTS = (
    "https://a",
    "<",
    "a.",
    "@",
    "1 ",
    "```",
    ":",
    "> ",
    "-----BEGIN ",
    "a@",
    "+49 1",
    "eyJaaaaaaaa-",
    "://a:",
    "pin ",
)


@pytest.mark.parametrize("part", PARTS)
def test_no_text_takes_a_pattern_for_ever(part: str) -> None:
    """Texts on which careless patterns take exponential or quadratic time: 4,000 characters of a chat, and 300,000 of a
    conversation with an assistant, which may have as many. A second is a hundred times enough where time is linear."""
    begun = time.process_time()
    chat = f"{part * (4000 // len(part))} x"
    noise(say("ana", chat), is_persona=True)
    style_card([chat], 1, 1)
    long = f"{part * (300_000 // len(part))}@ x"
    Surrogates().replace(long)
    noise(say("ana", long), is_persona=True)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("text", ["", " ", "\u200b", "\u200d \ufeff"])
def test_what_nobody_can_see_is_left_out(text: str) -> None:
    entries = [say("bob", "hi"), say("ana", text, 1), say("bob", "?", 2), say("ana", "yes", 3)]
    assert [shown(c) for c in run(entries).conversations] == [["hi\n?", "*yes"]]
    turns = [("user", "hi"), ("assistant", text), ("user", "?"), ("assistant", "yes")]
    said = [Entry("1", f"{n}", role, role, words) for n, (role, words) in enumerate(turns)]
    made = dialogue(said)
    assert [shown(c) for c in made.conversations] == [["hi\n?", "*yes"]]


def test_others_links_are_context_and_forwards_are_not_the_authors_voice() -> None:
    assert noise(say("bob", "https://x.y/z"), is_persona=False) is None
    assert noise(say("ana", "theirs", is_forwarded=True), is_persona=True) == "forwarded"
    entries = [say("bob", "hi"), say("ana", "> hi\n> there\nhello", 1)]
    assert shown(run(entries).conversations[0]) == ["hi", "*hello"]
