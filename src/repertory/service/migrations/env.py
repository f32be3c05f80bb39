"""Run by Alembic: migrates over the connection that `Store.migrate` holds."""

from alembic import context

from repertory.service.store import tables

connection = context.config.attributes["connection"]
# Batch mode: SQLite alters a table by copying it.
context.configure(connection=connection, target_metadata=tables, render_as_batch=connection.dialect.name == "sqlite")
context.run_migrations()
