"""How replies end before their end: the reader goes away, or the time is over.

The host's own HTTP over a real socket; the device is driven by the test, so that steps can be counted.
"""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
import uvicorn

from repertory.errors import DeadlineExceeded
from repertory.model.base import Base
from repertory.model.host import Host, make_app
from repertory.model.loop import DeviceLoop
from running_host import eventually, request

HEAD = b"POST /generate HTTP/1.1\r\nhost: host\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"


class HandDrivenHost:
    """A host whose device takes a step when it is told to."""

    def __init__(self, base: Base, path: Path) -> None:
        self.path = str(path)
        host = Host("tiny", None, None, turn=path.with_name("turn"))
        self.loop = host._loop = DeviceLoop(base, training_share=0.2)
        self.engine = self.loop.engine
        self.engine.scheduler.step_tokens = 8
        self._server = uvicorn.Server(
            uvicorn.Config(make_app(host), uds=self.path, log_level="warning", timeout_graceful_shutdown=1)
        )
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        eventually(lambda: self._server.started)

    def ask(self, content: str = "Hello!", timeout_seconds: float | None = None) -> socket.socket:
        """An open connection, on which the request was sent and taken."""
        asked = request(None, max_tokens=400, temperature=1.0, seed=1, timeout_seconds=timeout_seconds)
        body = json.dumps(asked | {"messages": [{"role": "user", "content": content}]}).encode()
        connection = socket.socket(socket.AF_UNIX)
        self._connections.append(connection)
        connection.connect(self.path)
        connection.sendall(HEAD % len(body) + body)
        self.take_message()
        return connection

    def take_message(self) -> None:
        """What the host's HTTP has noticed reaches the device, which does not step meanwhile."""
        eventually(lambda: not self.loop._inbox.empty())
        assert self.loop._take_messages()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def host(base: Base) -> Iterator[HandDrivenHost]:
    with tempfile.TemporaryDirectory() as folder:
        running = HandDrivenHost(base, Path(folder) / "h.sock")
        yield running
        running.close()


@pytest.mark.parametrize("state", ["waiting", "reading its prompt", "writing its reply"])
def test_a_closed_connection_frees_its_place_before_the_next_step(host: HandDrivenHost, state: str) -> None:
    scheduler = host.engine.scheduler
    if state == "waiting":
        scheduler.max_rows = 1
        stays = host.ask()
        host.engine.step()
    leaves = host.ask("a long prompt " * 20 if state == "reading its prompt" else "Hello!")
    if state == "waiting":
        host.engine.step()
        assert (len(scheduler.running), scheduler.waiting_count) == (1, 1)
    elif state == "reading its prompt":
        host.engine.step()
        assert len(scheduler.prefilling) == 1
    else:
        while not (scheduler.running and len(scheduler.running[0].output_ids) >= 3):
            host.engine.step()
    steps = host.engine.steps
    leaves.close()
    host.take_message()
    assert host.engine.steps == steps
    assert scheduler.waiting_count == 0
    assert len(scheduler.running) == (1 if state == "waiting" else 0)
    if state == "waiting":
        stays.close()
        host.take_message()
    assert not host.engine.has_work


@pytest.mark.parametrize("state", ["waiting", "writing its reply"])
def test_a_reply_whose_time_is_over_ends_with_an_error_and_frees_its_place(host: HandDrivenHost, state: str) -> None:
    scheduler = host.engine.scheduler
    if state == "waiting":
        scheduler.max_rows = 1
        host.ask()
        host.engine.step()
    late = host.ask(timeout_seconds=0.2)
    ends = monotonic() + 0.2  # it came before
    while monotonic() < ends:
        host.engine.step()
        sleep(0.01)  # or the first reply is at its end before
    host.engine.step()
    assert len(scheduler.running) == (1 if state == "waiting" else 0)
    assert scheduler.waiting_count == 0
    with late.makefile("rb") as answer:
        told = answer.read()  # to its end, which comes by itself
    last = json.loads([line for line in told.splitlines() if line.startswith(b"{")][-1])
    assert last["error"]["code"] == DeadlineExceeded.code
    assert last["error"]["status"] == 504
    assert ("after 0 tokens" in last["error"]["message"]) == (state == "waiting")
