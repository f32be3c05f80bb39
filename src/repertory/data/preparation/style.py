"""How somebody writes, in a few numbers: what a learned voice can be held against."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

import emoji

TOP = 15
HEAD_CHARACTERS = 200  # of a message, to count words in: phrases of 17 MB of long ones took a gigabyte

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")

# The commonest short words that the others of these languages do not share.
_FUNCTION_WORDS = {
    "en": "the and you that is it of to was for are with this have not but what they your just",
    "de": "und der die das nicht ist ich du wir ein eine auch mit auf aber wie noch schon mir",
    "es": "el los las que y es una para con pero muy yo esto está qué más porque",
    "fr": "le les des et est je tu il nous pas pour que avec mais dans une ça c'est vous",
    "pt": "os que é não um uma com para mas você eu isso muito está então",
    "it": "gli che è non un una con ma sono io questo anche più ho perché",
    "nl": "het een niet ik je dat maar met voor ook wel zijn nog",
    "tr": "bir ve bu için ben sen çok ama değil yok mi",
    "id": "yang ini itu tidak aku kamu untuk dengan saya sudah bisa juga",
    "pl": "nie się na że jest jak ale ja mnie już",
}
_LANGUAGE_OF = Counter(word for words in _FUNCTION_WORDS.values() for word in words.split())
_ONLY_OF = {
    word: language for language, words in _FUNCTION_WORDS.items() for word in words.split() if _LANGUAGE_OF[word] == 1
}


@dataclass(frozen=True, kw_only=True)
class StyleCard:
    """Of the persona's messages as they were sent, before bursts are merged. Shares are between 0 and 1."""

    messages: int
    mean_characters: float
    median_characters: float
    messages_per_turn: float
    lower_case: float  # messages with letters and no capital
    capital_first: float  # messages that begin with a capital
    emoji: float  # messages with at least one
    ends_with: dict[str, float]  # ".", "!", "?", "…", "emoji", "nothing"
    top_emoji: list[tuple[str, int]]
    top_words: list[tuple[str, int]]
    top_phrases: list[tuple[str, int]]  # of two and three words
    languages: dict[str, float]  # of the messages that show one; scripts other than Latin by their name


def style_card(sample: Sequence[str], messages: int, turns: int) -> StyleCard:
    """Of so many messages in so many turns, by a sample of them; there is at least one."""
    lengths = [len(text) for text in sample]
    heads = [text[:HEAD_CHARACTERS] for text in sample]
    words = [[word.casefold() for word in _WORD.findall(head)] for head in heads]
    emojis = [[found["emoji"] for found in emoji.emoji_list(head)] if not head.isascii() else [] for head in heads]
    lettered = [text for text in sample if any(character.isalpha() for character in text)]
    phrases = Counter(
        " ".join(said[at : at + size]) for said in words for size in (2, 3) for at in range(len(said) - size + 1)
    )
    ends = Counter(_ending(text) for text in sample)
    spoken = Counter(language for head, said in zip(heads, words, strict=True) if (language := _language(head, said)))
    return StyleCard(
        messages=messages,
        mean_characters=round(mean(lengths), 1),
        median_characters=median(lengths),
        messages_per_turn=round(messages / max(turns, 1), 2),
        lower_case=_share(sum(text == text.lower() for text in lettered), len(lettered)),
        capital_first=_share(sum(text.lstrip()[:1].isupper() for text in lettered), len(lettered)),
        emoji=_share(sum(bool(found) for found in emojis), len(sample)),
        ends_with={end: _share(count, len(sample)) for end, count in ends.most_common()},
        top_emoji=_top(Counter(one for found in emojis for one in found)),
        top_words=_top(Counter(word for said in words for word in said)),
        top_phrases=_top(phrases),
        languages={name: _share(count, spoken.total()) for name, count in spoken.most_common(5)},
    )


def _ending(text: str) -> str:
    last = text.rstrip()[-1:]
    if last in ".!?…":
        return last
    return "emoji" if last and (emoji.is_emoji(last) or last in "\ufe0f\u200d") else "nothing"


def _language(text: str, words: Sequence[str]) -> str | None:
    if not text.isascii():
        # Compatibility forms are what they stand for: the letters of 𝒻𝒶𝓃𝒸𝓎 and the µ of a unit are no script.
        letters = [one for one in unicodedata.normalize("NFKC", text) if one.isalpha()]
        scripts = Counter(unicodedata.name(one, "Latin").split(" ")[0].capitalize() for one in letters)
        if scripts and (script := scripts.most_common(1)[0][0]) != "Latin":
            return script
    votes = Counter(language for word in words if (language := _ONLY_OF.get(word)))
    return votes.most_common(1)[0][0] if votes else None


def _top(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP]


def _share(part: int, whole: int) -> float:
    return round(part / whole, 3) if whole else 0.0
