"""The databases that tests run on: an SQLite file and a database of a PostgreSQL server, each fresh for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import postgresql
from postgresql import Postgresql


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
