"""Clients that send or read next to nothing: they are ended in time, and nobody else notices them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from socket import socket

import psutil
import pytest

from latency import p99_seconds
from rude_clients import connected, get, post, still_open
from running_service import RunningService, eventually

pytestmark = pytest.mark.slow

Start = Callable[..., RunningService]

SENDERS = 120
READERS = 30
PATIENCE_SECONDS = 5.0
MEASURED_SECONDS = 10.0  # until after the rude ones were ended

GENERATE = "/api/v1/generate?org_id=rude"
ENDLESS = {"model": "rude", "messages": [{"role": "user", "content": "a long one"}], "max_tokens": 100_000}
# With the words come the likeliest tokens, so that there soon is more than the kernel takes for a reader.
TALKATIVE = ENDLESS | {"stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}


class RudeClients:
    """All at once, on connections whose ends they hold on to whatever the service does."""

    def __init__(self, url: str) -> None:
        self._sockets = ExitStack()
        self._senders = [self._connected(url) for _ in range(SENDERS)]
        self._readers = [self._connected(url, reads_little=True) for _ in range(READERS)]
        self._threads = [threading.Thread(target=self._drip)]
        self._threads += [threading.Thread(target=self._ask, args=each) for each in enumerate(self._readers)]
        for thread in self._threads:
            thread.start()

    @property
    def clients(self) -> list[socket]:
        return self._senders + self._readers

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        self._sockets.close()

    def _connected(self, url: str, *, reads_little: bool = False) -> socket:
        return self._sockets.enter_context(connected(url, reads_little=reads_little))

    def _drip(self) -> None:
        """Half of them within the head of a request, half within the body: a byte a second of each."""
        head, _, body = post(GENERATE, message="x" * 1000).partition(b"\r\n\r\n")
        for client in self._senders[::2]:
            client.sendall(head + b"\r\n\r\n")
        left = {client: iter(body if at % 2 == 0 else head) for at, client in enumerate(self._senders)}
        while left:
            for client, content in list(left.items()):
                try:
                    client.send(bytes([next(content)]))
                except OSError:
                    del left[client]
            time.sleep(1)

    def _ask(self, number: int, client: socket) -> None:
        """For a stream without end, or for megabytes; and read nothing of it."""
        with suppress(OSError):
            client.sendall(post("/v1/chat/completions", **TALKATIVE) if number < 5 else get("/openapi.json") * 400)


@pytest.mark.fault("F28")
def test_clients_who_send_or_read_next_to_nothing_are_ended_and_cost_nobody_else_anything(start_service: Start) -> None:
    service = start_service(CLIENT_TIMEOUT_SECONDS=str(PATIENCE_SECONDS)).until_ready()
    for org_id in ("rude", "polite"):
        service.trained(org_id)
    alone = p99_seconds(service, "polite", MEASURED_SECONDS)
    first, *_, last = [_memory_bytes_after_rude_ones(service, alone) for _ in range(3)]
    assert last < 1.05 * first
    told = service.client.get(f"{service.url}/metrics").text
    assert "repertory_generations 0.0" in told  # no place is held for them


def _memory_bytes_after_rude_ones(service: RunningService, alone_seconds: float) -> int:
    process = psutil.Process(service.process.pid)
    with closing(RudeClients(service.url)) as rude:
        eventually(lambda: still_open(process, rude.clients) == SENDERS + READERS)
        eventually(lambda: process.cpu_percent(0.2) < 20)  # until what they asked for is made, as far as it goes
        assert p99_seconds(service, "polite", MEASURED_SECONDS) < 3 * alone_seconds
        eventually(lambda: still_open(process, rude.clients) == 0)  # while they hold on to their ends
    return process.memory_info().rss
