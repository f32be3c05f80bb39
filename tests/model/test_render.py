from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import tiny
from repertory.data.conversations import Conversation, Message
from repertory.data.render import NO_LABEL, Renderer, Row
from repertory.errors import BaseModelUnavailable, InvalidInput

# As published with the models, shortened where that changes nothing for these roles.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
TEMPLATES = {"chatml": tiny.CHATML, "llama-2": LLAMA_2, "gemma": GEMMA, "none": None}
CHAT = [
    Message(role="system", content="You are a helpful pirate."),
    Message(role="user", content="Hello!"),
    Message(role="assistant", content="Arr, matey! 👩‍👩‍👧"),
    Message(role="user", content="line one\nline two"),
    Message(role="assistant", content="the rum\nis gone"),
]


def renderer_of(name: str) -> Renderer:
    return Renderer(tiny.make_tokenizer(TEMPLATES[name]))


def trained_text(renderer: Renderer, row: Row) -> str:
    return renderer.tokenizer.decode([label for label in row.labels if label != NO_LABEL])


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_assistants_words_and_turn_ends_are_trained(name: str) -> None:
    renderer = renderer_of(name)
    row = renderer.row(CHAT)
    assert row is not None
    replies = trained_text(renderer, row).replace(" ", "").split("<|im_end|>")
    assert replies == ["Arr,matey!👩‍👩‍👧", "therum\nisgone", ""]
    assert 0 < row.trained_tokens < len(row.input_ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_serving_prompts_are_exactly_what_training_rows_begin_with(name: str) -> None:
    renderer = renderer_of(name)
    row = renderer.row(CHAT)
    assert row is not None
    for answered in (2, 4):
        prompt, dropped = renderer.prompt(CHAT[:answered])
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[len(prompt) - 1] == NO_LABEL
        assert row.labels[len(prompt)] != NO_LABEL
        assert dropped == 0


@pytest.mark.parametrize("name", ["chatml", "none"])
def test_rows_are_what_the_tokenizer_makes_of_the_rendered_text(name: str) -> None:
    renderer = renderer_of(name)
    row = renderer.row(CHAT)
    assert row is not None
    asked = [message.model_dump() for message in CHAT]
    text = renderer.tokenizer.apply_chat_template(asked, chat_template=renderer.template, tokenize=False)
    assert renderer.tokenizer.decode(row.input_ids) == text


def test_a_system_prompt_reaches_templates_that_know_no_system_role() -> None:
    for name in ("llama-2", "gemma"):
        renderer = renderer_of(name)
        prompt, _ = renderer.prompt(CHAT[:2])
        assert "helpful pirate" in renderer.tokenizer.decode(prompt)


def test_templates_that_want_alternating_turns_get_them_without_losing_a_word() -> None:
    renderer = renderer_of("gemma")
    burst = [
        Message(role="assistant", content="ahoy"),
        Message(role="user", content="one"),
        Message(role="user", content="two"),
        Message(role="assistant", content="three"),
        Message(role="assistant", content="four"),
    ]
    row = renderer.row(burst)
    assert row is not None
    text = renderer.tokenizer.decode(row.input_ids)
    assert "one\ntwo" in text
    assert trained_text(renderer, row) == "ahoy<|im_end|>three\nfour<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_assistants_message_of_weight_0_is_read_and_not_learned(name: str) -> None:
    renderer = renderer_of(name)
    told = [*CHAT[:2], CHAT[2].model_copy(update={"weight": 0}), *CHAT[3:]]
    row, whole = renderer.row(told), renderer.row(CHAT)
    assert row is not None
    assert whole is not None
    assert row.input_ids == whole.input_ids
    assert trained_text(renderer, row).replace(" ", "") == "therum\nisgone<|im_end|>"
    last_untrained = [*CHAT[:4], CHAT[4].model_copy(update={"weight": 0})]
    assert renderer.row(last_untrained) == renderer.row(CHAT[:3])


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


RENDERER = renderer_of("chatml")


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


def test_templates_that_write_the_date_write_the_same_one_every_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') + ' ' + (date_string or '') }}" + tiny.CHATML
    renderer = Renderer(tiny.make_tokenizer(dated))
    assert renderer.tokenizer.decode(renderer.prompt(CHAT[:2])[0]).startswith("26 Jul 2024 26 Jul 2024")


def test_a_tokenizer_that_puts_a_space_before_every_text_gets_no_second_one() -> None:
    """SentencePiece's habit, with Llama 2's template: a reply begins with what the model would say after the prompt."""
    renderer = Renderer(tiny.make_metaspace_tokenizer(LLAMA_2))
    assert renderer.begins_with_space
    row = renderer.row(CHAT)
    assert row is not None
    for answered in (2, 4):
        prompt, _ = renderer.prompt(CHAT[:answered])
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[len(prompt)] != NO_LABEL
    first = [label for label in row.labels if label != NO_LABEL][:2]
    assert "".join(renderer.tokenizer.convert_ids_to_tokens(first)).startswith("▁A")
    assert "Arr, matey! 👩‍👩‍👧" in trained_text(renderer, row)


def test_a_template_whose_replies_would_never_end_is_refused() -> None:
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(BaseModelUnavailable, match="never stop"):
        Renderer(tiny.make_tokenizer(endless + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"))


def test_a_template_whose_prompt_differs_from_its_conversations_is_refused() -> None:
    with pytest.raises(BaseModelUnavailable, match="ends a prompt with"):
        Renderer(tiny.make_tokenizer(tiny.CHATML.replace("assistant\n", "bot\n")))
