"""Entries that teach no voice: commands to bots, bare links, pasted code, other people's words.

"lol" and "ok" are not noise: they are how somebody speaks. Too many of the same are capped later (duplicates.py).
"""

from __future__ import annotations

import re

from repertory.data.history import INVISIBLE, Entry

MAX_CODE_LINES = 15
MAX_CHARACTERS = 4000  # a longer message was pasted, not said

_COMMAND = re.compile(r"[!/.$?-][A-Za-z][\w-]*(?:\s|$)")
_LINKS = re.compile(r"(?:<?https?://\S+(?:\s+|\Z))+")  # \S+ may hold another https://: without the space, 2^n ways
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_QUOTE = re.compile(r"^>{1,3} ?.*(?:\n|\Z)", re.MULTILINE)


def without_quotes(text: str) -> str:
    """The text without lines that quote somebody, as `> …`."""
    return _QUOTE.sub("", text).strip("\n") if ">" in text else text


def has_words(text: str) -> bool:
    """Whether there is anything to see in it."""
    return any(not character.isspace() and character not in INVISIBLE for character in text)


def noise(entry: Entry, *, is_persona: bool) -> str | None:
    """Why the entry is left out, or None. `entry.text` has no quotes any more."""
    text = entry.text
    if not has_words(text):
        return "no_words"
    if entry.is_forwarded:
        return "forwarded"
    if _COMMAND.match(text) and not text.startswith("/me ") and "\n" not in text:
        return "command"
    if len(text) > MAX_CHARACTERS:
        return "too_long"
    if "```" in text and sum(fence.count("\n") for fence in _FENCE.findall(text)) > MAX_CODE_LINES:
        return "code"
    if is_persona and _LINKS.fullmatch(text):
        return "link_only"  # by others it may be what the persona answers
    return None
