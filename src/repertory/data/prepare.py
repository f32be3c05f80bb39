"""From stored conversations to what is trained on and what is held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from repertory.data.conversations import Conversation, Message

MAX_HELD_OUT = 200  # conversations; scoring more costs time and says little more


@dataclass(frozen=True)
class Split:
    """Indices of the conversations: a conversation is wholly trained on or wholly held out."""

    training: list[int]
    held_out: list[int]


def split(times: Sequence[datetime | None], share: float, seed: int) -> Split:
    """Hold out `share` of the conversations that these are the times of: the latest where all have one, since the
    future is what a voice meets.

    Conversations of one moment, as the parts of one session are, stay on one side, so it may be a little more or less.
    Otherwise they are drawn. At least one is held out where there are two, at least 10 where there are 100, at most
    MAX_HELD_OUT, and none where `share` is 0 or there is a single conversation.
    """
    count = len(times)
    if share == 0 or count < 2:
        return Split(list(range(count)), [])
    wanted = max(round(count * share), min(10, count // 10), 1)
    wanted = min(wanted, MAX_HELD_OUT, count - 1)
    known: list[datetime] = [time for time in times if time is not None]
    order = list(range(count))
    if len(known) == count:
        order.sort(key=lambda at: (known[at], at))
        wanted = count - _whole_moment([known[at] for at in order], count - wanted)
    else:
        random.Random(seed).shuffle(order)
    return Split(sorted(order[:-wanted]), sorted(order[-wanted:]))


def _whole_moment(times: list[datetime], cut: int) -> int:
    """The place nearest to `cut`, neither first nor last, between two different times of `times`; else `cut`."""
    places = [at for at in range(1, len(times)) if times[at - 1] != times[at]]
    return min(places, key=lambda at: abs(at - cut), default=cut)


def read_conversations(path: Path) -> list[Conversation]:
    """A stored dataset: JSON lines, one Conversation each, validated when they were stored."""
    return list(read_numbered(path).values())


def read_numbered(path: Path) -> dict[int, Conversation]:
    """The same by their numbers, from 0; one that was deleted since is an empty line, so that others keep theirs."""
    with path.open(encoding="utf-8") as lines:
        return {at: Conversation.model_validate_json(line) for at, line in enumerate(lines) if line != "\n"}


def with_system(conversation: Conversation, system_prompt: str | None) -> list[Message]:
    """The messages, after the job's system prompt where they bring none."""
    if system_prompt is None or conversation.messages[0].role == "system":
        return conversation.messages
    return [Message(role="system", content=system_prompt), *conversation.messages]
