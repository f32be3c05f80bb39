"""Histories small enough to see through, and conversations as short lines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from repertory.data.conversations import Conversation, Message
from repertory.data.history import Entry, History, ImportReport
from repertory.data.preparation.pipeline import PreparationReport, PrepareOptions, prepare
from repertory.data.preparation.scratch import Scratch
from repertory.data.prepare import Split

T0 = 1_700_000_000


def say(who: str, text: str, minute: float = 0, **more: Any) -> Entry:
    ident = more.pop("id", None) or f"{who}{minute}{text[:8]}"
    more.setdefault("author", who.capitalize())
    return Entry(channel=more.pop("channel", "c"), id=ident, author_id=who, text=text, time=T0 + 60 * minute, **more)


@dataclass(frozen=True)
class Made:
    """What a preparation came to, all of it in memory."""

    conversations: list[Conversation]
    authors: list[list[str]]
    system_prompt: str | None
    split: Split
    report: PreparationReport


def made_of(history: History, options: PrepareOptions) -> Made:
    with Scratch() as scratch:
        made = prepare(history, options, scratch)
        authors = list(made.conversations.authors())
        return Made(list(made.conversations), authors, made.system_prompt, made.split, made.report)


def run(entries: Iterable[Entry], persona: str = "ana", **options: Any) -> Made:
    return made_of(History(list(entries), ImportReport("test")), PrepareOptions(persona=[persona], **options))


def dialogue(entries: Iterable[Entry], **options: Any) -> Made:
    """Of a history between a user and an assistant."""
    return made_of(History(list(entries), ImportReport("messages")), PrepareOptions(**options))


def shown(conversation: Conversation) -> list[str]:
    """Learned turns as `*…`, turns of the persona that are only read as `-…`."""
    marks = {"user": "", "system": "#"}
    return [marks.get(m.role, "*" if m.is_trained else "-") + m.content for m in conversation.messages]


def conversation(*texts: str, system: str | None = None) -> Conversation:
    messages = [Message(role="system", content=system)] if system else []
    messages += [Message(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(texts)]  # type: ignore[arg-type]
    return Conversation(messages=messages)
