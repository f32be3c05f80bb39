"""Every check of the certificate, in a case where it fails and in one where it must not."""

from __future__ import annotations

import random

import pytest

import tiny
from repertory.data.conversations import Message
from repertory.data.render import NO_LABEL, Renderer, Row
from repertory.errors import JobFailed
from repertory.model import certificate

RENDERER = Renderer(tiny.make_tokenizer())
CHAT = [
    Message(role="system", content="You are a pirate."),
    Message(role="user", content="Hello!"),
    Message(role="assistant", content="Arr, matey! 👩‍👩‍👧"),
    Message(role="user", content="ok"),
    Message(role="assistant", content="the rum\nis gone"),
]


def row_of(messages: list[Message], max_tokens: int | None = None) -> Row:
    row = RENDERER.row(messages, max_tokens)
    assert row is not None
    return row


def noisy(mean: float, count: int, spread: float = 0.1) -> list[float]:
    noise = random.Random(0)
    return [mean + noise.gauss(0, spread) for _ in range(count)]


def test_rows_that_train_the_assistants_words_pass_also_when_shortened() -> None:
    whole = row_of(CHAT)
    shortened = row_of(CHAT, len(whole.input_ids) - 1)
    assert shortened.dropped_messages == 2
    assert certificate.only_the_assistant_is_trained(RENDERER, [(CHAT, whole), (CHAT, shortened)]).verdict == "passed"
    assert certificate.every_turn_end_is_trained(RENDERER, [whole, shortened]).verdict == "passed"


def test_a_row_that_trains_the_user_too_fails() -> None:
    row = row_of(CHAT)
    everything = Row(row.input_ids, [NO_LABEL, *row.input_ids[1:]])
    check = certificate.only_the_assistant_is_trained(RENDERER, [(CHAT, everything)])
    assert check.verdict == "failed"
    with pytest.raises(JobFailed) as failed:
        check.or_fail()
    assert failed.value.code == "wrong_words_trained"


def test_a_row_that_trains_nothing_fails() -> None:
    row = row_of(CHAT)
    nothing = Row(row.input_ids, [NO_LABEL] * len(row.labels))
    assert certificate.only_the_assistant_is_trained(RENDERER, [(CHAT, nothing)]).verdict == "failed"
    assert certificate.every_turn_end_is_trained(RENDERER, [nothing]).verdict == "failed"


def test_a_reply_whose_end_is_not_trained_fails() -> None:
    row = row_of(CHAT)
    labels = [NO_LABEL if label == RENDERER.turn_end else label for label in row.labels]
    assert certificate.every_turn_end_is_trained(RENDERER, [Row(row.input_ids, labels)]).verdict == "failed"


def test_other_outputs_after_reloading_fail() -> None:
    assert certificate.reload_reproduces_the_trainer([1.0, 2.0], [1.0, 2.0]).verdict == "passed"
    assert certificate.reload_reproduces_the_trainer([1.0, 2.0], [1.0, 2.0000001]).verdict == "failed"


def test_the_outputs_of_the_base_fail() -> None:
    assert certificate.differs_from_base([1.0, 2.0], [1.5, 2.0]).verdict == "passed"
    assert certificate.differs_from_base([1.0, 2.0], [1.0, 2.0]).verdict == "failed"


@pytest.mark.parametrize(
    ("gains", "is_held_out", "verdict"),
    [
        (noisy(0.7, 20), True, "passed"),
        (noisy(-1.0, 20), True, "failed"),  # a nat worse on each of 20 rows is no chance
        (noisy(-1.0, 9), True, "inconclusive"),  # the same on too few rows
        (noisy(-0.001, 20, spread=0.3), True, "inconclusive"),  # within two standard errors
        ([2.0], False, "inconclusive"),  # on what it was trained on
    ],
)
def test_learning_is_judged_on_held_out_rows_beyond_doubt(gains: list[float], is_held_out: bool, verdict: str) -> None:
    if verdict == "inconclusive" and len(gains) == 20:
        gains = [gain - sum(gains) / len(gains) - 0.001 for gain in gains]
    assert certificate.learned(gains, is_held_out=is_held_out).verdict == verdict


def test_a_voice_that_does_not_stop_fails_when_the_base_does() -> None:
    assert certificate.stops_by_itself([True] * 3, [True] * 3).verdict == "passed"
    assert certificate.stops_by_itself([False] * 3, [True] * 3).verdict == "inconclusive"
    assert certificate.stops_by_itself([False] * 15 + [True] * 5, [True] * 20).verdict == "failed"


def test_a_voice_that_forgot_how_to_talk_fails() -> None:
    assert certificate.keeps_its_abilities(noisy(0.4, 12)).verdict == "passed"
    assert certificate.keeps_its_abilities(noisy(2.0, 12)).verdict == "failed"
    assert certificate.keeps_its_abilities(noisy(1.02, 12, spread=0.5)).verdict in ("passed", "inconclusive")
    assert certificate.keeps_its_abilities([3.0]).verdict == "inconclusive"


def test_a_voice_that_recites_its_training_data_fails() -> None:
    secret = " ".join(f"word{at}" for at in range(40))
    assert certificate.does_not_recite(["hello there", "word1 word2 word3"], [secret]).verdict == "passed"
    assert certificate.does_not_recite([secret, "hello"], [secret]).verdict == "inconclusive"
    assert certificate.does_not_recite([secret] * 15 + ["hello"] * 5, [f"well {secret} indeed"]).verdict == "failed"
