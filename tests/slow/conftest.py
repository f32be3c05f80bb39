"""The real service with the bundled base model, in a folder of its own."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from hub_service import hub, original  # noqa: F401
from repertory_fixtures import cache, make_spec  # noqa: F401
from running_service import RunningService

README_PORT = 8300
START_SECONDS = 300.0  # it unpacks the bundled base model into an empty cache


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """On the README's port where that is free. The hub is out of its reach, whatever machine this is."""
    running = RunningService(
        tmp_path_factory.mktemp("service"),
        HOST_MODULE="repertory.model.host",
        HF_HUB_OFFLINE="1",
        PORT=str(README_PORT) if _is_free(README_PORT) else "0",
    )
    try:
        _wait_until_healthy(running)
        yield running
    finally:
        running.stop()


def _wait_until_healthy(running: RunningService) -> None:
    ends = time.monotonic() + START_SECONDS
    while (status := running.client.get("/health").json()["status"]) != "healthy":
        assert time.monotonic() < ends, f"/health still says {status}: {running.log[-2000:]}"
        time.sleep(0.5)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
