"""The database: its tables, and short transactions over them. SQLite or PostgreSQL, with the same statements.

On SQLite a writer holds the one write lock from the first statement on. On PostgreSQL writers hold the rows that they
change, so every decision is made by the statement that takes the row (`UPDATE … WHERE … RETURNING`, `FOR UPDATE`),
never by an earlier look. Nothing is awaited or computed inside a transaction.
"""

from __future__ import annotations

import fcntl
import sqlite3
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    URL,
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
    Row,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    bindparam,
    create_engine,
    event,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from repertory.errors import Conflict, InvalidInput, Unavailable

BUSY_TIMEOUT_SECONDS = 10.0  # how long a writer waits for another one
POSTGRESQL_OPTIONS = {
    "synchronous_commit": "on",  # whatever the server's default: what was answered survives a power cut
    "lock_timeout": f"{BUSY_TIMEOUT_SECONDS:.0f}s",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "60s",  # a process that was stopped must not keep others from its rows
    "timezone": "UTC",
}
# Locked, full, cut off, restarting, read-only after a failover, out of connections: what may go away by itself.
NOT_NOW: tuple[type[SQLAlchemyError], ...] = (OperationalError, InterfaceError, InternalError, PoolTimeout)
MIGRATION_LOCK = 8300  # any number that every version of this program knows
IMPORTS_LOCK = 8301
MOST_REMEMBERED = 1024  # answers; a version's has its metadata, some kilobytes

T = TypeVar("T")


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


_ENSURE_ORGANISATION = text(
    "INSERT INTO organisations (org_id, created_at) VALUES (:org_id, :created_at) ON CONFLICT DO NOTHING"
).bindparams(bindparam("created_at", type_=UtcTime))


def ensure_organisation(connection: Connection, org_id: str) -> None:
    connection.execute(_ENSURE_ORGANISATION, {"org_id": org_id, "created_at": now()})


