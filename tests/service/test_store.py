from __future__ import annotations

import contextvars
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, func, insert, inspect, select, text, update
from sqlalchemy.exc import IntegrityError

from repertory.errors import Conflict, InvalidInput, Unavailable
from repertory.service import store as store_module
from repertory.service.store import (
    Store,
    _migrations,
    ensure_organisation,
    known_schemas,
    now,
    organisations,
    tables,
)


def test_migrations_make_the_tables_that_the_code_speaks_of(store: Store) -> None:
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables) == []


def test_migrating_again_changes_nothing(store: Store) -> None:
    with store.write() as connection:
        connection.execute(insert(organisations).values(org_id="a", created_at=now()))
    store.migrate()
    with store.read() as connection:
        assert connection.execute(select(organisations.c.org_id)).scalars().all() == ["a"]


@pytest.mark.fault("F34")
def test_a_newer_schema_is_refused(store: Store) -> None:
    with store.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from the future'"))
    with pytest.raises(Conflict) as refused:
        store.migrate()
    assert refused.value.code == "schema_too_new"


def test_a_second_service_on_the_same_file_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/repertory.db"
    first = Store(url)
    with pytest.raises(Conflict) as refused:
        Store(url)
    first.close()
    assert refused.value.code == "database_in_use"


@pytest.mark.fault("F34")
def test_two_services_that_migrate_one_postgresql_at_once_do_it_one_after_the_other(empty_postgresql: str) -> None:
    """Without the lock one of them would meet tables of the other's half-made schema."""
    stores = [Store(empty_postgresql) for _ in range(4)]
    failures: list[Exception] = []

    def migrate(store: Store) -> None:
        try:
            store.migrate()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=migrate, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    schemas = {store.schema() for store in stores}
    for store in stores:
        store.close()
    assert (failures, schemas) == ([], {known_schemas()[0]})


@pytest.mark.fault("F34")
def test_a_migration_that_fails_leaves_the_schema_as_it_was(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both databases take back what a transaction has done to tables too."""
    store = Store(database_url)
    store.migrate()
    _downgrade(store, "0001")
    upgrade = store_module.command.upgrade

    def cut_off(*about: Any) -> None:
        upgrade(*about)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store_module.command, "upgrade", cut_off)
        with pytest.raises(KeyboardInterrupt):
            store.migrate()
    assert store.schema() == "0001"
    store.migrate()
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables) == []
    store.close()


def test_schemas_go_up_and_down_and_up_again(database_url: str) -> None:
    store = Store(database_url)
    store.migrate()
    _downgrade(store, "base")
    with store.read() as connection:
        assert set(inspect(connection).get_table_names()) <= {"alembic_version"}
    store.migrate()
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables) == []
    store.close()


def _downgrade(store: Store, revision: str) -> None:
    config = _migrations()
    with store.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


@pytest.mark.parametrize("url", ["mysql://localhost/repertory", "repertory.db", ""])
def test_an_address_of_another_database_or_of_none_is_refused_with_the_cure(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Store(url)
    assert refused.value.code == "database_not_supported"
    assert "postgresql://" in refused.value.cure


def test_a_database_that_cannot_be_reached_is_refused_without_its_password() -> None:
    store = Store("postgresql://repertory:sesame@127.0.0.1:1/repertory")
    with pytest.raises(Unavailable) as refused:
        store.migrate()
    store.close()
    assert refused.value.code == "database_unavailable"
    assert "127.0.0.1" in refused.value.message
    assert "sesame" not in refused.value.message


def test_many_at_once_name_a_new_organisation_and_it_is_there_once(store: Store) -> None:
    def name_it() -> None:
        with store.write() as connection:
            ensure_organisation(connection, "new")

    threads = [threading.Thread(target=name_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as connection:
        assert connection.execute(select(organisations.c.org_id)).scalars().all() == ["new"]


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
        if store.is_shared:
            assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"
        else:
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
    """With a plain BEGIN one of them would fail with SQLITE_BUSY_SNAPSHOT, whatever the timeout; on PostgreSQL, without
    FOR UPDATE, some would count from the same number.
    """
    with store.write() as connection:
        connection.execute(insert(organisations).values(org_id="0", created_at=now()))

    def count_up() -> None:
        for _ in range(20):
            with store.write() as connection:
                present = int(connection.execute(select(organisations.c.org_id).with_for_update()).scalar_one())
                connection.execute(update(organisations).values(org_id=str(present + 1)))

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as connection:
        assert connection.execute(select(organisations.c.org_id)).scalar_one() == "80"


def count(connection: Connection) -> int:
    return connection.execute(select(func.count()).select_from(organisations)).scalar_one()


def test_what_is_remembered_is_read_again_after_any_write(store: Store, database_url: str) -> None:
    """Also of another process, as the command line's are; and never without one, where that can be told."""
    read = 0

    def asked(connection: Connection) -> int:
        nonlocal read
        read += 1
        return count(connection)

    assert [store.remembered("how many", asked) for _ in range(3)] == [0, 0, 0]
    assert read == (3 if store.is_shared else 1)
    another = Store(database_url, alone=False)
    for number, writer in enumerate((another, store, another), 1):
        with writer.write() as connection:
            ensure_organisation(connection, f"org{number}")
        assert store.remembered("how many", asked) == number
    another.close()


def test_a_request_looks_once_and_still_sees_what_it_writes_itself(store: Store, database_url: str) -> None:
    another = Store(database_url, alone=False)
    assert not store.remembers("how many")
    store.pin()
    if store.is_shared:  # there it looks each time
        for number in range(3):
            assert store.remembered("how many", count) == number
            assert not store.remembers("how many")
            with another.write() as connection:
                ensure_organisation(connection, f"theirs{number}")
        another.close()
        return
    assert not store.remembers("how many")
    assert store.remembered("how many", count) == 0
    assert store.remembers("how many")
    with another.write() as connection:
        ensure_organisation(connection, "theirs")
    assert store.remembered("how many", count) == 0  # it was so when the request came
    contextvars.Context().run(store.remembered, "how many", count)  # another request, which sees it
    with store.write() as connection:
        ensure_organisation(connection, "ours")
    assert not store.remembers("how many")
    assert store.remembered("how many", count) == 2
    with another.write() as connection:
        ensure_organisation(connection, "theirs, later")
    store.pin()  # the next request
    assert store.remembered("how many", count) == 3
    with store.write():
        pass  # nothing
    store.pin()
    assert store.remembered("how many", count) == 3
    assert store.remembers("how many")
    another.close()


def test_an_answer_that_a_write_overtakes_is_not_kept(store: Store, database_url: str) -> None:
    another = Store(database_url, alone=False)

    def overtaken(connection: Connection) -> int:
        found = count(connection)
        with another.write() as writing:
            ensure_organisation(writing, "org")
        return found

    assert store.remembered("how many", overtaken) == 0
    assert store.remembered("how many", count) == 1
    another.close()


def test_what_nobody_asks_again_is_forgotten(store: Store) -> None:
    for number in range(3 * store_module.MOST_REMEMBERED):
        assert store.remembered(number, lambda _, number=number: number) == number  # type: ignore[misc]
    assert len(store._memory.answers) <= store_module.MOST_REMEMBERED
