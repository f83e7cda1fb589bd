"""The store as a file, by SQLite."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import aiosqlite
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine


def sqlite_engine(path: str, *, lock_timeout_s: float) -> AsyncEngine:
    """Each transaction has the file to itself, and is on disk when it ends."""
    engine = create_async_engine(f"sqlite+aiosqlite://{path}", connect_args={"timeout": lock_timeout_s})
    sa.event.listen(engine.sync_engine, "connect", _configure)
    sa.event.listen(engine.sync_engine, "begin", _File(Path(engine.url.database or "")).begin)
    return engine


class _File:
    """What is written to a file that was removed is lost with who has it open, and SQLite does not notice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: tuple[int, int] | None = None

    def begin(self, connection: sa.Connection) -> None:
        """Raises OSError where the path leads to another file than it did at first."""
        there = self._there()
        if there is None or there != (self._known or there):
            raise OSError(f"{self._path} was removed or replaced while it was in use")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        self._known = there

    def _there(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino


def _configure(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so, and have CREATE TABLE in them too
    connection.run_async(_write_ahead)
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


async def _write_ahead(connection: aiosqlite.Connection) -> None:
    """WAL. While another connection changes a new file's mode, SQLite says `locked` at once, whatever its timeout."""
    for pause_s in (*[0.02] * 50, None):
        try:
            await connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if pause_s is None or error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            await asyncio.sleep(pause_s)
        else:
            return
