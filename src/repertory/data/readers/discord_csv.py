"""DiscordChatExporter, CSV: AuthorID,Author,Date,Content,Attachments,Reactions. No ids, replies or bots are in it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from functools import partial

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.reading import Reading
from repertory.data.readers.table import header, rows

NAME = "discord-csv"
TITLE = "DiscordChatExporter CSV"

_HEADER = ["AuthorID", "Author", "Date", "Content", "Attachments", "Reactions"]


def recognises(export: Export) -> bool:
    return any(header(file) == _HEADER for file in export.with_suffix(".csv"))


def read(reading: Reading) -> Iterator[Entry]:
    for file in reading.export.with_suffix(".csv"):
        if header(file) == _HEADER:
            yield from reading.entries(file, rows(reading, file), partial(_entry, reading, file))


def _entry(reading: Reading, file: ExportFile, record: dict[str, str]) -> Entry:
    author, date, content = record["Author"], record["Date"], record["Content"]
    time = reading.seconds(datetime.fromisoformat(date), file.name)  # seven digits of a second
    return Entry(
        channel=file.name,
        id=f"{reading.report.entries}",
        author_id=record["AuthorID"],
        author=author,
        text=content,
        time=time,
        attachments=tuple(name for name in record["Attachments"].split(",") if name),
    )
