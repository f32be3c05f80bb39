"""A zip archive whose end is missing, as an interrupted download leaves it: its files are found one after the other.

The table of contents of a zip stands at its end; but before every file stands a header with its name. Nothing is
extracted, and what expands beyond the limits of export.py breaks off.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from zipfile import ZIP_DEFLATED, ZIP_STORED

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK_BYTES = 64 << 10

# https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7: signature, version, flags, method, time, date,
# CRC, packed size, size, length of the name, length of the extra field
_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 0x1, 0x8, 0x800
_UNKNOWN = 0xFFFFFFFF  # the size is in a ZIP64 extra field


@dataclass(frozen=True)
class Member:
    name: str
    method: int
    begin: int  # of the packed bytes in the archive
    end: int | None  # None where the archive ends before the file does


def members(path: Path, max_ratio: int, free_bytes: int) -> Iterator[Member]:
    """The files of the archive from its beginning on, as far as they can be followed."""
    size = path.stat().st_size
    at = 0
    with path.open("rb") as archive:
        while at + _HEADER.size <= size:
            archive.seek(at)
            signature, _, flags, method, _, _, _, packed, _, name_length, extra_length = _HEADER.unpack(
                archive.read(_HEADER.size)
            )
            name = archive.read(name_length)
            begin = at + _HEADER.size + name_length + extra_length
            if (
                signature != b"PK\x03\x04"
                or flags & _ENCRYPTED
                or method not in (ZIP_STORED, ZIP_DEFLATED)
                or begin > size
            ):
                return
            end: int | None = begin + packed
            if flags & _SIZES_FOLLOW or packed == _UNKNOWN:
                end = _end(path, begin, max_ratio, free_bytes) if method == ZIP_DEFLATED else None
            if end is not None and end > size:
                end = None
            yield Member(name.decode("utf-8" if flags & _UTF8 else "cp437", "replace"), method, begin, end)
            if end is None:
                return
            at = end + (_descriptor_length(archive, end) if flags & _SIZES_FOLLOW else 0)


def open_member(path: Path, member: Member, max_ratio: int, free_bytes: int) -> IO[bytes]:
    """The file's bytes. Reading raises EOFError where the archive ends before the file, zlib.error where it is broken
    or expands more than `max_ratio` times beyond `free_bytes`."""
    archive = path.open("rb")
    archive.seek(member.begin)
    return io.BufferedReader(_Unpacked(archive, member, max_ratio, free_bytes), CHUNK_BYTES)


class _Unpacked(io.RawIOBase):
    def __init__(self, archive: IO[bytes], member: Member, max_ratio: int, free_bytes: int) -> None:
        self._archive = archive
        self._member = member
        self._inflating = zlib.decompressobj(-15) if member.method == ZIP_DEFLATED else None
        self._max_ratio, self._free_bytes = max_ratio, free_bytes
        self._packed = self._expanded = 0
        self._waiting = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        while True:
            if self._inflating is not None and self._inflating.eof:
                return 0
            if not self._waiting:
                self._waiting = self._more()
            if not self._waiting and self._is_whole:
                return 0
            if not self._waiting:
                raise EOFError("the archive ends within this file")
            if self._inflating is None:
                data, self._waiting = self._waiting[: len(view)], self._waiting[len(view) :]
            else:
                data = self._inflating.decompress(self._waiting, len(view))
                self._waiting = self._inflating.unconsumed_tail
            self._expanded += len(data)
            if self._expanded > self._free_bytes and self._expanded > self._max_ratio * self._packed:
                raise zlib.error(f"it expands more than {self._max_ratio} times")
            if data:
                view[: len(data)] = data
                return len(data)

    @property
    def consumed(self) -> int:
        """Packed bytes up to the end of the compressed data."""
        assert self._inflating is not None
        return self._packed - len(self._inflating.unused_data)

    @property
    def _is_whole(self) -> bool:
        return self._inflating is None and self._member.end is not None

    def _more(self) -> bytes:
        left = CHUNK_BYTES if self._member.end is None else self._member.end - self._member.begin - self._packed
        read = self._archive.read(min(CHUNK_BYTES, left))
        self._packed += len(read)
        return read

    def close(self) -> None:
        self._archive.close()
        super().close()


def _end(path: Path, begin: int, max_ratio: int, free_bytes: int) -> int | None:
    """Where the compressed data that begins there ends: only unpacking tells. None where it does not, or is broken."""
    with path.open("rb") as archive:
        archive.seek(begin)
        unpacked = _Unpacked(archive, Member("", ZIP_DEFLATED, begin, None), max_ratio, free_bytes)
        space = bytearray(CHUNK_BYTES)
        try:
            while unpacked.readinto(space):
                pass
        except (EOFError, zlib.error):
            return None
        return begin + unpacked.consumed


def _descriptor_length(archive: IO[bytes], at: int) -> int:
    """CRC and sizes after a file, with or without a signature, of 4 bytes each or of 8."""
    archive.seek(at)
    following = archive.read(28)
    for length in (16, 24, 12, 20):
        if following[length : length + 2] in (b"PK", b""):
            return length
    return 16
