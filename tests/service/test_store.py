from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import IntegrityError

from repertory.errors import Conflict
from repertory.service.store import Store, now, organisations, tables


def test_migrations_make_the_tables_that_the_code_speaks_of(store: Store) -> None:
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables) == []


def test_migrating_again_changes_nothing(store: Store) -> None:
    with store.write() as connection:
        connection.execute(insert(organisations).values(org_id="a", created_at=now()))
    store.migrate()
    with store.read() as connection:
        assert connection.execute(select(organisations.c.org_id)).scalars().all() == ["a"]


def test_a_newer_schema_is_refused(store: Store) -> None:
    with store.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from the future'"))
    with pytest.raises(Conflict) as refused:
        store.migrate()
    assert refused.value.code == "schema_too_new"


def test_a_second_service_on_the_same_file_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(Conflict) as refused:
        Store(f"sqlite:///{tmp_path}/repertory.db")
    assert refused.value.code == "database_in_use"


def test_times_come_back_aware_and_in_utc(store: Store) -> None:
    in_kathmandu = datetime(2026, 1, 1, 12, 0, tzinfo=timezone(timedelta(hours=5, minutes=45)))
    with store.write() as connection:
        connection.execute(insert(organisations).values(org_id="a", created_at=in_kathmandu))
    with store.read() as connection:
        created_at = connection.execute(select(organisations.c.created_at)).scalar_one()
    assert created_at == in_kathmandu
    assert created_at.tzinfo == UTC


def test_commits_survive_a_power_cut(store: Store) -> None:
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL


def test_an_exception_takes_back_all_of_a_transaction(store: Store) -> None:
    def insert_twice() -> None:
        with store.write() as connection:
            for _ in range(2):
                connection.execute(insert(organisations).values(org_id="a", created_at=now()))

    with pytest.raises(IntegrityError):
        insert_twice()
    with store.read() as connection:
        assert connection.execute(select(organisations)).all() == []


def test_writers_that_read_first_wait_for_each_other(store: Store) -> None:
    """With a plain BEGIN one of them would fail with SQLITE_BUSY_SNAPSHOT, whatever the timeout."""
    with store.write() as connection:
        connection.execute(insert(organisations).values(org_id="0", created_at=now()))

    def count_up() -> None:
        for _ in range(20):
            with store.write() as connection:
                present = int(connection.execute(select(organisations.c.org_id)).scalar_one())
                connection.execute(update(organisations).values(org_id=str(present + 1)))

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as connection:
        assert connection.execute(select(organisations.c.org_id)).scalar_one() == "80"
