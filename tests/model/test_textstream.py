from __future__ import annotations

from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from repertory.model.textstream import REPLACEMENT, TextStream

TOKENIZER = tiny.make_tokenizer()


def decode(ids: object) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def streamed(text: str, stop: list[str]) -> list[str]:
    stream = TextStream(decode, stop)
    pieces = []
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*pieces, stream.rest()]


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00" + REPLACEMENT), max_size=40))
def test_pieces_join_to_the_whole_text_and_no_character_arrives_broken(text: str) -> None:
    pieces = streamed(text, [])
    assert "".join(pieces) == decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]).strip()
    assert REPLACEMENT not in "".join(pieces)


def test_an_emoji_of_many_tokens_comes_in_whole_characters() -> None:
    pieces = streamed("hey 👩‍👩‍👧!", [])
    assert "".join(pieces) == "hey 👩‍👩‍👧!"
    assert "" in pieces  # bytes of an unfinished character were held back


EMOJI = ["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪", "🇯🇵", "❤️", "👨🏿‍🚀", "😀", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"]


@settings(deadline=None)
@given(
    parts=st.lists(st.sampled_from([*EMOJI, "日本", "한국", "é", "ok", " ", "a"]), min_size=1, max_size=8),
    stop=st.sampled_from([[], ["ok a"], ["日本語"]]),
    continues=st.booleans(),
)
def test_no_emoji_is_cut_in_two_between_pieces(parts: list[str], stop: list[str], continues: bool) -> None:
    ids = TOKENIZER("".join(parts), add_special_tokens=False)["input_ids"]
    stream = TextStream(decode, stop, TOKENIZER("x", add_special_tokens=False)["input_ids"] if continues else ())
    told = ""
    ends = []
    for token in ids:
        told += stream.push(token)
        ends.append(len(told))
        if stream.is_stopped:
            break
    told += stream.rest()
    begin = 0
    for character in regex.findall(r"\X", told):
        if regex.search(r"\p{Extended_Pictographic}|\p{Regional_Indicator}", character):
            assert not any(begin < end < begin + len(character) for end in ends), (character, ends)
        begin += len(character)
    if not stop:
        assert told == ("".join(parts) if continues else "".join(parts).strip())


def test_words_do_not_wait_for_what_follows_them() -> None:
    stream = TextStream(decode, [])
    ids = TOKENIZER("ok 日本", add_special_tokens=False)["input_ids"]
    assert "".join(stream.push(token) for token in ids) == "ok 日本"


def test_an_emoji_before_a_stop_string_is_told() -> None:
    assert "".join(streamed("hi 😀STOP and more", ["STOP"])) == "hi 😀"
    assert "".join(streamed("hi 😀 STOP", ["STOP"])) == "hi 😀"


@given(
    text=st.text(alphabet="abc ", max_size=30),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_and_none_of_it_leaks(text: str, stop: list[str]) -> None:
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    # A stop string is acted upon as soon as it is whole, so of two that overlap the one that ends first may win.
    told = "".join(streamed(text, stop))
    if not found:
        assert told == text.strip()
    else:
        assert all(s not in told for s in stop)
        assert told in [text[:at].strip() for at in range(len(text)) if text.startswith(tuple(stop), at)]


def test_white_space_around_a_reply_is_left_out_and_within_it_kept() -> None:
    pieces = streamed(" \n Arr,  matey!\n\nAye. \n", [])
    assert "".join(pieces) == "Arr,  matey!\n\nAye."


@given(
    text=st.text(alphabet="abc 👩‍👧日", max_size=30),
    stop=st.lists(st.text(alphabet="abc 日", min_size=1, max_size=4), max_size=2),
)
def test_the_tokens_told_are_those_of_the_text_told(text: str, stop: list[str]) -> None:
    stream = TextStream(decode, stop)
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    told = ""
    for token in ids:
        told += stream.push(token)
        covered = decode(ids[: stream.tokens_told])
        assert told.startswith(covered.strip())
        assert not any(one in covered for one in stop)
        if stream.is_stopped:
            return
    told += stream.rest()
    assert decode(ids[: stream.tokens_told]).strip() == told


@pytest.mark.parametrize("tokenizer", [TOKENIZER, tiny.make_metaspace_tokenizer(None)], ids=["bytes", "spaces"])
def test_a_continued_text_keeps_its_white_space(tokenizer: Any) -> None:
    ids = tokenizer("Hello! and on it went 👩‍👩‍👧 \n", add_special_tokens=False)["input_ids"]
    for at in (1, 3, 5):  # within the words that are told
        told = tokenizer.decode(ids[:at], skip_special_tokens=True)
        stream = TextStream(tokenizer.decode, ["STOP"], ids[:at])
        pieces = [stream.push(token) for token in ids[at:]]
        assert told + "".join(pieces) + stream.rest() == "Hello! and on it went 👩‍👩‍👧 \n"
