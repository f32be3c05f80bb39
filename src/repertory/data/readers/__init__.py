"""Readers of chat exports: one module per format, each a stream from an export to entries of a history.

A reader module has a NAME, a TITLE, `recognises(export)`, which looks at structure and never at the name of a file, and
`read(reading)`, which yields entries in the order of the export and adds findings to the reading's report. To add a
format, write such a module and name it in READERS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from repertory.data.export import Export, open_export
from repertory.data.history import History, ImportReport
from repertory.data.readers import (
    alpaca,
    chatgpt,
    claude,
    discord,
    discord_csv,
    discord_package,
    irc,
    messages,
    messenger,
    native,
    rewritten,
    sharegpt,
    slack,
    table,
    telegram,
    twitch,
    whatsapp,
)
from repertory.data.readers.reading import Reading, ReadOptions
from repertory.errors import InvalidInput

# In the order in which they are asked; the first that recognises an export reads it, so the general come last.
READERS: tuple[ModuleType, ...] = (
    rewritten, discord, discord_package, slack, telegram, messenger, twitch, chatgpt, claude, native, sharegpt, alpaca,
    messages, discord_csv, whatsapp, irc, table,
)  # fmt: skip
FORMATS = tuple(reader.NAME for reader in READERS)
_DISCORD_TEXT = re.compile(rb"={20,}\r?\nGuild: ")
DIALOGUES = tuple(reader.NAME for reader in (chatgpt, claude, native, sharegpt, alpaca, messages))


@contextmanager
def open_history(
    path: Path,
    format: str = "auto",
    options: ReadOptions | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Iterator[History]:
    """The history in the export at `path`, to be read once while the context lasts.

    `tell` hears how many bytes have been read, and of how many; some formats are read twice.
    Raises InvalidInput: no such export, an archive that must not be opened, a format that is unknown or not recognised.
    """
    with open_export(path) as export:
        reader = _reader(export, format)
        if tell is not None:
            export = export.told(tell)
        report = ImportReport(rewritten.format_of(export) if reader is rewritten else reader.NAME)
        if export.broken:
            report.findings.add("file_broken", export.name, None, export.broken)
        reading = Reading(export, options or ReadOptions(), report)
        yield History(reader.read(reading), report)


def detect(path: Path) -> str:
    """The name of the format of the export at `path`. Raises InvalidInput if none recognises it."""
    with open_export(path) as export:
        return str(_reader(export, "auto").NAME)


def _reader(export: Export, format: str) -> ModuleType:
    if format != "auto":
        for reader in READERS:
            if format == reader.NAME:
                return reader
        raise InvalidInput(
            f"{format!r} is not a format", code="format_unknown", cure=f"Choose auto or one of {', '.join(FORMATS)}."
        )
    for reader in READERS:
        if reader.recognises(export):
            return reader
    raise _unrecognised(export)


def _unrecognised(export: Export) -> InvalidInput:
    suffixes = {file.suffix for file in export.files}
    cure = f"Name the format: {', '.join(FORMATS)}."
    if suffixes <= {".html", ".htm", ".css", ".js", ".png", ".jpg"} and suffixes & {".html", ".htm"}:
        cure = "Export again as JSON; pages keep too little of who said what, and when."
    elif any(_DISCORD_TEXT.match(file.head) for file in export.with_suffix(".txt")):
        cure = "Export again as JSON; DiscordChatExporter's plain text keeps too little of who said what, and when."
    elif not export.files or all(file.size == 0 for file in export.files):
        cure = "The export is empty. Export it again."
    names = ", ".join(file.name for file in export.files[:5]) or "nothing"
    return InvalidInput(f"no known format is recognised in {names}", code="format_not_recognised", cure=cure)
