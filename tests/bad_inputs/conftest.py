"""One service with the fake host for all rows that the service alone answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from running_service import RunningService


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("service"), MAX_CONCURRENT_TRAININGS="4").until_ready()
    yield running
    running.stop()
