"""What a host answers, line by line as it comes.

A reply is a line for each token, and on each a general HTTP client spends more than all the rest of the service does.
So this is HTTP/1.0, where an answer simply goes on to the end of its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CONNECT_SECONDS = 5.0
PIECE_BYTES = 1 << 16


class BrokenOff(Exception):
    """There is no host, the connection broke, or nothing came for too long."""


class HostAnswer:
    """Its status and its body. Whatever reads from it raises BrokenOff."""

    def __init__(self, reader: asyncio.StreamReader, silence_seconds: float) -> None:
        """`silence_seconds`: as long without a word, and the host counts as gone."""
        self.status = 0  # until `begin`
        self._reader = reader
        self._silence_seconds = silence_seconds
        self._unread = b""

    async def begin(self) -> None:
        while b"\r\n\r\n" not in self._unread:
            if not await self._receive():
                raise BrokenOff
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        self.status = int(head.split(b" ", 2)[1])

    async def line(self) -> bytes | None:
        """The next one, without its end; None: no more came."""
        while b"\n" not in self._unread:
            if not await self._receive():
                return None
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    async def whole(self) -> bytes:
        while await self._receive():
            pass
        return self._unread

    async def _receive(self) -> bool:
        """Whether anything came before the end of the connection."""
        try:
            async with asyncio.timeout(self._silence_seconds):
                piece = await self._reader.read(PIECE_BYTES)
        except OSError as error:  # TimeoutError is one
            raise BrokenOff from error
        self._unread += piece
        return bool(piece)


@asynccontextmanager
async def posted(socket: str, path: str, body: bytes, silence_seconds: float) -> AsyncIterator[HostAnswer]:
    """Leaving closes the connection, which stops whatever the host does for it. Raises BrokenOff."""
    head = f"POST {path} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(socket)
    except OSError as error:
        raise BrokenOff from error
    try:
        writer.write(head.encode() + body)
        answer = HostAnswer(reader, silence_seconds)
        await answer.begin()
        yield answer
    finally:
        writer.close()
