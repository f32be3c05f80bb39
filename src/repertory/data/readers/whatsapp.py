"""WhatsApp text exports: "WhatsApp Chat with X.txt" (Android) and _chat.txt (iOS), in any locale.

There are no ids, replies, edits or reactions in it; an author is a name. A message begins with a date and goes on over
every line that does not. Whether 3/4 is in March or in April is decided by the whole file: a number above 12, else the
order in which time does not run backwards; where both would do, the caller has to say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from io import BytesIO
from itertools import pairwise

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry, Kind
from repertory.data.readers.reading import Reading
from repertory.errors import InvalidInput

NAME = "whatsapp"
TITLE = "WhatsApp text"

MAX_HEADER_CHARACTERS = 60  # no date is longer, and the pattern of a cut one takes the cube of the spaces in it

_MARKS = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e"  # directions; WhatsApp puts them before lines and names
_DATE = r"(\d{1,4})(?:(?P<sep>[./-])|年)\s?(\d{1,2})(?:(?P=sep)|月)\s?(\d{1,4})"
_HALF = r"(?:[AaPp]\.?[\s]?[Mm]\b\.?|ص|م|上午|下午|午前|午後|오전|오후)"
_HEADER = re.compile(
    rf"[{_MARKS}\ufeff]*(\[)?{_DATE}[.日]?[,،]?\s+(?:({_HALF})\s?)?(\d{{1,2}})[:.](\d{{2}})(?:[:.](\d{{2}}))?"
    rf"(?:\s?({_HALF}))?(?(1)\]\s?|\s+[-–]\s)"
)
# What is left of a header where the file was cut inside it.
_CUT_HEADER = re.compile(
    rf"[{_MARKS}]*\[?\d{{1,4}}(?:[./-]\d{{0,2}}(?:[./-]\d{{0,4}}(?:[,،]?\s*(?:\d{{0,2}}(?:[:.]\d{{0,2}}){{0,2}}"
    rf"(?:\s?(?:[AaPp]\.?\s?[Mm]?\.?)?)?\]?(?:\s+[-–]?)?)?)?)?)?"
)
_HALF_CHARACTER = re.compile("[\udc80-\udcff]+$")  # bytes that are no UTF-8, as they are read
_AFTERNOON = re.compile(r"[Pp]|م|下午|午後|오후")

_MEDIA = {
    "<Media omitted>", "<Medien ausgeschlossen>", "<Medien weggelassen>", "<Multimedia omitido>", "<Médias omis>",
    "<Mídia omitida>", "<Mídia oculta>", "<Ficheiro não revelado>", "<Media omessi>", "<Media weggelaten>",
    "<Без медиафайлов>", "<Файл пропущен>", "<Medya dahil edilmedi>", "<تم استبعاد الوسائط>", "<मीडिया के बिना>",
    "<Media tidak disertakan>", "<View once voice message omitted>",
}  # fmt: skip
_OMITTED = re.compile(  # iOS, after U+200E
    r"(?:.* )?(omitted|weggelassen|omitid[oa]|absente?|ocult[oa]|ometid[oa]|ommess[oa]|omess[oa]|weggelaten|"
    r"отсутствует|пропущен[оа]?|dahil edilmedi|tidak disertakan|محذوف\w*|تم حذف.*|छोड़.*)\.?",
    re.IGNORECASE,
)
_ATTACHED = re.compile(r"\u200e?<[^<>:\n]+: ([^<>\n]+\.\w{2,5})>")  # iOS: <attached: 0001-PHOTO.jpg>
_FILE_ATTACHED = re.compile(r"\u200e?([\w() -]+\.\w{2,5}) \([^()\n]+\)")  # Android: IMG-1.jpg (file attached)
_DELETED = {
    "This message was deleted", "You deleted this message", "This message was deleted by admin",
    "Diese Nachricht wurde gelöscht", "Du hast diese Nachricht gelöscht", "Se eliminó este mensaje",
    "Este mensaje fue eliminado", "Eliminaste este mensaje", "Ce message a été supprimé",
    "Vous avez supprimé ce message", "Mensagem apagada",
    "Essa mensagem foi apagada", "Você apagou esta mensagem", "Esta mensagem foi apagada", "Apagou esta mensagem",
    "Questo messaggio è stato eliminato", "Hai eliminato questo messaggio", "Dit bericht is verwijderd",
    "U hebt dit bericht verwijderd", "Je hebt dit bericht verwijderd", "Данное сообщение удалено",
    "Вы удалили данное сообщение",
    "Это сообщение удалено", "Bu mesaj silindi", "Bu mesajı sildiniz", "تم حذف هذه الرسالة", "حذفت هذه الرسالة",
    "यह संदेश मिटाया गया", "यह मैसेज मिटाया गया था", "आपने यह मैसेज मिटाया", "Pesan ini telah dihapus",
    "Anda telah menghapus pesan ini",
}  # fmt: skip
_EDITED = re.compile(
    r" ?(?:\u200e<[^<>\n]+>|<(?:This message was edited|Diese Nachricht wurde bearbeitet|Se editó este mensaje\.?|"
    r"Ce message a été modifié|Mensagem editada|Esta mensagem foi editada|Questo messaggio è stato modificato|"
    r"Dit bericht is bewerkt|Сообщение изменено|Данное сообщение изменено|Bu mesaj düzenlendi|تم تعديل هذه الرسالة|"
    r"यह मैसेज एडिट किया गया था|Pesan ini diedit)>)\Z"
)
_WAITING = re.compile(
    r"Waiting for this message\.|Warten auf diese Nachricht|Esperando este mensaje|En attente de ce message"
)
# POLL: question, and OPTION: text (3 votes) again and again, in any language.
_POLL = re.compile(
    r"\u200e?[^\n:]{2,20}:\n[^\n]+\n\u200e?(?P<option>[^\n:]{2,20}): [^\n]*\(\d+ [^\n()]+\)"
    r"(?:\n\u200e?(?P=option): [^\n]*\(\d+ [^\n()]+\))+"
)
_MENTION = re.compile(r"@\u2068?(\d{7,15})\b")
_QUOTES = re.compile(r'["“”«»„]')  # in a notice, never in a name
_REPEATED = 3  # so often the same body in angle brackets, and it is the app's in a language that is not in the table


@dataclass
class _FileFacts:
    """What only the whole file tells."""

    order: str  # of the date: dmy, mdy, ymd
    names: dict[str, str] = field(default_factory=dict)  # the part before the first ": " -> a name with ": " in it
    media: set[str] = field(default_factory=set)


def recognises(export: Export) -> bool:
    return any(_is_chat(file) for file in export.with_suffix(".txt"))


def _is_chat(file: ExportFile) -> bool:
    with file.text(BytesIO(file.head)) as text:
        try:
            first = next((line for line in text if line.strip()), "")
        except UnicodeError:
            return False
    return _HEADER.match(first) is not None


def read(reading: Reading) -> Iterator[Entry]:
    reading.report.findings.add_once("authors_by_name", reading.export.name)
    files = [file for file in reading.export.with_suffix(".txt") if _is_chat(file)]
    for file in files or reading.export.with_suffix(".txt"):
        facts = _facts(reading, file)
        yield from _read_file(reading, file, facts)


def _facts(reading: Reading, file: ExportFile) -> _FileFacts:
    """One pass over the headers: the order of the dates, names with a colon, what the app writes for media."""
    seconds: dict[str, set[str]] = {}
    bodies: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    dates: list[tuple[int, int, int]] = []
    separators: set[str | None] = set()
    for line in reading.lines(file):
        found = _HEADER.match(line)
        if found is None:
            continue
        date = (int(found[2]), int(found[4]), int(found[5]))
        if not dates or dates[-1] != date:
            dates.append(date)
            separators.add(found[3])
        name, _, body = line[found.end() :].partition(": ")
        counts[name] += 1
        following, colon, _ = body.partition(": ")
        seen = seconds.setdefault(name, set())
        if len(seen) < 2:
            seen.add(following if colon else "")
        if body.startswith("<") and body.endswith(">"):
            bodies[body] += 1
    names = {
        name: f"{name}: {next(iter(seen))}"
        for name, seen in seconds.items()
        if len(seen) == 1 and "" not in seen and counts[name] >= _REPEATED
    }
    media = {body for body, times in bodies.items() if times >= _REPEATED}
    return _FileFacts(_order(reading, file, dates, separators), names, media)


def _order(reading: Reading, file: ExportFile, dates: list[tuple[int, int, int]], separators: set[str | None]) -> str:
    if any(first > 31 for first, _, _ in dates):
        return "ymd"
    if reading.options.day_first is not None:
        return "dmy" if reading.options.day_first else "mdy"
    day_first = any(first > 12 for first, _, _ in dates)
    month_first = any(second > 12 for _, second, _ in dates)
    if day_first != month_first:
        return "dmy" if day_first else "mdy"
    if separators == {"."}:
        return "dmy"  # no locale writes month.day.year
    backwards = {order: sum(_day(a, order) > _day(b, order) for a, b in pairwise(dates)) for order in ("dmy", "mdy")}
    if backwards["dmy"] != backwards["mdy"]:
        return min(backwards, key=lambda order: backwards[order])
    if all(first == second for first, second, _ in dates):
        return "dmy"  # the same day either way
    first, second, year = next(date for date in dates if date[0] != date[1])
    raise InvalidInput(
        f"{file.name}: {first}/{second}/{year} may be a day of either month, and no other date of the file decides it",
        code="date_order_unknown",
        cure="Say which: day_first=true or day_first=false.",
    )


def _day(date: tuple[int, int, int], order: str) -> tuple[int, int, int]:
    first, second, year = date
    return (year, second, first) if order == "dmy" else (year, first, second)


def _read_file(reading: Reading, file: ExportFile, facts: _FileFacts) -> Iterator[Entry]:
    entry: Entry | None = None
    body: list[str] = []
    last = ""
    for number, last in enumerate(reading.lines_with_ends(file), 1):
        line = last.removesuffix("\n").removesuffix("\r")
        found = _HEADER.match(line)
        if found is None:
            body.append(line)
            continue
        if entry is not None:
            yield _finished(entry, "\n".join(body), facts)
        name, text = _sender(line[found.end() :], facts)
        try:
            time = reading.seconds(_time(found, facts.order), file.name)
        except ValueError as error:
            reading.malformed(file, number, error)
            body.append(line)
            continue
        entry = Entry(
            channel=file.name, id=f"{number}", author_id=name, author=name, text="", time=time,
            kind="said" if name else "service", file=file.name, line=number,
        )  # fmt: skip
        body = [text]
    is_short = len(last) <= MAX_HEADER_CHARACTERS
    if len(body) > 1 and is_short and _CUT_HEADER.fullmatch(_HALF_CHARACTER.sub("", last)):
        body.pop()
        reading.report.findings.add("file_broken", file.name, None, "It ends within the date of a message.")
    if entry is not None:
        yield _finished(entry, "\n".join(body), facts)


def _sender(rest: str, facts: _FileFacts) -> tuple[str, str]:
    """(name, text); no name where the platform speaks."""
    name, colon, text = rest.partition(": ")
    if not colon and rest.endswith(":"):
        name, colon, text = rest[:-1], ":", ""
    if not colon or len(name) > 100 or _QUOTES.search(name):
        return "", rest
    if name in facts.names:
        name = facts.names[name]
        text = rest[len(name) + 2 :]
    return name.strip(_MARKS).removeprefix("~").strip("\u202f\xa0 " + _MARKS) or name, text


def _finished(entry: Entry, text: str, facts: _FileFacts) -> Entry:
    if entry.kind == "said":
        entry.kind, entry.text, entry.attachments = _content(text, facts)
        if "@" in text:
            entry.mentions = tuple(_MENTION.findall(text))
    else:
        entry.text = text
    return entry


def _content(text: str, facts: _FileFacts) -> tuple[Kind, str, tuple[str, ...]]:
    """(kind, the words that are the author's, attachments)."""
    plain = text.strip("\u200e ")
    if plain.rstrip(".") in _DELETED:
        return "deleted", "", ()
    if _WAITING.match(plain) or _POLL.fullmatch(text):
        return "service", plain, ()
    if plain in _MEDIA or text in facts.media:
        return "said", "", ("media",)
    first, newline, caption = text.partition("\n")
    if attached := _FILE_ATTACHED.fullmatch(first):
        return "said", caption if newline else "", (attached[1],)
    if attached := _ATTACHED.search(text):
        caption = (text[: attached.start()] + text[attached.end() :]).strip(" \u200e\n")
        return "said", caption, (attached[1],)
    text = _EDITED.sub("", text)
    if text.startswith("\u200e"):
        if _OMITTED.fullmatch(text[1:]):
            return "said", "", (text[1:].split(" ")[0],)
        return "service", text[1:], ()
    return "said", text, ()


def _time(found: re.Match[str], order: str) -> datetime:
    first, second, third = int(found[2]), int(found[4]), int(found[5])
    if order == "ymd":
        year, month, day = first, second, third
    else:
        year, month, day = third, *((second, first) if order == "dmy" else (first, second))
    hour = int(found[7])
    if half := found[6] or found[10]:
        hour = hour % 12 + (12 if _AFTERNOON.search(half) else 0)
    return datetime(year + 2000 if year < 100 else year, month, day, hour, int(found[8]), int(found[9] or 0))
