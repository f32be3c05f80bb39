"""Messages to tokens, for training and for serving: the one place that knows chat templates.

A template is rendered with opaque marks where the messages' words will stand, so that words are never taken for
template: special tokens that someone types stay text. The words and the template's text between two special tokens are
tokenized together, as the base model saw them when it was made; only before an assistant's words is a seam forced,
because there the prompt ends at serving.
"""

from __future__ import annotations

import copy
import hashlib
import re
import secrets
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from jinja2.exceptions import TemplateError

from repertory.data.conversations import Message
from repertory.data.timelimit import time_limit
from repertory.errors import BaseModelUnavailable, InvalidInput

# For templates that write today's date: what is served must be what was trained on, and what is resumed what was begun.
FIXED_DATE = "26 Jul 2024"  # Llama 3's own default
FIXED_CLOCK = f"{{%- macro strftime_now(format) -%}}{FIXED_DATE}{{%- endmacro -%}}"

RENDER_SECONDS = 10.0  # a thousand messages take a tenth of one
MAX_FRAME_CHARACTERS = 100_000  # that a template writes around a message; the longest known writes some 2,000

NO_LABEL = -100  # a position without loss, as everywhere in this field

# For base models without a chat template (they were never taught to chat): plain words that any tokenizer knows.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"  # a word's token begins with its space
)


@dataclass(frozen=True)
class Row:
    """One conversation as tokens. labels[i] is input_ids[i] where it is trained, else NO_LABEL."""

    input_ids: list[int]
    labels: list[int]
    dropped_messages: int = 0  # oldest ones, left out to fit into max_tokens
    weights: list[float] | None = None  # of the labels in the loss; None: 1 each

    @property
    def trained_tokens(self) -> int:
        return sum(label != NO_LABEL for label in self.labels)

    @property
    def loss_weight(self) -> float:
        """What the row's loss counts, in trained tokens."""
        return self.trained_tokens if self.weights is None else sum(self.weights)


@dataclass(frozen=True)
class _Piece:
    """A stretch of the rendered text: a special token, text of the template, or somebody's words."""

    text: str
    special: int | None = None  # token id
    is_reply: bool = False  # an assistant's words
    is_trained: bool = False


_SYSTEM = Message(role="system", content="s")
_EXCHANGE = [Message(role="user", content="u"), Message(role="assistant", content="a")]


def _shortened(messages: Sequence[Message]) -> list[Sequence[Message]]:
    """`messages` without more and more of the oldest, cut where a user begins; a leading system message stays."""
    system = messages[:1] if messages[0].role == "system" else []
    starts = [at for at, m in enumerate(messages) if m.role == "user" and at > len(system)]
    is_answered = messages[-1].role == "assistant"
    return [[*system, *messages[at:]] for at in starts if not is_answered or at < len(messages) - 1]


def _with_control_tokens(tokenizer: Any, template: str) -> Any:
    """The tokenizer, or a copy to which all tokens that the template writes are special: no one's words become them.

    Qwen3's `<think>`, say, is an added token that is not special. White space is left what it is: text.
    """
    added = tokenizer.added_tokens_decoder.values()
    written = [token for token in added if not token.special and token.content.strip() and token.content in template]
    if not written:
        return tokenizer
    encoder = copy.deepcopy(tokenizer)
    for token in written:
        control = copy.deepcopy(token)
        control.special = True
        encoder.add_tokens([control], special_tokens=True)
    return encoder


def _unusable(why: str) -> BaseModelUnavailable:
    return BaseModelUnavailable(
        f"the chat template {why}",
        code="template_unusable",
        cure="Choose another base model, or correct its chat template.",
    )


