"""Replies as streams, without a service: how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from repertory.service.api.replies import DELIVERY_SECONDS, EventStream


def test_a_reader_who_does_not_read_holds_the_source_no_longer_than_the_time_of_the_reply() -> None:
    is_closed = False

    async def endless() -> AsyncGenerator[str]:
        nonlocal is_closed
        try:
            while True:
                yield "data: la\n\n"
        finally:
            is_closed = True

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("nothing comes")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # as uvicorn does while the reader's buffers are full

    async def ask() -> None:
        source = endless()
        await anext(source)
        stream = EventStream(source, source, timeout_seconds=0.1 - DELIVERY_SECONDS)
        answering = asyncio.ensure_future(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send))
        done, _ = await asyncio.wait({answering}, timeout=20)
        assert done
        with pytest.raises(TimeoutError):
            answering.result()

    asyncio.run(ask())
    assert is_closed
