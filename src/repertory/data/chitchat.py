"""Real people to learn from: the PyPI package `chitchat-dataset` read as voices.

The package carries 258,145 chat messages that 1,315 people wrote in the BYU Chit-Chat Challenge of 2018. A person's
voice is every two-person chat they took part in: their turns are the assistant's, the other's are the user's.

Most chats are far longer than a reply needs for context, so each is cut into pieces: a piece closes with the person's
first turn that brings it to `PIECE_CHARACTERS` or to `PIECE_EXCHANGES` replies, whichever comes first, and what
remains at the end of a chat is a piece of its own. Nothing is dropped but turns of the person that nobody prompted and
turns of the other that the person never answered.

Nine people have 100 or more such chats; they have between 759 and 6,534 pieces each, 23,838 together. Half of these
are of 227 to 362 characters, nine in ten of 149 to 592, the longest of 4,994. In tokens of the bundled model, template
and its default system prompt included: half 97 to 132, nine in ten 78 to 182. 59 people have 200 pieces or more.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib.resources import files
from itertools import groupby

from repertory.data.conversations import Conversation, Message
from repertory.errors import NotFound, RepertoryError

PLATFORM = "chitchat"
PIECE_CHARACTERS = 200
PIECE_EXCHANGES = 3

Burst = list[dict[str, str]]  # messages that one person sent in a row: text, timestamp, sender


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one person wrote before the other answered."""

    sender: str
    text: str
    timestamp: datetime  # of its first message


def people(min_conversations: int = 1) -> list[str]:
    """Everyone with at least so many two-person conversations, most conversations first."""
    counts = Counter(turn.sender for chat in _two_person_chats() for turn in chat[:2])  # turns alternate
    return sorted((person for person in counts if counts[person] >= min_conversations), key=lambda p: (-counts[p], p))


def voice(person: str, limit: int | None = None) -> list[Conversation]:
    """The person's pieces of conversation in order of time, the first `limit` of them if one is given.

    Raises NotFound if the person has none.
    """
    chats = [chat for chat in _two_person_chats() if person in (chat[0].sender, chat[1].sender)]
    pieces = [_conversation(piece, person) for chat in chats for piece in _pieces(chat, person)]
    if not pieces:
        raise NotFound(
            f"chitchat-dataset holds no two-person conversation of {person!r}",
            cure="Choose one of the people that repertory.data.chitchat.people() lists.",
        )
    pieces.sort(key=_time)
    return pieces[:limit]


@cache
def _two_person_chats() -> tuple[tuple[Turn, ...], ...]:
    """The chats in which exactly two people speak, turns alternating."""
    chats = (tuple(_turns(bursts)) for bursts in _dataset())
    return tuple(chat for chat in chats if len({turn.sender for turn in chat}) == 2)


def _dataset() -> list[list[Burst]]:
    """The bursts of every chat. Read from the file, since the package's own reader leaves it open."""
    try:
        chats = json.loads(files("chitchat_dataset").joinpath("dataset.json").read_text())
    except ModuleNotFoundError as missing:
        raise RepertoryError(
            "the package chitchat-dataset, which holds the demo's conversations, is not installed",
            code="package_missing",
            cure="Install it: pip install chitchat-dataset==0.9.0 (`make demo` does it by itself).",
        ) from missing
    return [chat["messages"] for chat in chats.values()]


def _turns(bursts: list[Burst]) -> Iterator[Turn]:
    said = [message for burst in bursts for message in burst if message["text"].strip()]
    for sender, messages in groupby(said, key=lambda message: message["sender"]):
        burst = list(messages)
        yield Turn(
            sender=sender,
            text="\n".join(message["text"].strip() for message in burst),
            timestamp=datetime.fromisoformat(burst[0]["timestamp"]),
        )


def _pieces(chat: tuple[Turn, ...], person: str) -> Iterator[list[Turn]]:
    piece: list[Turn] = []
    for turn in chat:
        if turn.sender == person and not piece:
            continue
        piece.append(turn)
        if turn.sender == person and _is_long_enough(piece):
            yield piece
            piece = []
    if piece and piece[-1].sender != person:
        piece.pop()
    if piece:
        yield piece


def _is_long_enough(piece: list[Turn]) -> bool:
    return len(piece) >= 2 * PIECE_EXCHANGES or sum(len(turn.text) for turn in piece) >= PIECE_CHARACTERS


def _conversation(piece: list[Turn], person: str) -> Conversation:
    messages = [Message(role="assistant" if turn.sender == person else "user", content=turn.text) for turn in piece]
    return Conversation(messages=messages, platform=PLATFORM, timestamp=piece[0].timestamp)


def _time(conversation: Conversation) -> datetime:
    assert conversation.timestamp is not None, "every piece carries the time of its first message"
    return conversation.timestamp
