"""Conversations between a user and an assistant, as entries: what the readers of such files share.

Roles are the authors: "user" and "assistant", with "prompt" entries for system prompts. Each conversation is a channel,
named by its place: the ids that files give them are not always different ones, least of all in two files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from repertory.data.export import ExportFile
from repertory.data.history import Entry, Kind
from repertory.data.readers.reading import MALFORMED, Reading, shape, string
from repertory.errors import RepertoryError

# What files call the three roles, and the calls and answers of tools, which are nobody's words.
ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "bing": "assistant", "bard": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "function_call": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip


def turn(number: int, role: object, text: str, time: float | None = None, *, is_trained: bool = True) -> Entry:
    """One turn, whose channel `conversations` names. Raises ValueError for a role that is none."""
    known = ROLES.get(str(role).casefold())
    if known is None:
        raise ValueError(f"the role {str(role)[:40]!r} is not known")
    kind: Kind = "said"
    if known == "system":
        kind = "prompt"
    elif known == "tool":
        kind = "service"
    return Entry(
        channel="",
        id=str(number),
        author_id=known,
        author=known,
        text=text,
        time=time,
        kind=kind,
        is_trained=is_trained,
    )


def record_shape(file: ExportFile) -> set[str]:
    """The paths in the first record of an array or of JSON lines."""
    return {path.removeprefix("item.") for path in shape(file)}


def records(reading: Reading, file: ExportFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of an array, of JSON lines or of Parquet rows, numbered from 1."""
    if file.suffix == ".parquet":
        rows: Iterator[Any] = _parquet(reading, file)
    elif file.head.lstrip()[:1] == b"[":
        rows = reading.items(file)
    else:
        rows = _json_lines(reading, file)
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield number, row
        elif row is not None:
            reading.malformed(file, number, TypeError("an object is expected"))


def conversations(
    reading: Reading,
    file: ExportFile,
    records: Iterable[tuple[int, Any]],
    turns: Callable[[Any], Iterator[Entry]],
) -> Iterator[Entry]:
    """The turns of every record. A record with anything that the format does not write is left out and reported."""
    for number, record in records:
        try:
            entries = list(turns(record))
        except MALFORMED as error:
            reading.malformed(file, number, error)
            continue
        for entry in entries:
            if not entry.is_trained:
                reading.report.findings.add("turns_not_trained", file.name, number)
            entry.channel, entry.file, entry.line = f"{file.name}:{number}", file.name, number
            yield entry


def seconds(reading: Reading, file: ExportFile, time: object) -> float | None:
    """Of a time as a number (seconds, or milliseconds beyond the year 5138) or in ISO 8601."""
    if time is None or time == "":
        return None
    if isinstance(time, datetime):
        return reading.seconds(time, file.name)
    if isinstance(time, str):
        return reading.seconds(datetime.fromisoformat(time), file.name)
    number = float(time)  # type: ignore[arg-type]  # anything else raises TypeError, which is reported
    return number / 1000 if number > 1e11 else number


def parts_text(content: object) -> str:
    """Of a text, or of a list of texts and of parts with a `text`; pictures and the like are left out."""
    if not isinstance(content, list):
        return string(content)
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _json_lines(reading: Reading, file: ExportFile) -> Iterator[Any]:
    previous_is_broken = False
    for number, line in enumerate(reading.records(file), 1):
        if previous_is_broken:
            reading.report.findings.add("message_malformed", file.name, number - 1, "The line is not JSON.")
            previous_is_broken = False
        if not line.strip():
            yield None
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            previous_is_broken = True
            yield None
    if previous_is_broken:
        reading.report.findings.add("file_broken", file.name, None, "The last line is not whole.")


def _parquet(reading: Reading, file: ExportFile) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as missing:
        raise RepertoryError(
            "the package pyarrow, which reads Parquet, is not installed",
            code="package_missing",
            cure="Install it: pip install 'repertory[parquet]', or send JSON lines.",
        ) from missing
    try:
        with file.open() as stream:
            for batch in ParquetFile(stream).iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError) as broken:
        what = f"It cannot be read: {str(broken)[:200]}."
        reading.report.findings.add("file_broken", file.name, None, what)
