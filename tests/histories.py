"""Histories small enough to see through, and conversations as short lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from repertory.data.conversations import Conversation, Message
from repertory.data.history import Entry, History, ImportReport
from repertory.data.preparation.pipeline import Prepared, PrepareOptions, prepare

T0 = 1_700_000_000


def say(who: str, text: str, minute: float = 0, **more: Any) -> Entry:
    ident = more.pop("id", None) or f"{who}{minute}{text[:8]}"
    more.setdefault("author", who.capitalize())
    return Entry(channel=more.pop("channel", "c"), id=ident, author_id=who, text=text, time=T0 + 60 * minute, **more)


def run(entries: Iterable[Entry], persona: str = "ana", **options: Any) -> Prepared:
    return prepare(History(list(entries), ImportReport("test")), PrepareOptions(persona=[persona], **options))


def shown(conversation: Conversation) -> list[str]:
    """Learned turns as `*…`, turns of the persona that are only read as `-…`."""
    marks = {"user": "", "system": "#"}
    return [marks.get(m.role, "*" if m.is_trained else "-") + m.content for m in conversation.messages]


def conversation(*texts: str, system: str | None = None) -> Conversation:
    messages = [Message(role="system", content=system)] if system else []
    messages += [Message(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(texts)]  # type: ignore[arg-type]
    return Conversation(messages=messages)
