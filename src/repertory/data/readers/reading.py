"""One reading of one export: what every reader is given, and what it does alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from io import BytesIO
from typing import Any

from repertory.data.export import BROKEN_ARCHIVE, Export, ExportFile
from repertory.data.history import Entry, ImportReport
from repertory.data.jsonstream import MAX_VALUE_CHARACTERS, BrokenJson, walk

SHAPE_DEPTH = 6  # levels that tell formats apart
MAX_SHAPED_FILES = 40  # files looked into to recognise a format

MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What an export does not say itself."""

    timezone: tzinfo | None = None  # of times that name none; None: UTC, and the report says so
    day_first: bool | None = None  # 3/4 is the 3rd of April; None: found out from the whole file
    columns: Mapping[str, str] = field(default_factory=dict)  # CSV: author, text, time, channel, id, reply_to -> header


@dataclass(frozen=True)
class Reading:
    export: Export
    options: ReadOptions
    report: ImportReport

    def walk(self, file: ExportFile, through: frozenset[str], **how: Any) -> Iterator[tuple[str, Any]]:
        """jsonstream.walk; where the document breaks off, what came before stands and a finding says where."""
        try:
            yield from walk(file, through, **how)
        except BrokenJson as broken:
            self.report.findings.add("file_broken", file.name, broken.line, f"At line {broken.line}: {broken.why}.")
        except BROKEN_ARCHIVE as broken:
            self.report.findings.add("file_broken", file.name, None, f"It cannot be read: {broken}.")

    def items(self, file: ExportFile, path: str = "") -> Iterator[Any]:
        """The elements of the array at `path`."""
        item = f"{path}.item" if path else "item"
        through = frozenset(_prefixes(path))
        return (value for at, value in self.walk(file, through) if at == item)

    def whole(self, file: ExportFile | None) -> Any:
        """A small document as one value; None where it is missing or broken."""
        if file is None:
            return None
        return next((value for _, value in self.walk(file, frozenset())), None)

    def lines(self, file: ExportFile) -> Iterator[str]:
        """The lines without their ends."""
        return (line.removesuffix("\n").removesuffix("\r") for line in self.lines_with_ends(file))

    def records(self, file: ExportFile) -> Iterator[str]:
        """The lines without their ends, where each is a value and may be as long as one; longer ones come in pieces."""
        parts: list[str] = []
        for piece in self.lines_with_ends(file):
            parts.append(piece)
            if piece.endswith("\n") or sum(map(len, parts)) > MAX_VALUE_CHARACTERS:
                yield "".join(parts).removesuffix("\n").removesuffix("\r")
                parts.clear()
        if parts:
            yield "".join(parts)

    def lines_with_ends(self, file: ExportFile) -> Iterator[str]:
        try:
            yield from file.lines()
        except UnicodeError:
            self.report.findings.add("file_broken", file.name, None, "It ends within a character.")
        except BROKEN_ARCHIVE as broken:
            self.report.findings.add("file_broken", file.name, None, f"It cannot be read: {broken}.")

    def entries(
        self, file: ExportFile, records: Iterable[Any], convert: Callable[[Any], Entry | None]
    ) -> Iterator[Entry]:
        """The records as entries, numbered from 1. One that is not what the format writes is left out and reported."""
        for number, record in enumerate(records, 1):
            try:
                entry = convert(record)
            except MALFORMED as error:
                self.malformed(file, number, error)
                continue
            if entry is not None:
                entry.file, entry.line = file.name, number
                yield entry

    def malformed(self, file: ExportFile, number: int, error: Exception) -> None:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        self.report.findings.add("message_malformed", file.name, number, f"Record {number}: {what[:200]}.")

    def unknown_kind(self, file: ExportFile, kind: object) -> None:
        """Reported once for each kind."""
        what = f"The kind {str(kind)[:60]!r} is not known; kept as a service notice, not as words."
        if not any(finding.what == what for finding in self.report.findings.kept):
            self.report.findings.add("kind_unknown", file.name, None, what)

    def seconds(self, time: datetime, place: str) -> float:
        """Seconds since 1970 in UTC of a time that may name no zone."""
        if time.tzinfo is None:
            time = time.replace(tzinfo=self._zone)
            if self.report.timezone_assumed is None:
                self.report.timezone_assumed = str(self._zone)
                if self.options.timezone is None:
                    self.report.findings.add("timezone_assumed", place)
        return time.timestamp()

    @property
    def _zone(self) -> tzinfo:
        return self.options.timezone or UTC


class _TopLevels:
    """The containers down to SHAPE_DEPTH."""

    def __contains__(self, path: object) -> bool:
        return str(path).count(".") < SHAPE_DEPTH - 1


@lru_cache(maxsize=256)
def shape(file: ExportFile) -> frozenset[str]:
    """The paths in the first kilobytes of a JSON document or of JSON lines, as jsonstream.walk writes them."""
    head = ExportFile(file.name, len(file.head), lambda: BytesIO(file.head))
    paths: set[str] = set()
    try:
        for path, value in walk(head, _TopLevels()):  # type: ignore[arg-type]
            paths.add(path)
            if isinstance(value, dict):
                paths.update(f"{path}.{key}" if path else str(key) for key in value)
    except BrokenJson:
        pass  # the head ends somewhere
    return frozenset(paths - {""})


def shapes(export: Export) -> list[tuple[ExportFile, frozenset[str]]]:
    """The JSON files, biggest first, with their shapes: the few biggest tell what an export is."""
    files = sorted(export.with_suffix(".json", ".jsonl", ".ndjson", ""), key=lambda file: -file.size)
    return [(file, found) for file in files[:MAX_SHAPED_FILES] if (found := shape(file))]


def files_shaped(export: Export, *paths: str) -> list[ExportFile]:
    """Every JSON file of the export whose shape has all `paths`."""
    return [file for file in export.with_suffix(".json") if shape(file) >= set(paths)]


def string(value: object) -> str:
    """A text, "" where there is none. Raises TypeError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"a text is expected, not {type(value).__name__}")
    return value


def identifier(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    raise TypeError(f"an id is expected, not {type(value).__name__}")


def _prefixes(path: str) -> Iterator[str]:
    yield ""
    parts = path.split(".") if path else []
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])
