"""Brings a store to the tables that this version knows, by Alembic.

A new migration is a module in `versions/`, and its name goes into HEAD; a test compares what they make with tables.py.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

HEAD = "6"
"""The latest revision. Named here so that a store which has it is opened without importing Alembic (0.3 s)."""
BEFORE_ALEMBIC = {1: "1", 2: "2", 3: "3"}
"""The revision of a store that has no table of Alembic's, by the number that it has instead."""


class UnknownSchema(Exception):
    """The store was made by another version, most likely a later one. Says which schema it has."""


def migrate(connection: sa.Connection) -> None:
    """Bring the store to HEAD, within the transaction that is open. Raises UnknownSchema."""
    revision = _revision(connection)
    if revision == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        if revision and not sa.inspect(connection).has_table("alembic_version"):
            command.stamp(config, revision)
        command.upgrade(config, "head")
    except CommandError as error:
        raise UnknownSchema(revision) from error


def _revision(connection: sa.Connection) -> str:
    """The store's revision; "" if it is new."""
    if connection.dialect.name == "postgresql":
        # Of several managers that find a new database at once, one makes the tables. The number is ours alone.
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(4177530221)"))
    tables = sa.inspect(connection)
    if tables.has_table("alembic_version"):
        return str(connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() or "")
    if tables.has_table("meta"):
        number = connection.execute(sa.text("SELECT value FROM meta WHERE name = 'schema'")).scalar()
        if number not in BEFORE_ALEMBIC:
            raise UnknownSchema(str(number))
        return BEFORE_ALEMBIC[number]
    return ""
