"""Personal data as typed surrogates: the sentence stays, the address does not.

Found offline, by form and by checksum where there is one, so that a number that merely looks like a card stays. The
same value is the same surrogate throughout a dataset. Values are never reported or stored, only how many there were.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable

import phonenumbers

# Texts come from outside and are of any length, so no pattern looks at the same letters again from each of them: its
# parts have an end, or begin where nothing of their kind stands before.
_SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"
    r"|(?<![\w-])eyJ[\w-]{8,}+\.eyJ[\w-]{8,}+\.[\w-]*"  # JSON web tokens
    r"|\b(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{36,}\b|github_pat_\w{22,}\b|glpat-[\w-]{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}\b|hf_[A-Za-z0-9]{30,}\b"
    r"|xox[abeposr]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}|AIza[\w-]{35}"
    r"|npm_[A-Za-z0-9]{36}\b|pypi-[\w-]{16,}|SG\.[\w-]{16,64}\.[\w-]{16,}|dop_v1_[a-f0-9]{64}\b"
    r"|rep_[A-Za-z0-9]{8}_[A-Za-z0-9]{32}_[A-Za-z0-9]{6}\b"  # our own
    r"|[MNO][A-Za-z\d_-]{23,27}\.[\w-]{6}\.[\w-]{27,}"  # Discord bots
    r"|\d{8,10}:AA[\w-]{33}\b"  # Telegram bots
    r"|https://hooks\.slack\.com/\S+|https://(?:\w{1,9}\.)?discord(?:app)?\.com/api/webhooks/\S+"
    r")",
    re.DOTALL,
)
_NAMED_SECRET = re.compile(
    r"(?i)((?<![^\W_])(?:password|passwort|passwd|pwd|passphrase|kennwort|contraseña|senha|mot de passe"
    r"|(?:api|access|secret)[_ -]?key|client[_ -]?secret|secret|token|pin)\b[\"']?\s*(?:is|ist|:|=)\s*[\"']?)"
    r"([^\s\"']{4,})"
)
_BEARER = re.compile(r"(\b(?i:bearer|basic) )(?=\S{0,40}\d)([\w+/.~-]{16,}=*)")
_LOGIN = re.compile(r"(://[^\s/:@]{1,64}:)([^\s/@]{1,128})(?=@)")  # https://name:password@host
_EMAIL = re.compile(r"\b[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}(?:xn--[\w-]{2,59}|[^\W\d_]{2,24})\b")
# Characters of each country's: https://www.swift.com/standards/data-standards/iban-international-bank-account-number
_IBAN_LENGTHS = {
    15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
}  # fmt: skip
_IBAN = re.compile(
    r"(?ai)\b(?=[A-Z]{2}\d\d)(?:"  # the look ahead is quick
    + "|".join(
        rf"(?:{countries.replace(' ', '|')})\d\d(?:[ -]?[A-Z0-9]){{{length - 4}}}"
        for length, countries in _IBAN_LENGTHS.items()
    )
    + r")\b"
)
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]\d)")
_MACHINE = re.compile(
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"
    r"|\b(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}\b"
)
_MAC = re.compile(r"(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}")
_DIGITS = re.compile(r"(?:\d[ ()./-]{0,2}){7}")
_NATIONAL_PHONE = re.compile(
    r"(?<![\w.:/-])(?<!\d )(?:"
    r"(?:\(0?\d{2,4}\)|0\d{1,4})[ ./-]?\d{3,4}(?:[ ./-]?\d{2,4}){1,3}"
    r"|0\d(?:[ .-]?\d\d){4}"  # in pairs, as in France
    r"|(?:1[ .-])?\d{3}([.-])\d{3}\1\d{4}"  # as in North America
    r")(?![\w.:/-]{0,40}\d)"
)
_MENTION = re.compile(r"(?<!\w)@\u2068?(\d{8,15})\u2069?(?!\w)")  # as WhatsApp writes somebody's name
_NUMBER = re.compile(r"\d")


class Surrogates:
    """Replaces personal data in texts; one for a dataset, so that one value is one surrogate."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # replacements by kind
        self._known: dict[str, dict[str, str]] = {}

    def replace(self, text: str) -> str:
        text = _SECRETS.sub(self._with("SECRET"), text)
        for named in (_NAMED_SECRET, _BEARER, _LOGIN):
            text = named.sub(lambda found: found[1] + self._surrogate("SECRET", found[2]), text)
        if "@" in text:
            text = _EMAIL.sub(self._with("EMAIL", str.casefold), text)
            text = _MENTION.sub(self._mentioned, text)
        if not _NUMBER.search(text) and "::" not in text and ":" not in text:
            return text
        text = _IBAN.sub(self._with("IBAN", lambda found: _compact(found).upper(), is_iban), text)
        text = _CARD.sub(self._with("CARD", _compact, is_card), text)
        text = _MACHINE.sub(self._with("ADDRESS", str.casefold, _is_machine), text)
        return self._phones(text) if _DIGITS.search(text) else text

    def _phones(self, text: str) -> str:
        """International numbers that are valid in their country's plan, and national ones written as numbers are."""
        parts, end = [], 0
        for found in phonenumbers.PhoneNumberMatcher(text, None, phonenumbers.Leniency.VALID):
            parts += [text[end : found.start], self._surrogate("PHONE", _digits(found.raw_string))]
            end = found.end
        return _NATIONAL_PHONE.sub(self._with("PHONE", _digits), "".join(parts) + text[end:])

    def _mentioned(self, found: re.Match[str]) -> str:
        number = f"+{found[1]}"
        is_one = any(phonenumbers.PhoneNumberMatcher(number, None, phonenumbers.Leniency.VALID))
        return "@" + self._surrogate("PHONE", found[1]) if is_one else found[0]

    def _with(
        self, kind: str, normal: Callable[[str], str] = str, is_one: Callable[[str], bool] = bool
    ) -> Callable[[re.Match[str]], str]:
        return lambda found: self._surrogate(kind, normal(found[0])) if is_one(found[0]) else found[0]

    def _surrogate(self, kind: str, value: str) -> str:
        if value.startswith("<") and value.endswith(">"):
            return value  # a surrogate already
        known = self._known.setdefault(kind, {})
        self.counts[kind] += 1
        return known.setdefault(value, f"<{kind}_{len(known) + 1}>")


def is_card(text: str) -> bool:
    """Whether the digits pass the Luhn check, as payment cards do, and are not all alike."""
    digits = [int(digit) for digit in _digits(text)]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether it is 1 modulo 97 with its first four characters last and letters as numbers (ISO 13616)."""
    plain = _compact(text)
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def _is_machine(text: str) -> bool:
    if _MAC.fullmatch(text):
        return True
    if text.count(":") == 2 and "::" not in text:
        return False  # a time of day
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _compact(text: str) -> str:
    return re.sub(r"[ -]", "", text)


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)
