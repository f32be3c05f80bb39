"""What was found wrong or worth knowing in data from outside: the place, a stable code, how bad it is, and the cure."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MAX_FINDINGS = 1000  # kept word for word; beyond that they are only counted

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Code:
    severity: Severity
    meaning: str
    cure: str


# Options are named as in a request, field=value; the command line puts its own words there (importer.with_flags).
CODES: dict[str, Code] = {
    # reading
    "file_broken": Code(
        "warning",
        "The file ends too early or cannot be read from there on; what came before is used.",
        "Export or download it again; a whole file has the rest.",
    ),
    "file_ignored": Code("note", "The file is not part of an export of this format.", "Nothing, if that is so."),
    "message_malformed": Code(
        "warning",
        "The record is not what this format writes, and is left out.",
        "Correct that record, or export again with the exporter's present version.",
    ),
    "kind_unknown": Code(
        "note", "A kind of message that the reader does not know; kept as a service notice, not as words.", "Nothing."
    ),
    "text_repaired": Code(
        "warning",
        "The text held half of a surrogate pair, a byte that is not UTF-8, or NUL; it became U+FFFD.",
        "Export again as UTF-8.",
    ),
    "timezone_assumed": Code(
        "note",
        "The times name no time zone and were read as UTC.",
        "Name the zone where the export was made: timezone=Europe/Berlin.",
    ),
    "time_missing": Code("warning", "The message has no time that can be read.", "Nothing, if order is enough."),
    "author_unknown": Code(
        "note", "An author is not in the export's list of users; the id stands for the name.", "Nothing."
    ),
    "authors_by_name": Code(
        "note",
        "This format has no author ids: two people of one name are one, one person of two names is two.",
        "Name each name of the persona: persona=NAME, again and again.",
    ),
    "own_messages_only": Code(
        "warning",
        "This export holds one person's messages without those that they answer.",
        "For replies in context, export whole channels with DiscordChatExporter as JSON.",
    ),
    "provider_voice": Code(
        "warning",
        "The assistant in this export is a provider's model, whose terms may forbid training others on it.",
        "Read the provider's terms, or make the user the persona: persona=user.",
    ),
    # preparing
    "little_data": Code(
        "warning",
        "There is little to learn from; a voice wants a hundred conversations or more, and a thousand is better.",
        "Add more of the persona's history.",
    ),
    "one_sided": Code(
        "warning",
        "Hardly anybody else speaks, so little can be learned of how the persona answers.",
        "Import an export of whole channels.",
    ),
    "persona_speaks_little": Code(
        "warning",
        "The persona wrote less than one in twenty of the messages.",
        "Check that it is the right author, and that all its accounts are named.",
    ),
    "persona_alike": Code(
        "note",
        "Another author's name is like the persona's: perhaps a second account.",
        "If so, name that author as the persona too.",
    ),
    "listed_unknown": Code(
        "warning",
        "Somebody on the list of people to leave out or to mask is nobody who speaks in this history.",
        "Check how the name is written, or use the id; the table of authors has both.",
    ),
    "times_unknown": Code(
        "note",
        "The history has no times, so what is held out is drawn, and pauses part nothing.",
        "Nothing, if the format has none.",
    ),
    # conversations of a request
    "missing_field": Code("error", "Something that every conversation has is missing.", "Add it."),
    "unknown_field": Code("error", "There is a field that no conversation has.", "Remove it, or correct its name."),
    "invalid_input": Code("error", "A value is none that its field can have.", "Read what it must be, and correct it."),
    "personal_data": Code(
        "warning",
        "An address, a number or a secret of somebody is in the text, and would be learned.",
        'Take it out, or send "prepare": true, which puts surrogates in its place.',
    ),
    "exact_duplicate": Code(
        "warning",
        "The same reply to the same words is there already.",
        'Send it once, or send "prepare": true, which learns it once.',
    ),
    "near_duplicate": Code(
        "warning",
        "Nearly the same long reply is there already.",
        'Send it once, or send "prepare": true, which learns it once.',
    ),
    "repeated_reply": Code(
        "warning",
        "The same short reply is there many times.",
        'Send fewer of it, or send "prepare": true, which learns it as often as does no harm.',
    ),
    "turns_not_trained": Code(
        "note", "An assistant turn has weight 0; it is context and not learned from.", "Nothing."
    ),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. `path` is the file, or a path into a request; `line` counts from 1, None where none applies."""

    path: str
    line: int | None
    code: str
    severity: Severity
    what: str
    cure: str


@dataclass(slots=True)
class Findings:
    """The first MAX_FINDINGS findings, and how many there are of each code."""

    kept: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(
        self, code: str, path: str, line: int | None = None, what: str | None = None, cure: str | None = None
    ) -> None:
        """`code` is one of CODES; `what` and `cure` are said of this place where the code's own are not enough."""
        about = CODES[code]
        self.counts[code] += 1
        if len(self.kept) < MAX_FINDINGS:
            self.kept.append(Finding(path, line, code, about.severity, what or about.meaning, cure or about.cure))

    def add_once(self, code: str, path: str, what: str | None = None) -> None:
        """For what is true of a whole export."""
        if code not in self.counts:
            self.add(code, path, None, what)


def findings_of(findings: Findings) -> dict[str, Any]:
    """As plain data, for other programs."""
    return {"kept": [asdict(finding) for finding in findings.kept], "counts": dict(findings.counts)}
