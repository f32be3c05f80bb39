"""The bodies of the OpenAI-compatible API.

Three kinds of fields: those that are carried out; those that change nothing about a reply, here or there, and are
accepted; and those that would change it and are not supported, which may be sent with the value that they have when
left out. Every other is refused.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from repertory.data.conversations import CleanText, Message, Role, SpokenText
from repertory.service.api.schemas import Request, StopStrings

MAX_CHOICES = 16  # replies to one request: half of a host's batch


def _unsupported(*neutral: object) -> AfterValidator:
    def check(value: object) -> object:
        if value is not None and value not in neutral:
            raise PydanticCustomError("unsupported", "is not supported here")
        return value

    return AfterValidator(check)


def _text(content: object) -> object:
    """A list of text parts as one text, a line each."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise PydanticCustomError("unsupported", "has a part that is no text, which no model here can read")
    return "\n".join(part["text"] for part in content)


def _role(role: object) -> object:
    return "system" if role == "developer" else role


def _nothing_stops(stop: object) -> object:
    return [] if stop is None else stop


Neutral = Annotated[Any, _unsupported([], {}, "")]
Off = Annotated[Any, _unsupported(False)]
Zero = Annotated[Any, _unsupported(0)]
Ignored = Any


class ChatMessage(Request):
    role: Annotated[Role, BeforeValidator(_role)]
    content: Annotated[SpokenText, BeforeValidator(_text)]
    # What the client writes into a reply, which is often sent back as it came.
    refusal: Neutral = None
    annotations: Neutral = None
    audio: Neutral = None
    function_call: Neutral = None
    tool_calls: Neutral = None
    name: Neutral = None


class StreamOptions(Request):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None  # padding against eavesdroppers who measure lengths; none is sent


class Completing(Request):
    """What chats and plain texts have in common."""

    model: CleanText = Field(min_length=1, max_length=300)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[StopStrings, BeforeValidator(_nothing_stops)] = Field([])
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)  # not OpenAI's; the same as in the native API
    timeout_seconds: float | None = Field(None, gt=0, le=86_400)  # likewise
    # Nothing about a reply depends on these.
    user: Ignored = None
    # These would change it.
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Neutral = None

    @model_validator(mode="after")
    def stream_options_are_of_a_stream(self) -> Completing:
        if self.stream_options is not None and not self.stream:
            raise ValueError("has stream_options without stream: true")
        return self

    @property
    def choices_per_prompt(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatCompletion(Completing):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: Ignored = None
    parallel_tool_calls: Ignored = None  # of tools, and there are none
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    audio: Neutral = None
    function_call: Annotated[Any, _unsupported("none", "auto")] = None
    functions: Neutral = None
    modalities: Annotated[Any, _unsupported(["text"])] = None
    prediction: Neutral = None
    reasoning_effort: Annotated[Any, _unsupported("none")] = None
    response_format: Annotated[Any, _unsupported({"type": "text"})] = None
    store: Off = None  # nothing is kept
    tool_choice: Annotated[Any, _unsupported("none", "auto")] = None
    tools: Neutral = None
    verbosity: Neutral = None
    web_search_options: Neutral = None

    @model_validator(mode="after")
    def top_logprobs_are_of_logprobs(self) -> ChatCompletion:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("has top_logprobs without logprobs: true")
        return self

    @model_validator(mode="after")
    def one_limit(self) -> ChatCompletion:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("has max_tokens and max_completion_tokens, and they differ; send one of them")
        return self

    @model_validator(mode="after")
    def the_user_has_the_last_word(self) -> ChatCompletion:
        roles = [message.role for message in self.messages]
        if roles[-1] != "user":
            raise ValueError("has messages whose last one is not the user's")
        if "system" in roles[self._instructions :]:
            raise ValueError("has a system message after the first turn, where chat templates have no place for one")
        return self

    @property
    def reply_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def conversation(self) -> list[Message]:
        """The instructions as one system message, then the turns."""
        at = self._instructions
        system = "\n\n".join(message.content for message in self.messages[:at])
        turns = [Message(role=said.role, content=said.content) for said in self.messages[at:]]
        return [Message(role="system", content=system), *turns] if system else turns

    @property
    def _instructions(self) -> int:
        """How many messages at the beginning are instructions."""
        return next(at for at, message in enumerate([*self.messages, None]) if not message or message.role != "system")


class TextCompletion(Completing):
    prompt: Annotated[
        list[Annotated[CleanText, Field(min_length=1)]], BeforeValidator(lambda it: [it] if isinstance(it, str) else it)
    ] = Field(min_length=1, max_length=MAX_CHOICES)
    best_of: Annotated[Any, _unsupported(1)] = None
    echo: Off = None
    logprobs: Annotated[Any, _unsupported()] = None
    suffix: Neutral = None

    @model_validator(mode="after")
    def not_too_many(self) -> TextCompletion:
        if len(self.prompt) * self.choices_per_prompt > MAX_CHOICES:
            raise ValueError(f"asks for more than {MAX_CHOICES} replies: prompts times n")
        return self
