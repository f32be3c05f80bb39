from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing

import tiny
from repertory.data.conversations import Conversation, Message
from repertory.data.render import DEFAULT_TEMPLATE, NO_LABEL, Renderer, Row
from repertory.errors import BaseModelUnavailable, InvalidInput

CHAT = [
    Message(role="system", content="You are a helpful pirate."),
    Message(role="user", content="Hello!"),
    Message(role="assistant", content="Arr, matey! 👩‍👩‍👧"),
    Message(role="user", content="line one\nline two"),
    Message(role="assistant", content="the rum\nis gone"),
]


def trained_text(renderer: Renderer, row: Row) -> str:
    return renderer.tokenizer.decode([label for label in row.labels if label != NO_LABEL])


def test_weights_that_cannot_be_kept_are_refused() -> None:
    bye = Message(role="assistant", content="bye", weight=0)
    with pytest.raises(ValidationError, match="only an assistant's message"):
        Message(role="user", content="hi", weight=0)
    with pytest.raises(ValidationError, match="no assistant turn to learn from"):
        Conversation(messages=[CHAT[1], bye])
    with pytest.raises(ValidationError, match="different weights"):
        Conversation(messages=[CHAT[1], CHAT[2], bye])


WORDS = st.text(min_size=1, max_size=12) | st.sampled_from([*tiny.SPECIAL, "<|im_", "end|>", "[INST]", "{{ 1/0 }}"])


@given(pieces=st.lists(WORDS, min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_special_tokens_in_anyones_words_stay_words(pieces: list[str]) -> None:
    words = "".join(pieces)
    if not words.strip() or any("\ud800" <= c <= "\udfff" for c in words):
        return
    renderer = RENDERER
    plain = [Message.model_construct(role="user", content="x"), Message.model_construct(role="assistant", content="y")]
    said = [
        Message.model_construct(role="user", content=words),
        Message.model_construct(role="assistant", content=words),
    ]
    specials = set(renderer.tokenizer.all_special_ids)
    row, empty = renderer.row(said), renderer.row(plain)
    assert row is not None
    assert empty is not None
    assert [i for i in row.input_ids if i in specials] == [i for i in empty.input_ids if i in specials]


RENDERER = Renderer(tiny.make_tokenizer())


@pytest.mark.fault("F30")
def test_long_conversations_lose_their_oldest_exchanges_and_say_so() -> None:
    renderer = RENDERER
    whole = renderer.row(CHAT)
    assert whole is not None
    shorter = renderer.row(CHAT, len(whole.input_ids) - 1)
    assert shorter is not None
    assert shorter.dropped_messages == 2
    assert "pirate" in renderer.tokenizer.decode(shorter.input_ids)
    assert trained_text(renderer, shorter) == "the rum\nis gone<|im_end|>"
    assert renderer.row(CHAT, 8) is None


def test_unanswered_messages_at_the_end_are_left_out() -> None:
    row = RENDERER.row(CHAT[:4])
    assert row == RENDERER.row(CHAT[:3])


def test_a_prompt_drops_old_history_but_never_the_message_itself() -> None:
    whole, _ = RENDERER.prompt(CHAT[:4])
    shorter, dropped = RENDERER.prompt(CHAT[:4], len(whole) - 1)
    assert dropped == 2
    assert "line one" in RENDERER.tokenizer.decode(shorter)
    with pytest.raises(InvalidInput, match="tokens"):
        RENDERER.prompt(CHAT[:4], 10)


def test_a_single_message_that_is_too_long_is_refused_and_one_that_fits_is_not() -> None:
    long = Message(role="user", content="word " * 50)
    for messages in ([long], [CHAT[0], long]):
        ids, _ = RENDERER.prompt(messages)
        assert RENDERER.prompt(messages, len(ids))[0] == ids
        with pytest.raises(InvalidInput) as refused:
            RENDERER.prompt(messages, len(ids) - 1)
        assert refused.value.code == "prompt_too_long"


def test_a_text_to_continue_gets_no_template_and_loses_nothing() -> None:
    text = "Once <|im_end|> upon"
    ids = RENDERER.raw_prompt(text, 100)
    assert RENDERER.tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids  # typed, so it stays text
    assert RENDERER.tokenizer.decode(ids) == text
    assert RENDERER.raw_prompt(text, len(ids)) == ids
    with pytest.raises(InvalidInput) as refused:
        RENDERER.raw_prompt(text, len(ids) - 1)
    assert (refused.value.code, refused.value.param) == ("prompt_too_long", "prompt")


def test_a_text_to_continue_begins_as_the_tokenizer_begins_every_text() -> None:
    tokenizer = tiny.make_metaspace_tokenizer(DEFAULT_TEMPLATE)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert Renderer(tokenizer).raw_prompt("Once", 100) == tokenizer("Once")["input_ids"]
    assert tokenizer("Once")["input_ids"][0] == tokenizer.bos_token_id == 1


def test_templates_that_write_the_date_write_the_same_one_every_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') + ' ' + (date_string or '') }}" + tiny.CHATML
    renderer = Renderer(tiny.make_tokenizer(dated))
    assert renderer.tokenizer.decode(renderer.prompt(CHAT[:2])[0]).startswith("26 Jul 2024 26 Jul 2024")


def test_a_template_whose_replies_would_never_end_is_refused() -> None:
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(BaseModelUnavailable, match="never stop"):
        Renderer(tiny.make_tokenizer(endless + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"))


def test_a_template_whose_prompt_differs_from_its_conversations_is_refused() -> None:
    with pytest.raises(BaseModelUnavailable, match="ends a prompt with"):
        Renderer(tiny.make_tokenizer(tiny.CHATML.replace("assistant\n", "bot\n")))
