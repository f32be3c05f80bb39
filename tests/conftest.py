"""The databases that tests run on: an SQLite file and a database of a PostgreSQL server, each fresh for each test.

And at the end the table of the faults that tests have played: what was played, and whether all went as promised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import faults
import postgresql
from postgresql import Postgresql
from running_service import RunningService


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Postgresql]:
    server = postgresql.installed()
    yield server
    server.remove()


@pytest.fixture
def empty_postgresql(postgresql_server: Postgresql) -> Iterator[str]:
    """The address of a database without tables."""
    url = postgresql_server.new(template="template0")
    yield url
    postgresql_server.drop(url)


@pytest.fixture
def migrated_postgresql(postgresql_server: Postgresql) -> Iterator[str]:
    url = postgresql_server.new()
    yield url
    postgresql_server.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Both databases pass the same tests."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/repertory.db"
    return str(request.getfixturevalue("migrated_postgresql"))


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., RunningService]]:
    """For tests that stop, kill or configure it."""
    started: list[RunningService] = []

    def start(**environment: str) -> RunningService:
        folder = tmp_path / f"service-{len(started)}"
        folder.mkdir()
        started.append(RunningService(folder, **environment))
        return started[-1]

    yield start
    for running in started:
        running.kill()  # quicker than a stop, and there is nothing to keep


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    report.faults = [number for mark in item.iter_markers("fault") for number in mark.args]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    played: dict[str, list[str]] = defaultdict(list)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for number in getattr(report, "faults", []):
                played[number].append(outcome)
    if not played:
        return
    described = faults.descriptions()
    terminalreporter.section("faults")
    for number in sorted(played, key=lambda number: int(number[1:])):
        outcomes = played[number]
        counted = ", ".join(f"{outcomes.count(one)} {one}" for one in dict.fromkeys(outcomes))
        result = "as promised" if set(outcomes) <= {"passed", "skipped"} and "passed" in outcomes else "NOT SHOWN"
        terminalreporter.line(f"{number:4} {result:12} {described.get(number, '')} ({counted})")
