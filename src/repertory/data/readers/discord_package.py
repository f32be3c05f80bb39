"""Discord data package: one's own messages in every channel, without anyone else's.

messages/c<id>/channel.json and messages.json (older packages: messages.csv), account/user.json. Folders carry
translated names in some packages, so files are found by their own names. Attachments are addresses with spaces between.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from functools import partial
from typing import Any

from repertory.data.export import Export, ExportFile
from repertory.data.history import Entry
from repertory.data.readers.reading import Reading, identifier, shape, string
from repertory.data.readers.table import header, rows

NAME = "discord-package"
TITLE = "Discord data package"

_COLUMNS = {"ID", "Timestamp", "Contents"}


def recognises(export: Export) -> bool:
    return next(_channels(export), None) is not None


def read(reading: Reading) -> Iterator[Entry]:
    export = reading.export
    user = reading.whole(export.find("user.json"))
    user = user if isinstance(user, dict) else {}
    me = str(user.get("id") or "me")
    name = next((name for key in ("global_name", "username") if isinstance(name := user.get(key), str) and name), me)
    reading.report.findings.add_once("own_messages_only", export.name)
    by_name = {file.name: file for file in export.files}
    for file in _channels(export):
        about = reading.whole(by_name.get(f"{file.folder}/channel.json"))
        about = about if isinstance(about, dict) else {}
        channel = str(about.get("id") or file.folder)
        records = rows(reading, file) if file.suffix == ".csv" else reading.items(file)
        yield from reading.entries(file, records, partial(_entry, channel, me, name))


def _channels(export: Export) -> Iterator[ExportFile]:
    for file in export.files:
        if (file.base == "messages.csv" and set(header(file)) >= _COLUMNS) or (
            file.base == "messages.json" and shape(file) >= {f"item.{name}" for name in _COLUMNS}
        ):
            yield file


def _entry(channel: str, me: str, name: str, record: dict[str, Any]) -> Entry:
    time = datetime.fromisoformat(record["Timestamp"])
    return Entry(
        channel=channel,
        id=identifier(record["ID"]),
        author_id=me,
        author=name,
        text=string(record["Contents"]),
        # Without a zone it is UTC: that is how Discord writes it, so nothing is assumed.
        time=time.timestamp() if time.tzinfo else datetime.fromisoformat(record["Timestamp"] + "+00:00").timestamp(),
        attachments=tuple(address.rsplit("/", 1)[-1] for address in string(record.get("Attachments")).split()),
    )
