"""The database: its tables, and short transactions over them. SQLite; what is said in SQL is PostgreSQL's too.

Whoever reads gets a snapshot; whoever writes holds the one write lock from the first statement on, so that a
transaction never fails half-way because another one wrote in between. Nothing is awaited or computed inside one.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Dialect,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    make_url,
    select,
    text,
)

from repertory.errors import Conflict, InvalidInput

BUSY_TIMEOUT_SECONDS = 10.0  # how long a writer waits for another one


class UtcTime(TypeDecorator[datetime]):
    """An aware time, in UTC. SQLite forgets the zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


tables = MetaData()

organisations = Table(
    "organisations",
    tables,
    Column("org_id", String(64), primary_key=True),
    Column("created_at", UtcTime, nullable=False),
    Column("last_run_at", UtcTime),  # when a job of theirs last left the queue: who ran least recently is next
    Column("promoted", String(64)),  # training_id of the version that answers as `latest`
    Column("limits", JSON, nullable=False, server_default="{}"),  # its own, where they differ from everybody's
    Column("deletion_asked_at", UtcTime),  # from then on nothing new; the row goes last
)

api_keys = Table(
    "api_keys",
    tables,
    Column("id", String(8), primary_key=True),
    Column("org_id", String(64), ForeignKey("organisations.org_id")),  # none: every organisation
    Column("name", Text, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("digest", String(64), nullable=False),  # HMAC-SHA256 of the secret part
    Column("created_at", UtcTime, nullable=False),
    Column("expires_at", UtcTime),
    Column("revoked_at", UtcTime),
    Column("last_used_at", UtcTime),
)

jobs = Table(
    "jobs",
    tables,
    Column("id", String(64), primary_key=True),
    Column("org_id", String(64), ForeignKey("organisations.org_id"), nullable=False),
    Column("base_model", Text, nullable=False),
    Column("config", JSON, nullable=False),  # what was asked for, with the settings of that moment
    Column("status", String(16), nullable=False),
    Column("progress", Float, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("error", JSON(none_as_null=True)),
    Column("waiting_for", Text),  # while queued: why it does not run yet
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),  # when it first left the queue
    Column("completed_at", UtcTime),
    Column("lease_epoch", Integer, nullable=False),  # counts the claims; a write of an older epoch changes nothing
    Column("lease_owner", String(64)),  # the service process that runs it
    Column("heartbeat", Integer, nullable=False),  # grows with every sign of life of the run
    Column("heartbeat_at", UtcTime),
    Column("attempts", Integer, nullable=False),  # lost hosts since the last progress
    Column("cancel_requested", Boolean, nullable=False),
    Column("idempotency_key", String(255)),
    Column("request_hash", String(64), nullable=False),
    UniqueConstraint("org_id", "idempotency_key"),  # what makes a repeated submit safe under concurrent retries
    Index("jobs_by_status", "status"),
)

job_events = Table(
    "job_events",
    tables,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcTime, nullable=False),
    Column("kind", String(16), nullable=False),  # the status entered, or "warning"
    Column("data", JSON, nullable=False),
)

metrics = Table(
    "metrics",
    tables,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcTime, nullable=False),
    Column("data", JSON, nullable=False),
)

model_versions = Table(
    "model_versions",
    tables,
    Column("training_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("org_id", String(64), ForeignKey("organisations.org_id"), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("revision", String(64)),
    Column("quantization", String(8), nullable=False),
    Column("dtype", String(8), nullable=False),
    Column("metadata", JSON, nullable=False),
    Index("model_versions_by_org", "org_id", "created_at"),
)

datasets = Table(
    "datasets",
    tables,
    Column("id", String(64), primary_key=True),
    Column("org_id", String(64), ForeignKey("organisations.org_id"), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("status", String(16), nullable=False),
    Column("file_name", Text, nullable=False),
    Column("file_bytes", BigInteger, nullable=False),
    Column("options", JSON, nullable=False),  # how it is read and prepared; the last that was asked for
    Column("summary", JSON(none_as_null=True)),  # once it is read
    Column("error", JSON(none_as_null=True)),
    Index("datasets_by_status", "status", "created_at"),
)


def now() -> datetime:
    return datetime.now(UTC)


def ensure_organisation(connection: Connection, org_id: str) -> None:
    present = select(organisations.c.org_id).where(organisations.c.org_id == org_id)
    if connection.execute(present).one_or_none() is None:
        connection.execute(insert(organisations).values(org_id=org_id, created_at=now()))


class Store:
    """The one door to the database. Threads may share it."""

    def __init__(self, database_url: str) -> None:
        url = make_url(database_url)
        if url.get_backend_name() != "sqlite":
            raise InvalidInput(
                f"DATABASE_URL names {url.get_backend_name()}, which is not supported yet.",
                code="database_not_supported",
                cure="Use sqlite:///path/to/file.db, or leave DATABASE_URL out.",
            )
        self._lock_file: TextIO | None = None
        if url.get_backend_name() == "sqlite" and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = _hold_alone(Path(f"{url.database}.lock"))
        # Parameters are users' texts; they do not belong into error messages, which end in logs.
        self._engine = create_engine(url, hide_parameters=True, pool_pre_ping=True, pool_size=16, max_overflow=64)
        if url.get_backend_name() == "sqlite":
            _make_sqlite_durable(self._engine)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Commits at the end, rolls back on an exception."""
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    def migrate(self) -> None:
        """Bring the schema to this version of the program. Two processes doing so at once do it one after the other.

        Raises Conflict if a newer version of the program has written the schema.
        """
        config = _migrations()
        newest, *older = known_schemas()
        with self.write() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(8300)"))
            present = MigrationContext.configure(connection).get_current_revision()
            if present == newest:
                return
            if present is not None and present not in older:
                raise Conflict(
                    f"The database has schema {present}, which this version of Repertory does not know.",
                    code="schema_too_new",
                    cure="Start the newer Repertory that wrote it, or point DATABASE_URL at another database.",
                )
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        self._engine.dispose()
        if self._lock_file is not None:
            self._lock_file.close()


def known_schemas() -> list[str]:
    """Every version of the schema that this program can read, newest first."""
    return [revision.revision for revision in ScriptDirectory.from_config(_migrations()).walk_revisions()]


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", "repertory.service:migrations")
    return config


def _hold_alone(path: Path) -> TextIO:
    """Jobs of other processes count as orphans at start, so a second service on the same SQLite file must not start.

    The lock goes with the process, however it ends.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Conflict(
            f"Another Repertory service is using the database beside {path}.",
            code="database_in_use",
            cure="Stop that service first, or give this one its own DATABASE_URL.",
        ) from None
    return file


def _make_sqlite_durable(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # sqlite3 must not begin transactions by itself, we do below
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_SECONDS * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")  # with NORMAL a power cut may take back the last commits
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # busy_timeout does not help a transaction that reads first and wants to write later; taking the write lock
        # at once does.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
