"""IRC logs of the usual clients: irssi, XChat, HexChat, ZNC, WeeChat and their like.

The date may stand in every line, in "--- Day changed" lines or in the name of the file alone; without any, days are
counted from 1970-01-01, so that pauses are right and dates are not. Somebody who changes nicks stays one author.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry, Kind
from repertory.data.readers.reading import Reading

NAME = "irc"
TITLE = "IRC log"

_TIME = re.compile(
    r"\[?(?:(?P<iso>\d{4}-\d\d-\d\d)[T ]|(?P<dmy>\d\d-\w{3}-\d{4}) |(?P<md>\w{3} \d\d) |(?P<dm>\d\d \w{3}) )?"
    r"(?P<hour>\d\d):(?P<minute>\d\d)(?::(?P<second>\d\d))?\]?\s+"
)
_STAMP = re.compile(r"(\d{9,11}) +")
_SAID = re.compile(r"<[ ~&@%+]?([^>!]+)(?:![^>]*)?>(?:\s|$)")
_ACTION = re.compile(r"\*\s+([^\s*]+)(?:\s|$)")
_NOTICE = re.compile(r"(?:\*\*\*|-!-|-->|<--|---|--)(?:\s|$)")
_RENAMED = re.compile(r"(?:\*\*\*|-!-|---|--)\s+(\S+) (?:are|is) now known as (\S+)\s*$")
_DAY = re.compile(r"--- (?:Day changed|Log opened) \w{3} (\w{3}) (\d\d)(?: \d\d:\d\d:\d\d)? (\d{4})")
_FILE_DATE = re.compile(r"(\d{4})-?(\d\d)-?(\d\d)")
_MONTHS = {"JanFebMarAprMayJunJulAugSepOctNovDec"[3 * n : 3 * n + 3]: n + 1 for n in range(12)}


def recognises(export: Export) -> bool:
    return any(_is_log(file) for file in export.with_suffix(".txt", ".log", ".weechatlog", ""))


def _is_log(file: ExportFile) -> bool:
    lines = [line for line in file.head.decode("utf-8", "replace").split("\n")[:200] if line.strip()]
    said = sum(_is_line(line) for line in lines)
    return said > 0 and said >= len(lines) / 2


def _is_line(line: str) -> bool:
    if _DAY.match(line):
        return True
    found = _TIME.match(line) or _STAMP.match(line)
    rest = line[found.end() :] if found else line
    if found and "\t" in line and rest.count("\t"):
        return True
    return any(pattern.match(rest) for pattern in (_SAID, *((_ACTION, _NOTICE) if found else ())))


def read(reading: Reading) -> Iterator[Entry]:
    files = reading.export.with_suffix(".txt", ".log", ".weechatlog", "")
    files = [file for file in files if _is_log(file)] or files
    identity = _identities(reading, files)
    for file in files:
        yield from _read_file(reading, file, identity)


def _lines(reading: Reading, file: ExportFile) -> Iterator[str]:
    for line in reading.lines_with_ends(file):
        text = line if line.isascii() else _decoded(line)
        yield text.removesuffix("\n").removesuffix("\r")


def _decoded(line: str) -> str:
    """A line that is not UTF-8 is read as cp1252, as IRC clients do; not the last where it is only cut."""
    written = line.encode("utf-8", "surrogateescape")
    try:
        return written.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and not line.endswith("\n"):
            return line
        return written.decode("cp1252", "replace")


def _identities(reading: Reading, files: list[ExportFile]) -> dict[str, str]:
    """The nick that stands for each nick that was changed from or to: of those that are one person, the first seen."""
    first: dict[str, str] = {}

    def root(nick: str) -> str:
        passed = []
        while (other := first.setdefault(nick, nick)) != nick:
            passed.append(nick)
            nick = other
        first.update(dict.fromkeys(passed, nick))  # a chain of a million names is walked once
        return nick

    for file in files:
        for line in _lines(reading, file):
            if "now known as" in line and (found := _RENAMED.search(line)):
                old, new = root(_nick(found[1])), root(_nick(found[2]))
                first[new] = old
    return {nick: root(nick) for nick in first}


def _nick(nick: str) -> str:
    return nick.lstrip("~&@%+").casefold()


def _read_file(reading: Reading, file: ExportFile, identity: dict[str, str]) -> Iterator[Entry]:
    day = _file_day(file)
    clock = -1  # seconds since midnight of the line before; where it falls, a day has passed unless a line says which
    for number, line in enumerate(_lines(reading, file), 1):
        if changed := _DAY.match(line):
            if changed[1] in _MONTHS:
                day, clock = _date(int(changed[3]), _MONTHS[changed[1]], int(changed[2])) or day, -1
            continue
        time: float | None = None
        if found := _TIME.match(line):
            now = int(found["hour"]) * 3600 + int(found["minute"]) * 60 + int(found["second"] or 0)
            dated = _line_day(found, day)
            if dated:
                day = dated
            elif now < clock and day is not None:
                day += timedelta(days=1)
            elif day is None:
                day = datetime(1970, 1, 1)
                reading.report.findings.add_once("time_missing", file.name, "No line and no file name has a date.")
            clock = now
            if now < 86_400 and day is not None:
                time = reading.seconds(day + timedelta(seconds=now), file.name)
            line = line[found.end() :]
        elif found := _STAMP.match(line):
            time = float(found[1])
            line = line[found.end() :]
        entry = _entry(file, number, line, time, identity)
        if entry is not None:
            yield entry


def _entry(file: ExportFile, number: int, line: str, time: float | None, identity: dict[str, str]) -> Entry | None:
    kind: Kind = "said"
    nick, text = "", line
    if found := _SAID.match(line):
        nick, text = found[1], line[found.end() :]
    elif found := _ACTION.match(line):
        nick, text = found[1], f"/me {line[found.end() :]}"
    elif line.count("\t") and time is not None:
        nick, text = (part for part in line.split("\t", 1))  # WeeChat
        nick = nick.strip().lstrip("~&@%+")
        if nick in ("-->", "<--", "--", "", "=!="):
            kind = "service"
        elif nick == "*":
            nick, _, rest = text.partition(" ")
            text = f"/me {rest}"
    elif not line.strip():
        return None
    else:
        kind = "service"
    key = _nick(nick)
    return Entry(
        channel=file.folder if file.folder != "." else _FILE_DATE.sub("", file.name),
        id=f"{file.name}:{number}",
        author_id=identity.get(key, key),
        author=nick,
        text=text,
        time=time,
        kind=kind,
        file=file.name,
        line=number,
    )


def _file_day(file: ExportFile) -> datetime | None:
    found = _FILE_DATE.search(file.base)
    return _date(int(found[1]), int(found[2]), int(found[3])) if found else None


def _line_day(found: re.Match[str], day: datetime | None) -> datetime | None:
    if iso := found["iso"]:
        return _date(int(iso[:4]), int(iso[5:7]), int(iso[8:]))
    year = day.year if day else 1970
    if dmy := found["dmy"]:
        number, month, year = int(dmy[:2]), dmy[3:6], int(dmy[7:])
    elif md := found["md"]:
        number, month = int(md[4:]), md[:3]
    elif dm := found["dm"]:
        number, month = int(dm[:2]), dm[3:]
    else:
        return None
    return _date(year, _MONTHS[month], number) if month in _MONTHS else None


def _date(year: int, month: int, day: int) -> datetime | None:
    try:
        return datetime(year, month, day, tzinfo=UTC).replace(tzinfo=None)
    except ValueError:
        return None
