"""Who is who: the persona's accounts, people who opted out, and the labels that conversations show."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from repertory.data.history import Author
from repertory.errors import InvalidInput

ALIKE = 0.8  # of SequenceMatcher: ana.banana and ana_banana, not ana and anton
MAX_SUGGESTIONS = 5
COMPARED_CHARACTERS = 64  # of a name; to compare takes the square of it
MIN_NAME_CHARACTERS = 3  # shorter names are words, and stay in what others say

_LETTER = re.compile(r"\w")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Identity:
    persona: frozenset[str]  # author ids
    name: str  # the persona's, as conversations show it
    suggestions: tuple[Author, ...]  # authors that may be the persona too: a second account, a former name


def identify(authors: Mapping[str, Author], wanted: Iterable[str]) -> Identity:
    """The authors that `wanted` names by id or by any name they had; there is one at least.

    Raises InvalidInput where nobody is meant, with near matches, or where a name means several people.
    """
    ids: list[str] = []
    for name in wanted:
        ids += _find(authors, name)
    if not ids:
        raise InvalidInput(
            "nobody is named as the persona", code="persona_missing", cure=f"Name one of: {_table(authors.values())}."
        )
    persona = frozenset(ids)
    name = max((authors[one] for one in persona), key=lambda author: author.messages).name
    mine = {known for one in persona for known in authors[one].names}
    alike = [
        author
        for author in authors.values()
        if author.id not in persona and any(_likeness(known, author) >= ALIKE for known in mine)
    ]
    alike.sort(key=lambda author: -author.messages)
    return Identity(persona, name, tuple(alike[:MAX_SUGGESTIONS]))


def find_all(authors: Mapping[str, Author], wanted: Iterable[str]) -> tuple[frozenset[str], list[str]]:
    """(the ids of people on a list, by id or name; who on it does not speak in this history, which is no error)."""
    by_name: dict[str, set[str]] = {}
    for author in authors.values():
        for known in author.names:
            by_name.setdefault(known.casefold(), set()).add(author.id)
    found: set[str] = set()
    unknown = []
    for name in wanted:
        ids = by_name.get(name.casefold(), set()) | ({name} & authors.keys())
        found |= ids
        if not ids:
            unknown.append(name)
    return frozenset(found), unknown


def labels(authors: Mapping[str, Author], masked: Collection[str]) -> dict[str, str]:
    """What each author is called in conversations: the usual name, told apart where two share one.

    Masked authors are "Person 1" and so on. Labels depend on the names alone, not on ids, so that one chat exported by
    two programs gives the same.
    """
    chosen: dict[str, str] = {}
    used: dict[str, int] = {}
    for number, author in enumerate(sorted((a for a in authors.values() if a.id in masked), key=lambda a: a.name), 1):
        chosen[author.id] = f"Person {number}"
    for author in sorted((a for a in authors.values() if a.id not in masked), key=lambda a: (a.name, a.first or 0)):
        name = " ".join(author.name.replace(":", " ").split()) or "Somebody"
        used[name] = used.get(name, 0) + 1
        chosen[author.id] = name if used[name] == 1 else f"{name} ({used[name]})"
    return chosen


def masking(labels: Mapping[str, str]) -> Callable[[str], str]:
    """A function that puts labels in place of names, in any case, where they stand as words of their own.

    Names are looked up by the word that they begin with, so that ten thousand of them take no longer than one.
    """
    by_name: dict[str, str] = {}
    lengths: dict[str, set[int]] = {}  # of the names that begin with a word: ß has two letters where case is ignored
    for name, label in labels.items():
        plain = name.strip().casefold()
        begins = _WORD.match(plain)
        if begins is not None and len(name) >= MIN_NAME_CHARACTERS:
            by_name[plain] = label
            lengths.setdefault(begins[0], set()).update((len(name.strip()), len(plain)))

    def masked(text: str) -> str:
        parts, end = [], 0
        for word in _WORD.finditer(text):
            begin = word.start()
            if begin < end or _LETTER.match(text[begin - 1 : begin]):
                continue
            for length in sorted(lengths.get(word[0].casefold(), ()), reverse=True):
                name = text[begin : begin + length]
                if name.casefold() in by_name and not _LETTER.match(text, begin + length):
                    parts += [text[end:begin], by_name[name.casefold()]]
                    end = begin + length
                    break
        return "".join(parts) + text[end:]

    return masked


def hashed(author_id: str, org_id: str) -> str:
    """What is recorded of an author: enough to find their words again, not to read who they are."""
    return hashlib.blake2b(author_id.encode(), key=org_id.encode()[:64], digest_size=16).hexdigest()


def record(author_ids: Iterable[str], org_id: str) -> str:
    """A line of the record of consent: the hashes of those whose words are in a conversation."""
    return json.dumps(sorted({hashed(author, org_id) for author in author_ids}))


def _find(authors: Mapping[str, Author], name: str) -> list[str]:
    if name in authors:
        return [name]
    found = [author for author in authors.values() if name.casefold() in {known.casefold() for known in author.names}]
    if len(found) > 1:
        raise InvalidInput(
            f"{len(found)} authors are called {name!r}",
            code="persona_ambiguous",
            cure=f"Name the ids that are the persona: {', '.join(author.id for author in found)}.",
        )
    if not found:
        near = sorted(authors.values(), key=lambda author: -_likeness(name, author))[:MAX_SUGGESTIONS]
        raise InvalidInput(
            f"nobody is called {name!r} in this history",
            code="persona_unknown",
            cure=f"Did you mean one of these? {_table(near)}.",
        )
    return [found[0].id]


def _likeness(name: str, author: Author) -> float:
    plain = name.casefold()[:COMPARED_CHARACTERS]
    known = (one.casefold()[:COMPARED_CHARACTERS] for one in [*author.names, author.id])
    return max((SequenceMatcher(None, plain, one).ratio() for one in known), default=0.0)


def _table(authors: Iterable[Author]) -> str:
    most = sorted(authors, key=lambda author: -author.messages)[:MAX_SUGGESTIONS]
    return ", ".join(f"{author.name} ({author.messages:,} messages)" for author in most)
