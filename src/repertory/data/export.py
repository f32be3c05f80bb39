"""An export as it lies there: a file, a folder or a zip archive, read in place.

Nothing is ever extracted: no path that an archive names is written or followed. Archives come from outside, so what
they may expand to is bounded, before a byte of them is read and again while they are read.
"""

from __future__ import annotations

import io
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from repertory.data import cut_archive
from repertory.errors import InvalidInput

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_FILES = 500_000  # a large Slack workspace has one per channel and day
MAX_EXPANDED_BYTES = 64 << 30  # 64 GiB
MAX_RATIO = 200  # expanded to packed bytes; JSON of chats packs 10 to 40 times
RATIO_FREE_BYTES = 1 << 20  # 1 MiB: below this a ratio says nothing
MAX_CONTENTS_BYTES = 64 << 20  # 64 MiB: of the table of contents; MAX_FILES with long names have about as much
MAX_LINE_CHARACTERS = 1 << 20
HEAD_BYTES = 64 << 10
CHUNK_BYTES = 256 << 10

_ENTRY = b"PK\x01\x02"  # how an entry of the table of contents begins

# What reading a stream of an archive can raise where the archive is broken.
BROKEN_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError)


@dataclass(frozen=True)
class ExportFile:
    """A file of an export. `name` is its path inside the export, with forward slashes; never used to write."""

    name: str
    size: int  # bytes, unpacked
    open: Callable[[], IO[bytes]]

    @cached_property
    def head(self) -> bytes:
        """The first HEAD_BYTES; fewer where the file is broken before that."""
        read = b""
        try:
            with self.open() as stream:
                while len(read) < HEAD_BYTES and (more := stream.read(HEAD_BYTES - len(read))):
                    read += more
        except BROKEN_ARCHIVE:
            pass  # the reader meets it again, and reports it
        return read

    @property
    def base(self) -> str:
        return PurePosixPath(self.name).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    @property
    def folder(self) -> str:
        return str(PurePosixPath(self.name).parent)

    def lines(self) -> Iterator[str]:
        """The lines, broken at line feeds only (U+2028 and the like are text), with their ends.

        A byte that is no UTF-8 becomes half a surrogate pair, which History finds and reports. A line longer than
        MAX_LINE_CHARACTERS comes in pieces.
        """
        with self.open() as stream, self.text(stream) as text:
            while line := text.readline(MAX_LINE_CHARACTERS):
                yield line

    def text(self, stream: IO[bytes], newline: str = "\n") -> io.TextIOWrapper:
        return io.TextIOWrapper(stream, encoding=self.encoding, errors=self.errors, newline=newline)

    @property
    def encoding(self) -> str:
        return "utf-16" if self.head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"

    @property
    def errors(self) -> str:
        """What is no text becomes half a surrogate pair; in UTF-16 it is one."""
        return "surrogatepass" if self.encoding == "utf-16" else "surrogateescape"


@dataclass(frozen=True)
class Export:
    name: str
    files: list[ExportFile]  # in order of their names
    broken: str | None = None  # why there may be more files than these

    def find(self, base: str) -> ExportFile | None:
        """The file of that name closest to the top, or None."""
        found = [file for file in self.files if file.base == base]
        return min(found, key=lambda file: file.name.count("/"), default=None)

    def told(self, tell: Callable[[int, int], None]) -> Export:
        """The same export; `tell` hears how many bytes of it have been read so far, and how many it has."""
        total = sum(file.size for file in self.files)
        done = 0

        def opened(file: ExportFile) -> IO[bytes]:
            def count(read: int) -> None:
                nonlocal done
                done += read
                tell(done, total)

            return io.BufferedReader(_Counted(file.open(), count), CHUNK_BYTES)

        files = [ExportFile(file.name, file.size, partial(opened, file)) for file in self.files]
        return Export(self.name, files, self.broken)

    def with_suffix(self, *suffixes: str) -> list[ExportFile]:
        return [file for file in self.files if file.suffix in suffixes]