class Store:
    """The one door to the database. Threads may share it."""

    def __init__(self, database_url: str, *, alone: bool = True) -> None:
        """Connects to nothing yet, but takes an SQLite file for this process `alone`. Raises InvalidInput, Conflict."""
        url = _url(database_url)
        self._lock_file: TextIO | None = None
        self._held: list[Connection] = []
        self._writes: _Writes | None = None
        self._memory = _Memory(0)
        self._pinned: ContextVar[_Memory | None] = ContextVar("pinned", default=None)
        if url.get_backend_name() == "sqlite":
            if url.database:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
                if alone:
                    self._lock_file = _hold_alone(Path(f"{url.database}.lock"))
                self._writes = _Writes(url.database)
            self._engine = _sqlite(url)
        else:
            self._engine = _postgresql(url)

    @property
    def is_shared(self) -> bool:
        """Whether other service processes may be using the database now."""
        return self._engine.dialect.name != "sqlite"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._engine.connect() as connection, connection.begin():
            yield connection

    def pin(self) -> None:
        """Let this task, and the threads that work for it, remember what is so now: one look for all that it asks.

        For requests, on the event loop. Threads that each look for themselves wait for each other.
        """
        self._pinned.set(self._present_memory())

    def remembered(self, question: Hashable, ask: Callable[[Connection], T]) -> T:
        """What `ask` reads: read once, and again only after something was written, by whatever process.

        For what every request wants to know. It must not be changed by who gets it. PostgreSQL cannot tell what was
        written without being asked, so there it is read each time.
        """
        memory = self._pinned_memory() or self._present_memory()
        if memory is None:
            with self.read() as connection:
                return ask(connection)
        if question not in memory.answers:
            with self.read() as connection:
                memory.answers[question] = ask(connection)
        answer: T = memory.answers[question]
        return answer

    def remembers(self, question: Hashable) -> bool:
        """Whether nothing need be read to answer it, in a task that has pinned what it remembers."""
        memory = self._pinned_memory()
        return memory is not None and question in memory.answers

    def _pinned_memory(self) -> _Memory | None:
        memory = self._pinned.get()
        return None if memory is None or memory.is_over else memory

    def _present_memory(self) -> _Memory | None:
        """None: nothing can be remembered."""
        seen = None if self._writes is None else self._writes.seen()
        if seen is None:
            return None
        if self._memory.seen != seen or self._memory.is_over or len(self._memory.answers) >= MOST_REMEMBERED:
            self._memory = _Memory(seen)
        return self._memory

    def find(self, table: Table, row_id: str, org_id: str | None) -> Row[Any] | None:
        """The row with this id, if it is this organisation's (None: anybody's)."""
        wanted = select(table).where(table.c.id == row_id)
        if org_id is not None:
            wanted = wanted.where(table.c.org_id == org_id)
        with self.read() as connection:
            return connection.execute(wanted).one_or_none()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Commits at the end, rolls back on an exception."""
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection
        pinned = self._pinned.get()
        if pinned is not None:
            pinned.is_over = True  # who has written sees it

    def migrate(self) -> None:
        """Bring the schema to this version of the program. Two processes doing so at once do it one after the other.

        Raises Conflict if a newer version of the program has written the schema, Unavailable if there is no database.
        """
        try:
            with self.write() as connection:
                _migrate(connection)
        except NOT_NOW as error:
            url = self._engine.url.render_as_string(hide_password=True)
            raise Unavailable(
                f"The database {url} cannot be used: {reason(error)}.",
                code="database_unavailable",
                cure="Start it and let this machine in, or set DATABASE_URL.",
            ) from error

    def hold(self, work: int) -> bool:
        """Whether this process, and no other on this database, does a piece of work from now until it ends.

        `work` is a number that every version of this program knows it by. PostgreSQL lets go of it with the connection,
        so after the server's restart two may do it; each step of it has to be claimed all the same.
        """
        if not self.is_shared:
            return True
        connection = self._engine.connect()
        connection.detach()  # the pool must neither reuse it nor keep it
        if connection.execute(text(f"SELECT pg_try_advisory_lock({work})")).scalar_one():
            connection.commit()
            self._held.append(connection)
            return True
        connection.close()
        return False

    def schema(self) -> str | None:
        """The schema that is there; None: none yet. Raises one of NOT_NOW if there is no database."""
        with self.read() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def scrub(self) -> None:
        """After a deletion: nothing of it is in the log of writes either. PostgreSQL frees it at its next vacuum."""
        if self._engine.dialect.name == "sqlite":
            with self._engine.connect() as connection:
                connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(
                    "PRAGMA wal_checkpoint(TRUNCATE)"
                )

    def close(self) -> None:
        for connection in self._held:
            connection.close()
        if self._writes is not None:
            self._writes.close()
        self._engine.dispose()
        if self._lock_file is not None:
            self._lock_file.close()


@dataclass
class _Memory:
    """Answers that hold while `seen` is the last write that was seen. Threads that fill it twice do no harm."""

    seen: int
    answers: dict[Hashable, Any] = field(default_factory=dict)
    is_over: bool = False  # a task that has pinned it has written since


class _Writes:
    """The writes to an SQLite file, as a connection sees them that makes none itself.

    https://sqlite.org/pragma.html#pragma_data_version: it looks into shared memory, which takes microseconds.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def seen(self) -> int | None:
        """Another number after each commit. None: it cannot be told now."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = sqlite3.connect(
                        self._path, timeout=0, isolation_level=None, check_same_thread=False
                    )
                ((number,),) = self._connection.execute("PRAGMA data_version").fetchall()
            except sqlite3.Error:
                return None
        return int(number)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def _migrate(connection: Connection) -> None:
    config = _migrations()
    newest, *older = known_schemas()
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
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


def reason(error: SQLAlchemyError) -> str:
    """What the database has said, on one line, without the statement."""
    said = error.orig if isinstance(error, DBAPIError) else error
    return " ".join(str(said).split())


def known_schemas() -> list[str]:
    """Every version of the schema that this program can read, newest first."""
    return [revision.revision for revision in ScriptDirectory.from_config(_migrations()).walk_revisions()]


def _migrations() -> Config:
    config = Config()
    config.set_main_option("script_location", "repertory.service:migrations")
    return config


def _url(database_url: str) -> URL:
    try:
        url = make_url(database_url)
    except ArgumentError:
        raise _not_supported("is no address of a database") from None
    match url.get_backend_name():
        case "sqlite":
            return url
        case "postgresql" | "postgres":
            return url.set(drivername="postgresql+psycopg")
        case other:
            raise _not_supported(f"names {other}, which is not supported")


def _not_supported(why: str) -> InvalidInput:
    return InvalidInput(
        f"DATABASE_URL {why}.",
        code="database_not_supported",
        cure="Use sqlite:///path/to/file.db or postgresql://user:password@host/name, or leave DATABASE_URL out.",
    )


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


def _sqlite(url: URL) -> Engine:
    # Parameters are users' texts; they do not belong into error messages, which end in logs.
    engine = create_engine(url, hide_parameters=True, pool_size=16, max_overflow=64)

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # sqlite3 must not begin transactions by itself, we do below
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_SECONDS * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")  # with NORMAL a power cut may take back the last commits
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten, not only forgotten
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # busy_timeout does not help a transaction that reads first and wants to write later; taking the write lock
        # at once does.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    return create_engine(
        url,
        hide_parameters=True,
        pool_size=8,
        max_overflow=16,  # a server lets in 100 where nothing else is set, for all its clients
        pool_timeout=BUSY_TIMEOUT_SECONDS,
        pool_pre_ping=True,  # a connection that the server's restart has cut is replaced before it is used
        connect_args={
            "application_name": "repertory",
            "connect_timeout": 5,
            "tcp_user_timeout": 15_000,  # milliseconds; else a network that swallows packets holds a thread for minutes
            "options": " ".join(f"-c {name}={value}" for name, value in POSTGRESQL_OPTIONS.items()),
        },
    )
