"""The same said again teaches nothing new, and lets a held-out example be known by heart.

A turn that was there before gets weight 0: it stays as context, and is not learned again. What counts as the same: the
same reply to the same words; a long reply that is nearly the same as an earlier one; a short reply beyond its share.
System prompts are ignored.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from repertory.data.conversations import Conversation, Message

if TYPE_CHECKING:  # brings scipy, half of the time that a small import takes; only long replies need it
    from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
LONG_CHARACTERS = 40  # shorter texts have too few shingles to tell alike from same
SHINGLE_CHARACTERS = 5
ALIKE = 0.85  # estimated Jaccard similarity of the shingles
MIN_REPEATS = 5
REPEATS_SHARE = 0.005  # of all the persona's turns


def without_duplicates(conversations: Sequence[Conversation]) -> tuple[list[Conversation | None], Counter[str]]:
    """The conversations in their order, with weight 0 on turns that repeat earlier ones; None where nothing is left.

    Also how many turns that were, by reason.
    """
    replies = [reply for conversation in conversations for _, reply in pairs(conversation)]
    cap = max(MIN_REPEATS, round(REPEATS_SHARE * len(replies)))
    seen: set[tuple[str, str]] = set()
    said: Counter[str] = Counter()
    near: MinHashLSH | None = None  # of the long replies
    reasons: Counter[str] = Counter()

    def reason(context: str, reply: str) -> str | None:
        nonlocal near
        if (context, reply) in seen:
            return "exact_duplicate"
        seen.add((context, reply))
        if len(reply) < LONG_CHARACTERS:
            said[reply] += 1
            return "repeated_reply" if said[reply] > cap else None
        near = _index() if near is None else near
        sketch = _sketch(reply)
        if near.query(sketch):
            return "near_duplicate"
        near.insert(str(len(seen)), sketch)
        return None

    kept: list[Conversation | None] = []
    for conversation in conversations:
        repeated = set()
        for number, (context, reply) in enumerate(pairs(conversation)):
            if (why := reason(context, reply)) is not None:
                reasons[why] += 1
                repeated.add(number)
        kept.append(_unlearned(conversation, repeated))
    return kept, reasons


def pairs(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """(what was said last, the reply) of every trained turn, in the form in which texts are compared."""
    context = ""
    for turn in _turns(conversation.messages):
        text = normal("\n".join(message.content for message in turn))
        if turn[0].is_trained:
            yield context, text
        if turn[0].role != "system":
            context = text


def leakage(training: Iterable[Conversation], held_out: Iterable[Conversation]) -> tuple[int, int, int]:
    """(held-out turns whose reply to the same words is trained on, long ones whose reply is, all held-out turns)."""
    known_pairs = {pair for conversation in training for pair in pairs(conversation)}
    known_replies = {reply for _, reply in known_pairs if len(reply) >= LONG_CHARACTERS}
    turns = [pair for conversation in held_out for pair in pairs(conversation)]
    return sum(pair in known_pairs for pair in turns), sum(reply in known_replies for _, reply in turns), len(turns)


def normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _turns(messages: Sequence[Message]) -> Iterator[list[Message]]:
    for _, turn in groupby(messages, key=lambda message: message.role):
        yield list(turn)


def _unlearned(conversation: Conversation, repeated: set[int]) -> Conversation | None:
    """The conversation with weight 0 on its trained turns of these numbers."""
    if not repeated:
        return conversation
    messages: list[Message] = []
    number = -1
    for turn in _turns(conversation.messages):
        number += turn[0].is_trained
        weigh = turn[0].is_trained and number in repeated
        messages += [message.model_copy(update={"weight": 0}) for message in turn] if weigh else turn
    if not any(message.is_trained for message in messages):
        return None
    return conversation.model_copy(update={"messages": messages})


def _index() -> MinHashLSH:
    from datasketch import MinHashLSH

    return MinHashLSH(threshold=ALIKE, num_perm=PERMUTATIONS)


def _sketch(text: str) -> MinHash:
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS)
    last = len(text) - SHINGLE_CHARACTERS + 1
    sketch.update_batch([text[at : at + SHINGLE_CHARACTERS].encode() for at in range(last)])
    return sketch