class _Counted(io.RawIOBase):
    """A stream that says how much of it is read."""

    def __init__(self, stream: IO[bytes], count: Callable[[int], None]) -> None:
        self._stream = stream
        self._count = count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        read = self._stream.readinto(buffer)  # type: ignore[attr-defined]  # all our streams have it
        self._count(read)
        return int(read)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Archive(io.BufferedReader):
    """A file of which zipfile reads the table of contents, all at once, only where that is no longer than it may be:
    half a kilobyte of memory goes to each of its entries, which may have 46 bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._path = path

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_CONTENTS_BYTES:
            raise _refused(self._path, f"its table of contents has {size >> 20:,} MiB", "Split it.")
        content = super().read(size)
        if content.count(_ENTRY) > MAX_FILES:
            raise _refused(self._path, f"it names more than {MAX_FILES:,} files", "Split it.")
        return content


@contextmanager
def open_export(path: Path) -> Iterator[Export]:
    """The export at `path`. Raises InvalidInput if there is none, or if it is an archive that must not be opened."""
    if path.is_dir():
        yield Export(path.name, _folder_files(path))
    elif not path.is_file():
        raise InvalidInput(
            f"{path} is not there, or is neither a file nor a folder", code="export_missing", cure="Check the path."
        )
    elif _is_zip(path):
        with _Archive(path) as file:
            try:
                archive = zipfile.ZipFile(file)
            except BROKEN_ARCHIVE as broken:
                yield _cut_archive(path, broken)
                return
            with archive:
                _refuse_hostile(path, archive)
                yield Export(path.name, _archive_files(archive))
    else:
        yield Export(path.name, [ExportFile(path.name, path.stat().st_size, lambda: path.open("rb"))])


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _folder_files(root: Path) -> list[ExportFile]:
    files = []
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue  # a link could lead anywhere
        files.append(ExportFile(path.relative_to(root).as_posix(), path.stat().st_size, _opener(path)))
        if len(files) > MAX_FILES:
            raise _refused(root, f"it has more than {MAX_FILES:,} files", "Name the folder of the export alone.")
    return files


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    return lambda: path.open("rb")


def _archive_files(archive: zipfile.ZipFile) -> list[ExportFile]:
    infos = [info for info in archive.infolist() if not info.is_dir() and not _is_link(info)]
    return [ExportFile(info.filename, info.file_size, _member(archive, info)) for info in _by_name(infos)]


def _cut_archive(path: Path, broken: Exception) -> Export:
    """What can be followed from the beginning of an archive without its table of contents."""
    files = []
    for member in cut_archive.members(path, MAX_RATIO, RATIO_FREE_BYTES):
        size = (path.stat().st_size if member.end is None else member.end) - member.begin  # packed, for want of better
        opener = partial(cut_archive.open_member, path, member, MAX_RATIO, RATIO_FREE_BYTES)
        files.append(ExportFile(member.name, size, opener))
        if len(files) > MAX_FILES:
            raise _refused(path, f"it has more than {MAX_FILES:,} files", "Split it.")
    if not files:
        raise _refused(path, f"its table of contents cannot be read ({broken})", "Download it again.") from broken
    why = f"The archive has no table of contents ({broken}); the {len(files):,} files that were found are read."
    return Export(path.name, sorted(files, key=lambda file: file.name), why)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: archive.open(info)  # reads no more than the size that was checked


def _by_name(infos: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    return sorted(infos, key=lambda info: info.filename)


def _is_link(info: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(info.external_attr >> 16)


def _refuse_hostile(path: Path, archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    if sum(info.file_size for info in infos) > MAX_EXPANDED_BYTES:
        raise _refused(path, f"it expands to more than {MAX_EXPANDED_BYTES >> 30} GiB", "Split it.")
    if sum(info.compress_size for info in infos) > path.stat().st_size:
        raise _refused(path, "its files overlap, as no packer makes them", "Pack the export again.")
    for info in infos:
        if info.flag_bits & 0x1:
            raise _refused(path, f"{info.filename!r} is encrypted", "Pack it again without a password.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(path, f"{info.filename!r} is packed in an unusual way", "Pack it again as a plain zip.")
        if info.file_size > RATIO_FREE_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1):
            raise _refused(
                path,
                f"{info.filename!r} expands {info.file_size // max(info.compress_size, 1):,} times",
                "Unpack it yourself where that is safe, and import the folder.",
            )


def _refused(path: Path, why: str, cure: str) -> InvalidInput:
    return InvalidInput(f"{path.name} is not opened: {why}", code="archive_refused", cure=cure)
