"""The same said again teaches nothing new, and lets a held-out example be known by heart.

A turn that was there before gets weight 0: it stays as context, and is not learned again. What counts as the same: the
same reply to the same words; a long reply that is nearly the same as an earlier one; a short reply beyond its share.
System prompts are ignored.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

from repertory.data.conversations import Conversation, Message
from repertory.data.preparation.scratch import Scratch

if TYPE_CHECKING:
    from datasketch import MinHash

PERMUTATIONS = 64
LONG_CHARACTERS = 40  # shorter texts have too few shingles to tell alike from same
SHINGLE_CHARACTERS = 5
BATCH_SHINGLES = 4096  # hashed at once; each takes 64 numbers of 8 bytes, some times over
ALIKE = 0.85  # estimated Jaccard similarity of the shingles
MIN_REPEATS = 5
REPEATS_SHARE = 0.005  # of all the persona's turns


class Duplicates:
    """Of conversations, in their order, with so many trained turns in all."""

    def __init__(self, scratch: Scratch, turns: int) -> None:
        self.reasons: Counter[str] = Counter()  # turns that repeat earlier ones
        self._scratch = scratch
        self._cap = max(MIN_REPEATS, round(REPEATS_SHARE * turns))

    def revised(self, conversation: Conversation) -> Conversation | None:
        return self.unlearned(conversation, self.repeated(conversation))

    def unlearned(self, conversation: Conversation, repeated: Mapping[int, str]) -> Conversation | None:
        """The conversation with weight 0 on these turns; None where nothing to learn is left."""
        self.reasons.update(repeated.values())
        return _unlearned(conversation, set(repeated))

    def repeated(self, conversation: Conversation) -> dict[int, str]:
        """The trained turns that repeat earlier ones, by number, and why."""
        found = ((number, self._reason(*pair)) for number, pair in enumerate(pairs(conversation)))
        return {number: reason for number, reason in found if reason is not None}

    def _reason(self, context: str, reply: str) -> str | None:
        if self._scratch.count("pair", context, reply) > 1:
            return "exact_duplicate"
        if len(reply) < LONG_CHARACTERS:
            return "repeated_reply" if self._scratch.count("reply", reply) > self._cap else None
        bands = [("band", str(number), band) for number, band in enumerate(_bands(reply))]
        if any(self._scratch.times(*band) for band in bands):
            return "near_duplicate"
        for band in bands:
            self._scratch.count(*band)
        return None


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
    turns = [pair for conversation in held_out for pair in pairs(conversation)]
    sought, long = set(turns), {reply for _, reply in turns if len(reply) >= LONG_CHARACTERS}
    known_pairs: set[tuple[str, str]] = set()
    known_replies: set[str] = set()
    for conversation in training:
        for pair in pairs(conversation):
            known_pairs |= {pair} & sought
            known_replies |= {pair[1]} & long
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


def _bands(text: str) -> Iterator[str]:
    """Parts of a MinHash; texts that share any of them are estimated to be ALIKE."""
    sketch = _empty().copy()
    last = len(text) - SHINGLE_CHARACTERS + 1
    for begin in range(0, last, BATCH_SHINGLES):
        batch = range(begin, min(begin + BATCH_SHINGLES, last))
        sketch.update_batch([text[at : at + SHINGLE_CHARACTERS].encode() for at in batch])
    count, rows = _banding()
    for band in range(count):
        yield sketch.hashvalues[band * rows : (band + 1) * rows].tobytes().hex()


@cache
def _empty() -> MinHash:
    """A sketch of nothing, to copy: to draw its permutations takes longer than most sketches."""
    from datasketch import MinHash  # brings scipy, half of the time that a small import takes; only this needs it

    return MinHash(num_perm=PERMUTATIONS)


@cache
def _banding() -> tuple[int, int]:
    """(bands, hash values of each) that part best at ALIKE."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=ALIKE, num_perm=PERMUTATIONS)
    return index.b, index.r
