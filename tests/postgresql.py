"""A PostgreSQL server of the tests' own, with databases that come and go."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

from repertory.service.store import Store
from running_service import eventually

PR_SET_PDEATHSIG = 1
TEMPLATE = "migrated"  # the database that all others are copies of
OPTIONS = {
    "listen_addresses": "",  # its socket alone
    "fsync": "off",  # what the tests pull is the process, not the power
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "200",
}


class Postgresql:
    """Takes two seconds to make. Raises FileNotFoundError where PostgreSQL is not installed."""

    def __init__(self) -> None:
        self._programs = _programs()
        # Not below pytest's folders: only their owner may enter those, and the server refuses to be root.
        self.folder = Path(tempfile.mkdtemp(prefix="repertory-pg-"))
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user)
        self._numbers = count(1)
        made = [self._programs / "initdb", "--pgdata", self.data, "--username", "repertory", "--auth", "trust"]
        subprocess.run(
            [*made, "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"],
            user=self._user,
            cwd=self.folder,
            check=True,
            capture_output=True,
        )
        self.start()
        self._do(f"CREATE DATABASE {TEMPLATE}")
        store = Store(self.url(TEMPLATE))
        store.migrate()
        store.close()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def url(self, database: str) -> str:
        return f"postgresql://repertory@/{database}?host={self.folder}"

    def start(self) -> None:
        options = [part for name, value in OPTIONS.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self.data, "-k", self.folder, *options],
                user=self._user,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                preexec_fn=_end_with_the_tests,
            )
        eventually(self._answers)

    def stop(self) -> None:
        """At once, as when its machine fails: what it was doing is not finished, who is connected is cut off."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(30)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Stopped meanwhile, and there again for the next test whatever happens."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def new(self, template: str = TEMPLATE) -> str:
        """The address of a fresh database."""
        name = f"test_{next(self._numbers)}"
        self._do(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        name = url.partition("?")[0].rpartition("/")[2]
        self._do(f"DROP DATABASE {name} WITH (FORCE)")

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()
        try:
            psycopg.connect(self.url("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

    def _do(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[arg-type]


def installed() -> Postgresql:
    """Skips the test where there is none, unless REPERTORY_REQUIRE_POSTGRESQL says that there must be one."""
    try:
        return Postgresql()
    except FileNotFoundError:
        if os.environ.get("REPERTORY_REQUIRE_POSTGRESQL"):
            raise
        pytest.skip("PostgreSQL is not installed (Debian, Ubuntu: apt install postgresql)")


def _programs() -> Path:
    """Debian keeps them beside the path, one folder for each version."""
    newest_first = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -float(path.parent.name))
    for folder in [*newest_first, *(Path(part) for part in os.environ["PATH"].split(os.pathsep))]:
        if all((folder / program).exists() for program in ("initdb", "postgres")):
            return folder
    raise FileNotFoundError("initdb")


def _end_with_the_tests() -> None:
    """However they end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)
