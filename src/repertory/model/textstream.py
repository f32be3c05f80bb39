"""Tokens to text as they come: only what decodes cleanly, and nothing that may turn out to be a stop string.

An emoji may be made of several characters, as a family or a flag is, and comes whole, so it waits for what follows it.

White space around a reply is left out, as it is in training: some templates put a space of their own there. That of a
text which is continued is kept: it is the only thing between its last word and the next.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import regex

REPLACEMENT = "\ufffd"  # how a decoder shows bytes that are no whole character yet

GRAPHEME = regex.compile(r"\X")
OF_EMOJI = regex.compile(r"[\p{Extended_Pictographic}\p{Regional_Indicator}\u200d]")


class TextStream:
    """The text of one reply, piece by piece."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stop: Sequence[str], continues: Sequence[int] = ()
    ) -> None:
        """`continues`: the last tokens of a text that goes on; a SentencePiece token alone shows no space."""
        self._decode = decode
        self._stop = [text for text in stop if text]
        self._ids = list(continues)
        self._context = 0  # tokens before this are not decoded again
        self._told = len(continues)  # tokens before this have become text
        self._held = ""  # text that may be the beginning of a stop string
        self._keeps_space = bool(continues)
        self._has_begun = False
        self._open = ""  # an emoji that may go on, and white space that belongs to the reply if more comes
        self._ends: list[int] = []  # of each token of the reply that has become text: where it ends in that
        self._length = 0  # of the decoded text
        self._stopped_at = 0  # in the decoded text
        self.is_stopped = False

    @property
    def tokens_told(self) -> int:
        """How many tokens are in the text told so far, whole: one that runs into a stop string is not."""
        end = self._stopped_at if self.is_stopped else self._length - len(self._held) - len(self._open)
        return bisect_right(self._ends, end)

    def push(self, token: int) -> str:
        """The text that token adds, as far as it is certain. After a stop string `is_stopped` is true."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT):
            return ""
        self._measure(text)
        self._context, self._told = self._told, len(self._ids)
        certain = self._without_stop(text)
        return self._closed(certain, is_end=self.is_stopped)

    def rest(self) -> str:
        """What was held back, once no token follows. Nothing if a stop string was found."""
        if self.is_stopped:
            return ""
        unfinished = self._new_text() if self._told < len(self._ids) else ""
        self._measure(unfinished)
        text = self._without_stop(unfinished)
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        return self._closed(text, is_end=True)

    def _new_text(self) -> str:
        """Text of the tokens not told yet. Decoded after some that were, since a token's text depends on its left."""
        before = self._decode(self._ids[self._context : self._told])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _measure(self, text: str) -> None:
        """Tokens that make one character have one end."""
        self._length += len(text)
        self._ends += [self._length] * (len(self._ids) - self._told)

    def _closed(self, text: str, *, is_end: bool) -> str:
        text = self._open + text
        if not (self._keeps_space or self._has_begun):
            text = text.lstrip()
            self._has_begun = bool(text)
        told = text if is_end else _without_last_emoji(text)
        if not self._keeps_space:
            told = told.rstrip()
        self._open = text[len(told) :]
        return told

    def _without_stop(self, text: str) -> str:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            self._stopped_at = self._length - len(text) + min(found)
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _without_last_emoji(text: str) -> str:
    """`text`, which begins with a whole character, without an emoji at its end."""
    last = (GRAPHEME.findall(text) or [""])[-1]
    return text.removesuffix(last) if OF_EMOJI.search(last) else text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
