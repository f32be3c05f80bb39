"""A conversation as everything here knows it: messages with roles, from anywhere."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Role = Literal["system", "user", "assistant"]
_HALF = re.compile("[\ud800-\udfff]")


def _clean_text(text: str) -> str:
    """Text that a model can be trained on and a database can store."""
    if not text.isascii() and _HALF.search(text):
        raise ValueError("holds half of a surrogate pair, which is not valid Unicode")
    if "\x00" in text:
        raise ValueError("holds a NUL character")
    return text


CleanText = Annotated[str, AfterValidator(_clean_text)]


def _spoken_text(text: str) -> str:
    if not text.strip().strip("\u200b\u200c\u200d\u2060\ufeff"):
        raise ValueError("is empty")
    return text


SpokenText = Annotated[CleanText, AfterValidator(_spoken_text)]


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Role
    content: SpokenText
    weight: Literal[0, 1] = 1  # 0: words of the assistant that are read as history, and not learned

    @model_validator(mode="after")
    def only_the_assistant_is_weighed(self) -> Message:
        if self.weight == 0 and self.role != "assistant":
            raise ValueError("only an assistant's message can have the weight 0; nothing else is learned anyway")
        return self

    @property
    def is_trained(self) -> bool:
        return self.role == "assistant" and self.weight == 1


class Conversation(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    messages: list[Message] = Field(min_length=1)
    platform: CleanText | None = None
    timestamp: datetime | None = None
    authors: list[CleanText] | None = None  # ids of those whose words are in it; recorded hashed, no model sees them

    @field_validator("timestamp")
    @classmethod
    def in_utc(cls, timestamp: datetime | None) -> datetime | None:
        if timestamp is None:
            return None
        return timestamp.replace(tzinfo=UTC) if timestamp.tzinfo is None else timestamp.astimezone(UTC)

    @field_validator("messages")
    @classmethod
    def someone_answers(cls, messages: list[Message]) -> list[Message]:
        if not any(message.is_trained for message in messages):
            raise ValueError("has no assistant turn to learn from")
        if any(message.role == "system" for message in messages[1:]):
            raise ValueError("has a system message behind the first place, where chat templates have no place for one")
        for one, following in pairwise(messages):
            if one.role == following.role and one.weight != following.weight:
                raise ValueError("has an assistant's turn of several messages with different weights; give them one")
        return messages
