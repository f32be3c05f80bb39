"""Real people as voices. The numbers are those of chitchat-dataset 0.9.0, as the module's docstring states them."""

from __future__ import annotations

import sys

import pytest

from repertory.data import chitchat
from repertory.data.conversations import Conversation
from repertory.errors import NotFound, RepertoryError


@pytest.fixture(scope="module")
def talkative() -> list[str]:
    return chitchat.people(min_conversations=100)


def test_nine_people_have_a_hundred_conversations_and_far_more_than_200_pieces(talkative: list[str]) -> None:
    counts = sorted(len(chitchat.voice(person)) for person in talkative)
    assert len(talkative) == 9
    assert (counts[0], counts[-1], sum(counts)) == (759, 6534, 23838)
    assert sum(len(chitchat.voice(person)) >= 200 for person in chitchat.people(5)) == 59


def test_pieces_are_a_few_exchanges_long(talkative: list[str]) -> None:
    lengths = sorted(_characters(piece) for person in talkative for piece in chitchat.voice(person))
    assert [lengths[int((len(lengths) - 1) * share)] for share in (0.05, 0.25, 0.75, 0.95, 1)] == [
        149,
        227,
        362,
        592,
        4994,
    ]


def test_the_other_begins_the_person_ends_and_they_alternate(talkative: list[str]) -> None:
    for piece in chitchat.voice(talkative[0]):
        roles = [message.role for message in piece.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 1 <= len(roles) // 2 <= chitchat.PIECE_EXCHANGES


def test_pieces_come_in_order_of_time_and_the_limit_takes_the_first(talkative: list[str]) -> None:
    pieces = chitchat.voice(talkative[1])
    times = [piece.timestamp for piece in pieces if piece.timestamp]
    assert len(times) == len(pieces)
    assert times == sorted(times)
    assert chitchat.voice(talkative[1], limit=200) == pieces[:200]


def test_a_burst_of_messages_is_one_turn_with_a_line_for_each() -> None:
    bursts = [_burst("ana", "hi", "  "), _burst("ana", "how are you?"), _burst("ben", "fine", "you?")]
    assert [turn.text for turn in chitchat._turns(bursts)] == ["hi\nhow are you?", "fine\nyou?"]


def test_what_nobody_prompted_and_what_stayed_unanswered_is_left_out() -> None:
    chat = tuple(
        chitchat._turns([_burst("ana", "hello?"), _burst("ben", "yes"), _burst("ana", "ah"), _burst("ben", "so?")])
    )
    assert [[turn.text for turn in piece] for piece in chitchat._pieces(chat, "ana")] == [["yes", "ah"]]
    assert [[turn.text for turn in piece] for piece in chitchat._pieces(chat, "ben")] == [
        ["hello?", "yes", "ah", "so?"]
    ]


def test_somebody_unknown_is_an_error_that_says_who_there_is() -> None:
    with pytest.raises(NotFound, match="nobody") as refused:
        chitchat.voice("nobody")
    assert "people()" in refused.value.cure


def test_a_missing_package_is_an_error_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "chitchat_dataset", None)
    with pytest.raises(RepertoryError) as missing:
        chitchat._dataset()
    assert missing.value.code == "package_missing"
    assert "pip install" in missing.value.cure


def _characters(piece: Conversation) -> int:
    return sum(len(message.content) for message in piece.messages)


def _burst(sender: str, *texts: str) -> list[dict[str, str]]:
    return [{"sender": sender, "text": text, "timestamp": "2018-05-02T19:38:15Z"} for text in texts]
