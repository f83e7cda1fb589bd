"""Run by Alembic, with the connection and within the transaction of who migrates."""

from __future__ import annotations

from alembic import context

from modelpool.manager.tables import metadata

# SQLite takes back a CREATE TABLE as well as any other statement.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
