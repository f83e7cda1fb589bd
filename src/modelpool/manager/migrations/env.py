"""Run by Alembic: from the store with a connection of its own, or from Alembic's command line with `-x url=…`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from modelpool.manager.tables import metadata


def run(connection: sa.Connection) -> None:
    # SQLite takes back a CREATE TABLE as well as any other statement.
    context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    with sa.create_engine(context.get_x_argument(as_dictionary=True)["url"]).begin() as opened:
        run(opened)
