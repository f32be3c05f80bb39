"""Chat templates as published with the models, for what people say to each other.

The files in tests/templates are those templates without their branches for tools and pictures. Where trl is installed,
which carries whole ones, they are compared with those.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

import tiny
from repertory.data.conversations import Message
from repertory.data.preparation.tokens import marked
from repertory.data.render import NO_LABEL, Renderer, Row

TEMPLATES = Path(__file__).parents[1] / "templates"
LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<start_of_turn>", "<end_of_turn>"]
THINKING = ["<think>", "</think>"]


@dataclass(frozen=True, kw_only=True)
class Published:
    tokenizer: Callable[[str | None], Any]
    rendered: str  # CHAT as a row
    tokenized: str | None = (
        None  # where the model's own tokenizer takes its messages one by one: what comes to the same
    )
    turn_end: str
    takes_system: bool = True
    takes_turns_only: bool = False
    padding: tuple[str, str] = ("", "")  # what the template itself puts around a reply, and is trained with it
    trl: str | None = None  # the whole template in trl


def byte_level(special: list[str], bos: str, eos: str, control: list[str] | None = None) -> Callable[[str | None], Any]:
    """`control` are added tokens that are not special."""

    def make(template: str | None) -> Any:
        added = [AddedToken(token, special=True, normalized=False) for token in special]
        added += [AddedToken(token, special=False, normalized=False) for token in control or ()]
        tokenizer = tiny.make_tokenizer(template, added)
        tokenizer.bos_token, tokenizer.eos_token = bos, eos
        return tokenizer

    return make


def metaspace(special: list[str], spaces: Any) -> Callable[[str | None], Any]:
    return lambda template: tiny.make_metaspace_tokenizer(template, special, spaces)


CHAT = [
    Message(role="system", content="You are a pirate."),
    Message(role="user", content="Hello!"),
    Message(role="assistant", content="Arr, matey!"),
    Message(role="user", content="How are you?"),
    Message(role="assistant", content="I am fine."),
]
IN_CHATML = (
    "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
    "<|im_start|>assistant\nArr, matey!<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n"
    "<|im_start|>assistant\nI am fine.<|im_end|>\n"
)
IN_LLAMA_3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a pirate.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nArr, matey!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nI am fine.<|eot_id|>"
)
IN_GEMMA = (
    "<s><start_of_turn>user\nYou are a pirate.\n\nHello!<end_of_turn>\n<start_of_turn>model\nArr, matey!<end_of_turn>\n"
    "<start_of_turn>user\nHow are you?<end_of_turn>\n<start_of_turn>model\nI am fine.<end_of_turn>\n"
)
NO_THOUGHTS = "<think>\n\n</think>\n\n"
chatml = byte_level([], "<|endoftext|>", "<|im_end|>")

PUBLISHED = {
    "llama-2": Published(
        tokenizer=metaspace([], "every"),
        rendered="<s>[INST] <<SYS>>\nYou are a pirate.\n<</SYS>>\n\nHello! [/INST] Arr, matey! </s>"
        "<s>[INST] How are you? [/INST] I am fine. </s>",
        turn_end="</s>",
        takes_turns_only=True,
        padding=("", " "),
    ),
    "mistral-v0.1": Published(
        tokenizer=metaspace([], "every"),
        rendered="<s>[INST] You are a pirate.\n\nHello! [/INST]Arr, matey!</s> "
        "[INST] How are you? [/INST]I am fine.</s> ",
        tokenized="<s>[INST] You are a pirate.\n\nHello! [/INST] Arr, matey!</s>"
        "[INST] How are you? [/INST] I am fine.</s>",
        turn_end="</s>",
        takes_system=False,
        takes_turns_only=True,
    ),
    "mistral-v0.3": Published(
        tokenizer=metaspace(["[INST]", "[/INST]"], "first"),
        rendered="<s>[INST] You are a pirate.\n\nHello![/INST] Arr, matey!</s>"
        "[INST] How are you?[/INST] I am fine.</s>",
        turn_end="</s>",
        takes_system=False,  # into the last message of a prompt, and into no row
        takes_turns_only=True,
    ),
    "llama-3": Published(
        tokenizer=byte_level(LLAMA_3, "<|begin_of_text|>", "<|eot_id|>"),
        rendered=IN_LLAMA_3,
        turn_end="<|eot_id|>",
        trl="llama3",
    ),
    "llama-3.1": Published(
        tokenizer=byte_level(LLAMA_3, "<|begin_of_text|>", "<|eot_id|>"),
        rendered=IN_LLAMA_3.replace(
            "You are", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nYou are"
        ),
        turn_end="<|eot_id|>",
        trl="llama3_2",
    ),
    "llama-3-generation": Published(  # marks what an assistant says, for trainers that ask the template for the mask
        tokenizer=byte_level(LLAMA_3, "<|begin_of_text|>", "<|eot_id|>"),
        rendered=IN_LLAMA_3,
        turn_end="<|eot_id|>",
        trl="llama3_training",
    ),
    "qwen2.5": Published(tokenizer=chatml, rendered=IN_CHATML, turn_end="<|im_end|>", trl="qwen2_5"),
    "qwen3": Published(
        tokenizer=byte_level([], "<|endoftext|>", "<|im_end|>", THINKING),
        rendered=IN_CHATML.replace("assistant\n", f"assistant\n{NO_THOUGHTS}"),
        turn_end="<|im_end|>",
        trl="qwen3",
    ),
    "gemma": Published(
        tokenizer=metaspace(GEMMA, "none"),
        rendered=IN_GEMMA,
        turn_end="<end_of_turn>",
        takes_system=False,
        takes_turns_only=True,
        trl="gemma",
    ),
    "gemma-3": Published(
        tokenizer=metaspace(GEMMA, "none"),
        rendered=IN_GEMMA,
        turn_end="<end_of_turn>",
        takes_turns_only=True,
        trl="gemma3",
    ),
    "zephyr": Published(  # and TinyLlama
        tokenizer=metaspace([], "every"),
        rendered="<|system|>\nYou are a pirate.</s>\n<|user|>\nHello!</s>\n<|assistant|>\nArr, matey!</s>\n"
        "<|user|>\nHow are you?</s>\n<|assistant|>\nI am fine.</s>\n",
        turn_end="</s>",
    ),
    "chatml": Published(tokenizer=chatml, rendered=IN_CHATML, turn_end="<|im_end|>"),
    "none": Published(  # our own, for base models that have none
        tokenizer=chatml,
        rendered="<|endoftext|>You are a pirate.\n\nUser: Hello!\nAssistant: Arr, matey!<|im_end|>\n"
        "User: How are you?\nAssistant: I am fine.<|im_end|>\n",
        turn_end="<|im_end|>",
        padding=(" ", ""),
    ),
}


def renderer_of(name: str) -> Renderer:
    template = None if name == "none" else (TEMPLATES / f"{name}.jinja").read_text()
    return Renderer(PUBLISHED[name].tokenizer(template))


@pytest.fixture(params=PUBLISHED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def row_of(renderer: Renderer, messages: list[Message]) -> Row:
    row = renderer.row(messages)
    assert row is not None
    return row


def replies_in(renderer: Renderer, row: Row) -> list[list[int]]:
    """The stretches of labels."""
    stretches: list[list[int]] = [[]]
    for label in row.labels:
        if label != NO_LABEL:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


@pytest.mark.parametrize("turns", [1, 2])
def test_a_row_has_the_tokens_of_the_published_text(name: str, turns: int) -> None:
    renderer, published = renderer_of(name), PUBLISHED[name]
    text, end = published.tokenized or published.rendered, published.turn_end
    if turns == 1:
        after_turn = text[text.rindex(end) + len(end) :]
        text = text[: text.index(end, text.index("matey!")) + len(end)] + after_turn
    expected = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row_of(renderer, CHAT[: 1 + 2 * turns]).input_ids == expected


def test_the_template_writes_the_published_text(name: str) -> None:
    renderer, published = renderer_of(name), PUBLISHED[name]
    pieces = renderer._pieces(CHAT, generation_prompt=False)
    assert "".join(piece.text for piece in pieces) == published.rendered


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl, which carries the published templates")
@pytest.mark.parametrize("name", [name for name, published in PUBLISHED.items() if published.trl], indirect=True)
def test_the_fixture_writes_what_the_whole_template_writes(name: str) -> None:
    trl = importlib.util.find_spec("trl")
    assert trl is not None
    assert trl.origin is not None
    whole = (Path(trl.origin).parent / "chat_templates" / f"{PUBLISHED[name].trl}.jinja").read_text()
    tokenizer = renderer_of(name).tokenizer
    for first in (0, 1):
        for last in range(2, 6):
            if first == 0 and not PUBLISHED[name].takes_system:
                continue
            asked = [message.model_dump(include={"role", "content"}) for message in CHAT[first:last]]
            for how in ({}, {"enable_thinking": False, "date_string": "1 Jan 2030"}):
                ours, theirs = (
                    tokenizer.apply_chat_template(
                        asked, chat_template=template, tokenize=False, add_generation_prompt=last % 2 == 0, **how
                    )
                    for template in (tokenizer.chat_template, whole)
                )
                assert ours == theirs


WORDS = [
    "Arr, matey!",
    "  two spaces  inside, and\n\nlines\n",
    "👩‍👩‍👧 ahoy 🏴‍☠️",
    "\tçàë 漢字 \u200b?",
    "<b>not</b> a tag: [INST] </think> {{ 1 }}",
]


@pytest.mark.parametrize("words", WORDS)
def test_what_is_trained_reads_as_the_assistants_words_and_the_token_that_ends_its_turn(name: str, words: str) -> None:
    """White space around a message is not kept; everything else is, letter by letter."""
    renderer, published = renderer_of(name), PUBLISHED[name]
    chat = [
        message.model_copy(update={"content": words}) if message.role == "assistant" else message for message in CHAT
    ]
    replies = replies_in(renderer, row_of(renderer, chat))
    end = renderer.tokenizer.convert_tokens_to_ids(published.turn_end)
    assert len(replies) == 2
    for reply in replies:
        assert reply[-1] == end
        before, after = published.padding
        assert renderer.decode(reply) == before + words.strip() + after
        assert end not in reply[:-1]


def test_the_token_that_ends_a_turn_stops_a_reply(name: str) -> None:
    renderer = renderer_of(name)
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.turn_end) == PUBLISHED[name].turn_end
    assert renderer.turn_end in renderer.stop_ids
    assert renderer.tokenizer.eos_token_id in renderer.stop_ids


@pytest.mark.parametrize("first", [0, 1])
def test_a_prompt_is_what_the_row_has_before_the_reply(name: str, first: int) -> None:
    """With and without a system prompt, for the first reply and for the next."""
    renderer = renderer_of(name)
    row = row_of(renderer, CHAT[first:])
    for answered in (2, 4):
        prompt, _ = renderer.prompt(CHAT[first:answered])
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[len(prompt) - 1] == NO_LABEL
        assert row.labels[len(prompt)] != NO_LABEL


CONTROL = sorted({"<s>", "</s>", "<unk>", *LLAMA_3, *GEMMA, *THINKING, *tiny.SPECIAL, "[INST]", "<|user|>", "<<SYS>>"})


def test_a_control_token_of_any_family_that_somebody_types_stays_text(name: str) -> None:
    renderer = renderer_of(name)
    typed = "".join(f"{token}x" for token in CONTROL)
    assert {renderer.tokenizer.decode([at]) for at in renderer._special_ids.values()} <= {*CONTROL, "[/INST]"}
    control = set(renderer._special_ids.values())

    def of(words: str) -> Row:
        chat = [Message(role="system", content=words), Message(role="user", content=words)]
        return row_of(renderer, [*chat, Message(role="assistant", content=words)])

    plain, row = of("x"), of(typed)
    assert [i for i in row.input_ids if i in control] == [i for i in plain.input_ids if i in control]
    assert renderer.decode(row.input_ids).count(typed) == 3


def test_a_system_prompt_is_said_once_at_the_head_whether_the_template_has_a_place_for_it_or_not(name: str) -> None:
    renderer, published = renderer_of(name), PUBLISHED[name]
    assert renderer.takes_system == published.takes_system
    for ids in (row_of(renderer, CHAT).input_ids, renderer.prompt(CHAT[:2])[0], renderer.prompt(CHAT[:4])[0]):
        text = renderer.decode(ids)
        assert text.count("You are a pirate.") == 1
        assert text.index("You are a pirate.") < text.index("Hello!")
    if not published.takes_system:
        folded = [CHAT[1].model_copy(update={"content": "You are a pirate.\n\nHello!"}), *CHAT[2:]]
        assert row_of(renderer, CHAT) == row_of(renderer, folded)


def test_a_conversation_without_a_system_prompt_gets_none_but_the_templates_own(name: str) -> None:
    renderer = renderer_of(name)
    text = renderer.decode(row_of(renderer, CHAT[1:]).input_ids)
    assert "pirate" not in text
    assert ("You are Qwen, created by Alibaba Cloud." in text) == (name == "qwen2.5")
    assert ("Today Date: 26 Jul 2024" in text) == (name == "llama-3.1")


def test_a_preview_is_the_row_to_the_letter(name: str) -> None:
    renderer, published = renderer_of(name), PUBLISHED[name]
    row = row_of(renderer, CHAT)
    spans = marked(row, renderer)
    whole = renderer.tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False)
    assert "".join(text for text, _ in spans) == whole
    learned = [text for text, is_learned in spans if is_learned]
    assert [text.strip() for text in learned] == [
        renderer.tokenizer.decode(reply, clean_up_tokenization_spaces=False).strip()
        for reply in replies_in(renderer, row)
    ]
    assert learned[0].endswith(published.turn_end)
    assert learned[0].startswith(" ") == (name in ("llama-2", "mistral-v0.1", "mistral-v0.3", "none"))


def test_several_messages_of_one_speaker_lose_no_word(name: str) -> None:
    renderer, published = renderer_of(name), PUBLISHED[name]
    burst = [
        Message(role="assistant", content="ahoy"),
        Message(role="user", content="one"),
        Message(role="user", content="two"),
        Message(role="assistant", content="three"),
        Message(role="assistant", content="four"),
    ]
    assert renderer.takes_turns_only == published.takes_turns_only
    row = row_of(renderer, burst)
    said = [renderer.decode(reply).strip() for reply in replies_in(renderer, row)]
    if published.takes_turns_only:
        assert said == ["ahoy", "three\nfour"]
        assert "one\ntwo" in renderer.decode(row.input_ids)
        assert "..." in renderer.decode(row.input_ids)  # what the assistant answers with its first words
    else:
        assert said == ["ahoy", "three", "four"]


def test_an_assistants_message_of_weight_0_is_read_and_not_learned(name: str) -> None:
    renderer = renderer_of(name)
    row, whole = (
        row_of(renderer, [*CHAT[:2], CHAT[2].model_copy(update={"weight": 0}), *CHAT[3:]]),
        row_of(renderer, CHAT),
    )
    assert row.input_ids == whole.input_ids
    assert replies_in(renderer, row) == replies_in(renderer, whole)[1:]
    last_untrained = [*CHAT[:4], CHAT[4].model_copy(update={"weight": 0})]
    assert renderer.row(last_untrained) == renderer.row(CHAT[:3])


def test_every_reply_of_qwen3_begins_behind_the_empty_thoughts_that_its_prompts_end_with() -> None:
    """The template itself writes them before the last reply alone: the others would be trained after another text than
    the one that asks for them. Words that look like thoughts are words.
    """
    renderer = renderer_of("qwen3")
    thoughts = [renderer.tokenizer.convert_tokens_to_ids(token) for token in THINKING]
    prompt, _ = renderer.prompt(CHAT[:4])
    assert renderer.decode(prompt).count(NO_THOUGHTS) == 2
    assert [i for i in prompt if i in thoughts] == thoughts * 2
    spoken = CHAT[2].model_copy(update={"content": "<think>\nrum?\n</think>\n\nArr!"})
    row = row_of(renderer, [*CHAT[:2], spoken, *CHAT[3:]])
    assert [i for i in row.input_ids if i in thoughts] == thoughts * 2
    assert renderer.decode(replies_in(renderer, row)[0]) == spoken.content
