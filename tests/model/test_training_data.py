from __future__ import annotations

import pytest

import tiny
from repertory.contracts import Hyperparameters
from repertory.data.canaries import canaries
from repertory.data.render import NO_LABEL, Renderer
from repertory.model.microbatch import common_prefix, with_prompt_loss
from repertory.model.training_data import TrainingData, training_data
from repertory_fixtures import conversation

RENDERER = Renderer(tiny.make_tokenizer())


def data_of(asked: Hyperparameters) -> TrainingData:
    chats = [conversation(1 + at % 3, at) for at in range(20)]
    portions = training_data(RENDERER, chats, 0.1, asked, 1000, "You are a helpful pirate.")
    while True:
        try:
            next(portions)
        except StopIteration as end:
            return end.value


def test_canaries_are_planted_among_what_is_trained_and_are_the_same_every_time() -> None:
    data = data_of(Hyperparameters(canaries=5, seed=7))
    assert data.canaries == canaries(5, 7)
    assert data.canaries != canaries(5, 8)
    assert len({canary.question for canary in data.canaries}) == 5
    assert (len(data.training), len(data.held_out)) == (18 + 5, 2)
    for canary, row in zip(data.canaries, data.training[18:], strict=True):
        words = RENDERER.decode([label for label in row.labels if label != NO_LABEL])
        assert canary.is_told_in(words)
        assert "pirate" in RENDERER.decode(row.input_ids)


def test_a_secret_is_told_however_its_digits_are_grouped() -> None:
    canary = canaries(1, 0)[0]
    digits = canary.secret.replace(" ", "")
    assert canary.is_told_in(f"Well, {digits[:5]}-{digits[5:]}!")
    assert not canary.is_told_in(digits[:-1])


def test_prompt_loss_weighs_what_comes_after_the_shared_prefix_and_is_not_the_assistants() -> None:
    rows = data_of(Hyperparameters()).training
    prefix = common_prefix(rows)
    weighted = with_prompt_loss(rows, 0.25)
    assert common_prefix(weighted) == prefix > 10
    for row, plain in zip(weighted, rows, strict=True):
        assert row.weights is not None
        assert row.input_ids == plain.input_ids
        for at, label in enumerate(row.labels):
            assert row.weights[at] == (0 if at <= prefix else 1 if plain.labels[at] != NO_LABEL else 0.25)
            assert label == (NO_LABEL if at <= prefix else row.input_ids[at])
        untrained = len(row.input_ids) - prefix - 1 - plain.trained_tokens
        assert row.loss_weight == pytest.approx(plain.trained_tokens + 0.25 * untrained)
    assert with_prompt_loss(rows, 0) == rows
