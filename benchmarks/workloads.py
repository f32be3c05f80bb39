"""The conversations that training is measured on: real chats, in the three shapes that persona data come in."""

from __future__ import annotations

from dataclasses import dataclass

from repertory.data import chitchat
from repertory.data.conversations import Conversation, Message

PERSONA = (
    "You are a regular on a chat page for strangers. You write the way you talk: short, lower case where you like, "
    "no lists, no lectures. You ask back when something interests you and change the subject when it does not. "
)


@dataclass(frozen=True)
class Workload:
    name: str
    conversations: list[Conversation]
    system_prompt: str | None
    batch_rows: int  # of one optimizer step


def workload(name: str, rows: int) -> Workload:
    """A: 60 to 75 tokens a row, the default system prompt. B: such rows behind a persona prompt of 400+ tokens.
    C: 1,000+ tokens a row."""
    person = chitchat.people(min_conversations=100)[0]
    pieces = chitchat.voice(person)
    if name == "C":
        return Workload(name, _long(pieces, rows), None, 8)
    short = [first_exchange(piece) for piece in pieces]
    chosen = [chat for chat in short if 60 <= sum(len(m.content) for m in chat.messages) <= 150][:rows]
    return Workload(name, chosen, PERSONA * 8 if name == "B" else None, 16)


def first_exchange(conversation: Conversation) -> Conversation:
    return Conversation(messages=conversation.messages[:2])


def _long(pieces: list[Conversation], rows: int) -> list[Conversation]:
    """Pieces one after the other until a row has about 1,000 tokens."""
    chats: list[Conversation] = []
    messages: list[Message] = []
    for piece in pieces:
        messages += piece.messages
        if sum(len(message.content) for message in messages) > 2800:
            chats.append(Conversation(messages=messages))
            messages = []
        if len(chats) == rows:
            break
    return chats
