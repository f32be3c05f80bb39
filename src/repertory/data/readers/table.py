"""CSV with a header: any columns, told apart by their names or by the caller's mapping."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from io import BytesIO

from repertory.data.export import BROKEN_ARCHIVE, Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.reading import Reading
from repertory.errors import InvalidInput

NAME = "csv"
TITLE = "CSV with a column for the author and one for the text"

MAX_CELL_CHARACTERS = 1 << 20

# What exporters and people call these columns; a mapping from the caller goes before.
KNOWN = {
    "author": ("author", "author_name", "user", "username", "user_name", "sender", "from", "name", "speaker", "nick"),
    "text": ("text", "content", "message", "body", "msg"),
    "time": ("time", "timestamp", "date", "datetime", "created_at", "sent_at", "ts"),
    "channel": ("channel", "channel_id", "conversation", "conversation_id", "chat", "room", "thread"),
    "id": ("id", "message_id"),
    "reply_to": ("reply_to", "reply_to_id", "in_reply_to", "parent_id"),
}


def recognises(export: Export) -> bool:
    return any({"author", "text"} <= set(_columns(header(file))) for file in export.with_suffix(".csv", ".tsv"))


def read(reading: Reading) -> Iterator[Entry]:
    for file in reading.export.with_suffix(".csv", ".tsv", ".txt"):
        columns = _columns(header(file)) | dict(reading.options.columns)
        missing = sorted({"author", "text"} - set(columns)) + sorted(set(columns.values()) - set(header(file)))
        if missing:
            raise InvalidInput(
                f"{file.name} has no column for {', '.join(missing)}; its columns are {', '.join(header(file))}",
                code="columns_missing",
                cure="Name them: column=author=HEADER and column=text=HEADER; also time, channel, id, reply_to.",
            )
        yield from reading.entries(file, rows(reading, file), partial(_entry, reading, file, columns))


def header(file: ExportFile) -> list[str]:
    """The names of the columns, [] where the file has none."""
    with file.text(BytesIO(file.head), newline="") as text:
        try:
            return [name.strip() for name in next(csv.reader(text, delimiter=_delimiter(file)), [])]
        except (csv.Error, UnicodeError):
            return []


def rows(reading: Reading, file: ExportFile) -> Iterator[dict[str, str]]:
    """The rows by column name. Cells keep their line breaks. One that lacks cells lacks keys."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    try:
        with file.open() as stream, file.text(stream, newline="") as text:
            of_row: list[str] = []  # the lines of the row that is being read
            lines = csv.reader(_kept(text, of_row), delimiter=_delimiter(file))
            names = [name.strip() for name in next(lines, [])]
            last: list[str] = []
            for row in lines:
                last[:] = of_row
                of_row.clear()
                if row:
                    yield dict(zip(names, row, strict=False))
            if _is_cut(last, _delimiter(file)):
                reading.report.findings.add("file_broken", file.name, lines.line_num, "It ends within a cell.")
    except csv.Error as error:
        reading.report.findings.add("file_broken", file.name, None, f"It cannot be read on: {error}.")
    except UnicodeError:
        reading.report.findings.add("file_broken", file.name, None, "It ends within a character.")
    except BROKEN_ARCHIVE as broken:
        reading.report.findings.add("file_broken", file.name, None, f"It cannot be read: {broken}.")


def _kept(lines: Iterable[str], into: list[str]) -> Iterator[str]:
    for line in lines:
        into.append(line)
        yield line


def _is_cut(lines: list[str], delimiter: str) -> bool:
    """Whether the last row of a file, of these lines, has a quoted cell without an end."""
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _delimiter(file: ExportFile) -> str:
    first = file.head.split(b"\n", 1)[0]
    return max((";", "\t", ","), key=lambda mark: first.count(mark.encode()))


def _columns(names: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for column, known in KNOWN.items():
        for name in names:
            if name.casefold().replace(" ", "_") in known and name not in found.values():
                found[column] = name
                break
    return found


def _entry(reading: Reading, file: ExportFile, columns: dict[str, str], row: dict[str, str]) -> Entry:
    author = row[columns["author"]]
    if not author:
        raise ValueError("the author is empty")
    time = _time(reading, file, row.get(columns.get("time", ""), ""))
    return Entry(
        channel=row.get(columns.get("channel", "")) or file.name,
        id=row.get(columns.get("id", "")) or f"{file.name}:{reading.report.entries}",
        author_id=author,
        author=author,
        text=row[columns["text"]],
        time=time,
        reply_to=row.get(columns.get("reply_to", "")) or None,
    )


def _time(reading: Reading, file: ExportFile, text: str) -> float | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        return reading.seconds(datetime.fromisoformat(text.strip()), file.name)
    seconds = number / 1000 if number > 1e11 else number  # milliseconds; as seconds that would be the year 5138
    return datetime.fromtimestamp(seconds, UTC).timestamp()
