"""From a session to conversations: what the persona said, after what it read.

Others are the user. Where more than two speak, each line says who, and the message that is answered is marked, since in
a busy channel the last message by somebody else is the answered one only a quarter of the time (25 to 30% on Ubuntu's
IRC, where 96 to 97% are among the last 20). Each of the persona's turns is trained exactly once: where a session is
cut, what came before is repeated as history with weight 0.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from repertory.data.conversations import Conversation, Message
from repertory.data.preparation.sessions import Session, Turn

CONTEXT_MESSAGES = 20
CONTEXT_CHARACTERS = 1000  # so that what is repeated costs less than what is learned
MAX_CHARACTERS = 4000  # of one conversation besides; about a thousand tokens of English
QUOTE_CHARACTERS = 60
REPLY_REACH = 1000  # turns; a reply to something older is answered too late to be worth looking for

_NICK_PREFIX = re.compile(r"@?(.{1,40}?)\s?[:,]\s")


@dataclass(frozen=True)
class Piece:
    """A conversation to be, and whose words are in it."""

    conversation: Conversation
    authors: frozenset[str]


@dataclass(frozen=True)
class Voices:
    """Who is who in the sessions of one history."""

    persona: Collection[str]
    labels: Mapping[str, str]
    platform: str | None = None


def target(turns: Sequence[Turn], at: int, voices: Voices) -> tuple[int | None, bool]:
    """(which earlier turn turns[at] answers, whether that is known rather than assumed).

    In this order: the reply link, a mention, a name at its beginning, the last one who spoke to this author by name
    since they last spoke, and else the last turn by somebody else.
    """
    turn = turns[at]
    earlier = range(at - 1, max(-1, at - 1 - 2 * CONTEXT_MESSAGES), -1)
    others = [i for i in earlier if turns[i].author_id != turn.author_id]
    if turn.reply_to is not None:
        reach = range(at - 1, max(-1, at - 1 - REPLY_REACH), -1)
        found = next((i for i in reach if turn.reply_to in turns[i].ids), None)
        if found is not None:
            return found, True
    for mentioned in turn.mentions:
        if (found := next((i for i in others if turns[i].author_id == mentioned), None)) is not None:
            return found, True
    if (found := _named_at_the_beginning(turns, others, turn, voices)) is not None:
        return found, True
    me = voices.labels[turn.author_id].casefold()
    for i in earlier:
        if turns[i].author_id == turn.author_id:
            break  # what was said to them before they spoke last is answered
        if turn.author_id in turns[i].mentions or _addresses(turns[i].texts[0], me):
            return i, True
    return (others[0] if others else None), False


def pieces(session: Session, voices: Voices, *, uncut: bool = False) -> list[Piece]:
    """The conversations of a session in which the persona speaks after somebody else did; one of it if `uncut`."""
    persona = voices.persona
    if not any(turn.author_id in persona for turn in session.turns[session.context :]):
        return []
    named = len(session.speakers - set(persona)) > 1
    found = []
    parts = [(session.context, len(session.turns))] if uncut else _parts(session, persona)
    for begin, end in parts:
        first = _context(session.turns, begin)
        piece = _piece(session, first, begin, end, voices, named)
        if piece is not None:
            found.append(piece)
    return found


def _context(turns: Sequence[Turn], begin: int) -> int:
    """Where the history of a part that begins at `begin` begins: a few messages before, and one turn at least."""
    first, messages, characters = begin, 0, 0
    while first > 0:
        turn = turns[first - 1]
        messages += len(turn.texts)
        characters += len(turn.text)
        if first < begin and (messages > CONTEXT_MESSAGES or characters > CONTEXT_CHARACTERS):
            break
        first -= 1
    return first


def _parts(session: Session, persona: Collection[str]) -> list[tuple[int, int]]:
    """(begin, end) of parts of at most MAX_CHARACTERS each, cut at the longest pauses, never within what one says."""
    turns = session.turns
    waiting, done = [(session.context, len(turns))], []
    while waiting:
        begin, end = waiting.pop()
        cuts = [
            at
            for at in range(begin + 1, end)
            if not (turns[at].author_id in persona and (at == begin + 1 or turns[at - 1].author_id in persona))
        ]
        if sum(len(turn.text) for turn in turns[begin:end]) <= MAX_CHARACTERS or not cuts:
            done.append((begin, end))
            continue
        middle = (begin + end) / 2
        cut = max(cuts, key=lambda at: (turns[at].begin - turns[at - 1].end, -abs(at - middle)))
        waiting += [(begin, cut), (cut, end)]
    return sorted(done)


def _piece(session: Session, first: int, begin: int, end: int, voices: Voices, named: bool) -> Piece | None:
    turns = session.turns
    messages: list[Message] = []
    said_by: set[str] = set()
    while end > begin and turns[end - 1].author_id not in voices.persona:
        end -= 1  # nobody of interest answered it
    for at in range(first, end):
        turn = turns[at]
        said_by.add(turn.author_id)
        text = turn.text
        if turn.author_id not in voices.persona:
            line = f"{voices.labels[turn.author_id]}: {text}" if named else text
            _say(messages, Message(role="user", content=line))
            continue
        is_prompted = any(message.role == "user" for message in messages)
        is_trained = at >= begin and is_prompted and turn.is_trained
        if named and is_trained and (quoted := _mark(messages, turns, at, voices)) is not None:
            said_by.add(quoted)
        _say(messages, Message(role="assistant", content=text, weight=1 if is_trained else 0))
    if not any(message.is_trained for message in messages):
        return None
    # The session's beginning: parts of one session share it, and so are never divided between training and held out.
    known = session.turns[session.context].begin
    timestamp = datetime.fromtimestamp(known, UTC) if known else None
    return Piece(Conversation(messages=messages, platform=voices.platform, timestamp=timestamp), frozenset(said_by))


def _say(messages: list[Message], message: Message) -> None:
    """One more message; what one side says in a row is one, and is learned only if all of it is."""
    if messages and messages[-1].role == message.role:
        last = messages[-1]
        messages[-1] = Message(
            role=message.role,
            content=f"{last.content}\n{message.content}",
            weight=min(last.weight, message.weight),
        )
    else:
        messages.append(message)


def _mark(messages: list[Message], turns: Sequence[Turn], at: int, voices: Voices) -> str | None:
    """Say what is answered, where that is known and is not what was said last. Returns who is quoted."""
    found, is_known = target(turns, at, voices)
    if found is None or not is_known or found == at - 1 or turns[found].author_id in voices.persona:
        return None
    quoted = " ".join(turns[found].text.split())
    if len(quoted) > QUOTE_CHARACTERS:
        quoted = quoted[: QUOTE_CHARACTERS - 1].rstrip() + "…"
    if not messages or messages[-1].role != "user":
        return None
    author = turns[found].author_id
    _say(messages, Message(role="user", content=f'(replying to {voices.labels[author]}: "{quoted}")'))
    return author


def _named_at_the_beginning(turns: Sequence[Turn], others: Sequence[int], turn: Turn, voices: Voices) -> int | None:
    text = turn.texts[0]
    if text.startswith("@"):
        for i in others:
            if text[1:].casefold().startswith(voices.labels[turns[i].author_id].casefold()):
                return i
    if found := _NICK_PREFIX.match(text):
        name = found[1].casefold()
        return next((i for i in others if voices.labels[turns[i].author_id].casefold() == name), None)
    return None


def _addresses(text: str, name: str) -> bool:
    plain = text.casefold().removeprefix("@")
    return plain.startswith(name) and plain[len(name) : len(name) + 1] in (":", ",", "", " ")
