"""Answers of hosts that are none, on a real socket: how they come, and how they break off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from repertory.service.host_answer import BrokenOff, posted

HEAD = b"HTTP/1.0 200 OK\r\ncontent-type: application/x-ndjson\r\n\r\n"

Heard = tuple[list[bytes], bytes]  # the lines, and what the host reads once they are told


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Heard]:
    """A host that writes these pieces; what is made of them, and how the host sees the connection end."""

    async def ask(pieces: Sequence[bytes], silence_seconds: float, lines: int, falls_silent: bool) -> Heard:
        ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n{}")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.01)
            if falls_silent:
                ended.set_result(await reader.read())
            writer.close()

        path = tmp_path / "host.sock"
        async with await asyncio.start_unix_server(talk, path):
            heard: list[bytes] = []
            try:
                async with posted(str(path), "/generate", b"{}", silence_seconds) as answer:
                    while len(heard) < lines and (line := await answer.line()) is not None:
                        heard.append(line)
            finally:
                left = await asyncio.wait_for(ended, 20) if falls_silent else b""
            return heard, left

    def run(*pieces: bytes, silence_seconds: float = 20.0, lines: int = 100, falls_silent: bool = False) -> Heard:
        return asyncio.run(ask(pieces, silence_seconds, lines, falls_silent))

    return run


def test_lines_are_the_same_however_they_are_cut(ask: Callable[..., Heard]) -> None:
    whole = HEAD + b'{"text":"a"}\n{"text":"b"}\n'
    told = ([b'{"text":"a"}', b'{"text":"b"}'], b"")
    assert ask(whole) == told
    for at in range(1, len(whole), 7):
        assert ask(whole[:at], whole[at:]) == told


def test_half_a_line_at_the_end_is_none(ask: Callable[..., Heard]) -> None:
    assert ask(HEAD + b'{"text":"a"}\n{"te') == ([b'{"text":"a"}'], b"")


@pytest.mark.parametrize("said", [b"", HEAD[:20]])
def test_a_host_that_closes_before_it_answers_has_broken_off(ask: Callable[..., Heard], said: bytes) -> None:
    with pytest.raises(BrokenOff):
        ask(said)


@pytest.mark.parametrize("said", [b"", HEAD, HEAD + b"{}\n{"])
def test_so_has_one_that_falls_silent(ask: Callable[..., Heard], said: bytes) -> None:
    with pytest.raises(BrokenOff):
        ask(said, silence_seconds=0.05, falls_silent=True)


def test_so_has_one_that_is_not_there(tmp_path: Path) -> None:
    async def call() -> None:
        async with posted(str(tmp_path / "nobody.sock"), "/generate", b"{}", 1.0):
            raise AssertionError("nobody answers")

    with pytest.raises(BrokenOff):
        asyncio.run(call())


def test_leaving_closes_the_connection(ask: Callable[..., Heard]) -> None:
    """The host reads its end, though it has more to tell."""
    assert ask(HEAD + b"{}\n{}\n", lines=1, falls_silent=True) == ([b"{}"], b"")