class Renderer:
    """Chat rendering for one tokenizer. Raises BaseModelUnavailable where its template cannot be used."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template: str = tokenizer.chat_template or DEFAULT_TEMPLATE
        # Encoding sets an option on the tokenizer, which fails while another thread uses it; decoding has its own.
        self._encoding = Lock()
        self._decoder = copy.deepcopy(tokenizer)
        self._encoder = _with_control_tokens(tokenizer, self.template)
        added = self._encoder.added_tokens_decoder
        self._special_ids: dict[str, int] = {token.content: at for at, token in added.items() if token.special}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.begins_with_space = self._begins_with_space()
        self.takes_system = True
        self.takes_turns_only = not self._renders(
            [Message(role="user", content="u"), Message(role="user", content="v")], "v"
        )
        self._opening = ""
        self._prompt_ends_bare = self._find_seam()
        self.takes_system = self._takes_system()
        self.turn_end = self._find_turn_end()

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest()

    # Serving

    def prompt(self, messages: Sequence[Message], max_tokens: int | None = None) -> tuple[list[int], int]:
        """Tokens up to where the assistant speaks, and how many of the oldest messages were dropped to fit.

        The last user message and a leading system message are never dropped: InvalidInput if they alone are too long.
        """

        def tokens(kept: Sequence[Message]) -> list[int]:
            return self._tokens(self._pieces(kept, generation_prompt=True))[0]

        ids = tokens(messages)
        if max_tokens is None or len(ids) <= max_tokens:
            return ids, 0
        candidates = [messages, *_shortened(messages)]
        fitting = bisect_left(candidates, True, key=lambda kept: len(tokens(kept)) <= max_tokens)
        if fitting == len(candidates):
            raise InvalidInput(
                f"the prompt has {len(tokens(candidates[-1]))} tokens; {max_tokens} fit beside the reply",
                code="prompt_too_long",
                cure="Shorten the message or the system prompt, or ask for fewer max_tokens.",
                param="message",
            )
        return tokens(candidates[fitting]), len(messages) - len(candidates[fitting])

    def raw_prompt(self, text: str, max_tokens: int) -> list[int]:
        """Tokens of a text that is to be continued: no template, but what the tokenizer begins every text with.

        A special token that is typed stays text here too. InvalidInput if it is too long: nothing of it may be dropped.
        """
        with self._encoding:
            ids: list[int] = self._encoder(text, split_special_tokens=True)["input_ids"]
        if not ids:
            raise InvalidInput("the prompt is empty", param="prompt", cure="Send a text to continue.")
        if len(ids) > max_tokens:
            raise InvalidInput(
                f"the prompt has {len(ids)} tokens; {max_tokens} fit beside the reply",
                code="prompt_too_long",
                cure="Shorten the prompt, or ask for fewer max_tokens.",
                param="prompt",
            )
        return ids

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end a reply: the turn end of the template and the tokenizer's end of sequence."""
        return {self.turn_end} | ({self.tokenizer.eos_token_id} if self.tokenizer.eos_token_id is not None else set())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; a character that is not whole yet ends in U+FFFD."""
        return self._decoder.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[no-any-return]

    def token_text(self, token: int) -> str:
        """What one token adds to a text; a part of a character is U+FFFD, a special token is written out."""
        return self.written([token], self._encode("a"))

    def written(self, ids: Sequence[int], before: Sequence[int]) -> str:
        """What `ids` add to a text that ends with `before`, special tokens written out. The white space between the two
        is theirs: at the beginning of a text SentencePiece's tokens are shown without it.
        """
        shown = self._decoder.decode([*before, *ids], clean_up_tokenization_spaces=False)
        return shown.removeprefix(self._decoder.decode(list(before), clean_up_tokenization_spaces=False))  # type: ignore[no-any-return]

    # Training

    def row(self, messages: Sequence[Message], max_tokens: int | None = None) -> Row | None:
        """A conversation with a label on every assistant's words and on the token that ends its turn.

        Messages after the last trained one are left out: nothing is learned from them. Too long for `max_tokens`: the
        oldest messages are dropped, never a leading system message, the last trained turn or what it answers; None if
        that does not suffice.
        """
        answered = len(messages) - next(at for at, m in enumerate(reversed(messages)) if m.is_trained)
        whole = messages[:answered]
        candidates = [whole, *_shortened(whole)]

        def tokens(kept: Sequence[Message]) -> tuple[list[int], list[int]]:
            return self._tokens(self._pieces(kept, generation_prompt=False))

        fitting = bisect_left(
            candidates, True, key=lambda kept: max_tokens is None or len(tokens(kept)[0]) <= max_tokens
        )
        if fitting == len(candidates):
            return None
        return Row(*tokens(candidates[fitting]), dropped_messages=answered - len(candidates[fitting]))

    # The template

    def _find_turn_end(self) -> int:
        """Id of the token that ends an assistant's turn."""
        pieces = self._pieces(_EXCHANGE, generation_prompt=False)
        words = next(at for at, piece in enumerate(pieces) if piece.is_reply)
        for piece in pieces[words + 1 :]:
            if piece.special is not None:
                return piece.special
        raise BaseModelUnavailable(
            "the chat template ends an assistant's turn with no special token, so a reply would never stop",
            code="template_unusable",
            cure="Choose another base model, or give this one a chat template that writes eos_token after the turn.",
        )

    def _find_seam(self) -> bool:
        """Whether a prompt ends without the white space that the template writes before an assistant's words."""
        chat = [*_EXCHANGE, *_EXCHANGE]
        try:
            if self._differing(chat):  # Qwen3 writes the empty thoughts that end a prompt before the last reply alone
                self._opening = self._find_opening()
            differing = self._differing(chat)
        except TemplateError as error:
            raise _unusable(f"refuses a plain conversation: {error}") from error
        if differing:
            header, prompt = differing
            raise BaseModelUnavailable(
                f"the chat template writes {header!r} before a reply it was given, but ends a prompt with {prompt!r}",
                code="template_unusable",
                cure="Choose another base model, or correct its chat template's add_generation_prompt.",
            )
        header, prompt = self._seams(chat)[0]
        return header != prompt

    def _takes_system(self) -> bool:
        """Whether the template has a place for a system prompt, and the same one in prompts and rows.

        Mistral's newer ones write it into the last message, if that is the user's: into no row at all.
        """
        try:
            return self._renders([_SYSTEM, _EXCHANGE[0]], "s") and not self._differing(
                [_SYSTEM, *_EXCHANGE, *_EXCHANGE]
            )
        except TemplateError:
            return False

    def _find_opening(self) -> str:
        """What a prompt has after its last message."""
        asked = [{"role": "user", "content": "u"}]
        prompt, bare = self._render(asked, True), self._render(asked, False)
        return prompt.removeprefix(bare) if prompt.startswith(bare) else ""

    def _differing(self, messages: list[Message]) -> tuple[str, str] | None:
        """What stands before a reply in the row of `messages`, and its prompt, where that is another text."""
        for header, prompt in self._seams(messages):
            if header != prompt and header.rstrip() != prompt:
                return header, prompt
        return None

    def _seams(self, messages: list[Message]) -> list[tuple[str, str]]:
        """Of each reply: all that stands before it in the row, and the prompt that asks for it."""
        row = self._pieces(messages, generation_prompt=False)
        headers = ["".join(before.text for before in row[:at]) for at, piece in enumerate(row) if piece.is_reply]
        asked = [messages[:at] for at, message in enumerate(messages) if message.role == "assistant"]
        if len(headers) != len(asked):
            raise TemplateError("it does not show what the assistant says")
        prompts = ["".join(piece.text for piece in self._pieces(one, generation_prompt=True)) for one in asked]
        return list(zip(headers, prompts, strict=True))

    def _pieces(self, messages: Sequence[Message], *, generation_prompt: bool) -> list[_Piece]:
        messages = self._fitted(messages)
        nonce = secrets.token_hex(8)
        marks = [f"\ue000{nonce}{at}\ue001" for at in range(len(messages))]
        text = self._render(
            [{"role": m.role, "content": mark} for m, mark in zip(messages, marks, strict=True)], generation_prompt
        )
        pieces: list[_Piece] = []
        parts = re.split(f"\ue000{nonce}(\\d+)\ue001", text)
        for at, part in enumerate(parts):
            if at % 2:  # the number in a mark
                message = messages[int(part)]
                pieces.append(
                    _Piece(
                        message.content.strip(),
                        is_reply=message.role == "assistant",
                        is_trained=message.is_trained,
                    )
                )
            elif at + 1 < len(parts) and messages[int(parts[at + 1])].role == "assistant":
                pieces += self._template_pieces(self._opened(part))
            else:
                pieces += self._template_pieces(part)
        return pieces

    def _opened(self, text: str) -> str:
        """What the template writes before a reply, ending as a prompt ends."""
        for length in range(len(self._opening), 0, -1):
            if text.endswith(self._opening[:length]):
                return text + self._opening[length:]
        return text

    def _template_pieces(self, text: str) -> list[_Piece]:
        pieces, end = [], 0
        for found in self._special_pattern.finditer(text):
            pieces.append(_Piece(text[end : found.start()]))
            pieces.append(_Piece(found.group(), special=self._special_ids[found.group()]))
            end = found.end()
        pieces.append(_Piece(text[end:]))
        return [piece for piece in pieces if piece.text]

    def _render(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        """transformers renders in a sandbox that a template cannot leave; but it could take its time in there."""
        try:
            with time_limit(RENDER_SECONDS):
                text: str = self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=FIXED_CLOCK + self.template if "strftime_now" in self.template else self.template,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    enable_thinking=False,  # of reasoning models; others ignore it
                    date_string=FIXED_DATE,
                )
        except TimeoutError as error:
            raise _unusable(f"does not end within {RENDER_SECONDS:g} seconds") from error
        if len(text) > MAX_FRAME_CHARACTERS * (1 + len(messages)):
            raise _unusable(f"writes {len(text):,} characters around {len(messages)} messages")
        return text

    def _fitted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in a form that the template takes, with the same words in the same order."""
        fitted = list(messages)
        if fitted and fitted[0].role == "system" and not self.takes_system:
            system, *rest = fitted
            if rest and rest[0].role == "user":
                rest[0] = Message(role="user", content=f"{system.content}\n\n{rest[0].content}")
            else:
                rest.insert(0, Message(role="user", content=system.content))
            fitted = rest
        if not self.takes_turns_only:
            return fitted
        turns: list[Message] = []
        for message in fitted:
            if turns and turns[-1].role == message.role:
                # Of one weight: conversations whose assistant says both kinds in a row are refused.
                turns[-1] = message.model_copy(update={"content": f"{turns[-1].content}\n{message.content}"})
            else:
                turns.append(message)
        spoken = 1 if turns and turns[0].role == "system" else 0
        if len(turns) > spoken and turns[spoken].role == "assistant":
            turns.insert(spoken, Message(role="user", content="..."))  # such templates want the user to begin
        return turns

    def _renders(self, messages: list[Message], word: str) -> bool:
        """Whether the template takes these messages and shows `word`."""
        marked = [{"role": m.role, "content": f"\ue000{m.content}\ue001"} for m in messages]
        try:
            return f"\ue000{word}\ue001" in self._render(marked, False)
        except TemplateError:
            return False

    # Tokens

    def _tokens(self, pieces: list[_Piece]) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of the pieces."""
        ids: list[int] = []
        labels: list[int] = []
        run = ""
        is_trained = is_after_space = False
        for piece in pieces:
            if piece.special is not None:
                self._append(run, is_trained, is_after_space, ids, labels)
                ids.append(piece.special)
                labels.append(piece.special if is_trained else NO_LABEL)  # the turn end is trained, and ends training
                run, is_trained, is_after_space = "", False, False
            elif piece.is_reply:
                # White space that the template writes before the words belongs to them: the prompt ends before it.
                header = run.rstrip() if self._prompt_ends_bare else run
                self._append(header, False, is_after_space, ids, labels)
                run, is_trained = run[len(header) :] + piece.text, piece.is_trained
                is_after_space = header[-1:].isspace()
            else:
                run += piece.text
        self._append(run, is_trained, is_after_space, ids, labels)
        return ids, labels

    def _append(self, text: str, is_trained: bool, is_after_space: bool, ids: list[int], labels: list[int]) -> None:
        if not text:
            return
        if self.begins_with_space and is_after_space:  # the tokenizer would put another space between
            new = self._encode(f"\n{text}")[len(self._encode("\n")) :]
        elif self.begins_with_space and text.startswith(" ") and ids:
            new = self._encode(text[1:])  # it puts a space before every text by itself
        else:
            new = self._encode(text)
        ids += new
        labels += new if is_trained else [NO_LABEL] * len(new)

    def _encode(self, text: str) -> list[int]:
        """split_special_tokens: no word that someone typed becomes a control token."""
        if not text:
            return []
        with self._encoding:
            return self._encoder(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # type: ignore[no-any-return]

    def _begins_with_space(self) -> bool:
        """SentencePiece habits: a text is tokenized as if a space stood before it."""
        ids = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return bool(ids) and self.tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")
