"""What survives the manager: models and what was learned of them, API keys, the workers that were known, the epoch."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from modelpool.errors import PoolFault
from modelpool.messages.keys import KeySpec
from modelpool.messages.models import ModelSpec

log = logging.getLogger(__name__)

_SCHEMA_VERSION = 3
_OPENED_AS_THEY_ARE = (1, 2)
"""Older schemas that lack tables only, which are made."""
_metadata = sa.MetaData()
_meta = sa.Table(
    "meta",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.Integer, nullable=False),
)
_models = sa.Table(
    "models",
    _metadata,
    sa.Column("alias", sa.String, primary_key=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
)
_workers = sa.Table(
    "workers",
    _metadata,
    sa.Column("worker_id", sa.String, primary_key=True),
    sa.Column("url", sa.String, nullable=False),
)
_experience = sa.Table(
    "experience",
    _metadata,
    sa.Column("alias", sa.String, primary_key=True),
    sa.Column("key", sa.String, nullable=False),
    sa.Column("resting", sa.Boolean, nullable=False),
    sa.Column("measured", sa.JSON, nullable=False),
)
_keys = sa.Table(
    "keys",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("digest", sa.String, nullable=False, unique=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("created", sa.Integer, nullable=False),
    sa.Column("revoked", sa.Integer),
)


class StoreError(PoolFault):
    """The store cannot be read or written; what was asked for was not done."""

    status = 503
    code = "store_unavailable"


class StoredModel(msgspec.Struct, frozen=True):
    spec: ModelSpec
    created: int


def _stored_model(alias: str, spec: object, created: int) -> StoredModel | None:
    """A row as a model. One that this version cannot read must not keep all others from being served."""
    try:
        return StoredModel(msgspec.convert(spec, ModelSpec), created)
    except msgspec.ValidationError as error:
        log.error("the stored model `%s` is left out: %s", alias, error)
        return None


class StoredExperience(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned of a model. `key`: of the very model; `measured`: observations by worker and by their name."""

    alias: str
    key: str
    resting: bool
    measured: dict[str, dict[str, tuple[float, ...]]]


def _stored_experience(row: sa.Row[Any]) -> StoredExperience | None:
    """A row as experience. One that cannot be read is gathered anew."""
    try:
        columns = {str(name): value for name, value in row._mapping.items()}
        return msgspec.convert(columns, StoredExperience)
    except msgspec.ValidationError as error:
        log.error("what was learned of `%s` is left out: %s", row.alias, error)
        return None


class StoredKey(msgspec.Struct, frozen=True, kw_only=True):
    """`digest`: SHA-256 of the secret, in hex. Times are in seconds since 1970."""

    id: str
    digest: str
    spec: KeySpec
    created: int
    revoked: int | None = None


def _stored_key(row: sa.Row[Any]) -> StoredKey | None:
    """A row as a key. One that this version cannot read opens nothing."""
    try:
        spec = msgspec.convert(row.spec, KeySpec)
    except msgspec.ValidationError as error:
        log.error("the stored key %s is left out: %s", row.id, error)
        return None
    return StoredKey(id=row.id, digest=row.digest, spec=spec, created=row.created, revoked=row.revoked)


class Store:
    """An open store. Every write is one transaction and is on disk when the call returns."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def next_epoch(self) -> int:
        """Count the managers that have used this store; each gets a number of its own."""
        async with _transaction(self._engine) as connection:
            row = (await connection.execute(sa.select(_meta.c.value).where(_meta.c.name == "epoch"))).first()
            epoch = (row.value if row else 0) + 1
            await connection.execute(sa.delete(_meta).where(_meta.c.name == "epoch"))
            await connection.execute(sa.insert(_meta).values(name="epoch", value=epoch))
            return cast(int, epoch)

    async def models(self) -> list[StoredModel]:
        async with _transaction(self._engine) as connection:
            rows = await connection.execute(sa.select(_models).order_by(_models.c.created, _models.c.alias))
            stored = [_stored_model(row.alias, row.spec, row.created) for row in rows]
            return [each for each in stored if each is not None]

    async def add_model(self, spec: ModelSpec, created: int) -> None:
        raw = json.loads(msgspec.json.encode(spec))
        async with _transaction(self._engine) as connection:
            await connection.execute(sa.insert(_models).values(alias=spec.alias, spec=raw, created=created))

    async def change_model(self, spec: ModelSpec) -> None:
        raw = json.loads(msgspec.json.encode(spec))
        async with _transaction(self._engine) as connection:
            await connection.execute(sa.update(_models).where(_models.c.alias == spec.alias).values(spec=raw))

    async def remove_model(self, alias: str) -> None:
        async with _transaction(self._engine) as connection:
            await connection.execute(sa.delete(_models).where(_models.c.alias == alias))
            await connection.execute(sa.delete(_experience).where(_experience.c.alias == alias))

    async def experience(self) -> list[StoredExperience]:
        async with _transaction(self._engine) as connection:
            rows = await connection.execute(sa.select(_experience))
            stored = [_stored_experience(row) for row in rows]
            return [each for each in stored if each is not None]

    async def keep_experience(self, new: Sequence[StoredExperience]) -> None:
        """In the place of what was kept of these models."""
        rows = [msgspec.to_builtins(each) for each in new]
        async with _transaction(self._engine) as connection:
            stale = sa.delete(_experience).where(_experience.c.alias == sa.bindparam("of"))
            await connection.execute(stale, [{"of": each.alias} for each in new])
            await connection.execute(sa.insert(_experience), rows)

    async def keys(self) -> list[StoredKey]:
        """All keys that were ever made."""
        async with _transaction(self._engine) as connection:
            rows = await connection.execute(sa.select(_keys))
            stored = [_stored_key(row) for row in rows]
            return [each for each in stored if each is not None]

    async def has_keys(self) -> bool:
        """Whether one was ever made, readable or not."""
        async with _transaction(self._engine) as connection:
            return (await connection.execute(sa.select(_keys.c.id).limit(1))).first() is not None

    async def add_key(self, key: StoredKey) -> None:
        raw = json.loads(msgspec.json.encode(key.spec))
        async with _transaction(self._engine) as connection:
            values = {"id": key.id, "digest": key.digest, "spec": raw, "created": key.created, "revoked": key.revoked}
            await connection.execute(sa.insert(_keys).values(**values))

    async def revoke_key(self, id: str, revoked: int) -> None:
        async with _transaction(self._engine) as connection:
            await connection.execute(sa.update(_keys).where(_keys.c.id == id).values(revoked=revoked))

    async def worker_ids(self) -> list[str]:
        async with _transaction(self._engine) as connection:
            rows = await connection.execute(sa.select(_workers.c.worker_id))
            return [row.worker_id for row in rows]

    async def remember_worker(self, worker_id: str, url: str) -> None:
        async with _transaction(self._engine) as connection:
            await connection.execute(sa.delete(_workers).where(_workers.c.worker_id == worker_id))
            await connection.execute(sa.insert(_workers).values(worker_id=worker_id, url=url))

    async def forget_worker(self, worker_id: str) -> None:
        async with _transaction(self._engine) as connection:
            await connection.execute(sa.delete(_workers).where(_workers.c.worker_id == worker_id))


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[Store]:
    """The store at a SQLAlchemy URL (`sqlite+aiosqlite:///path`), made if it is new. Raises StoreError."""
    engine = create_async_engine(url)

    @sa.event.listens_for(engine.sync_engine, "connect")
    def configure(connection: sa.engine.interfaces.DBAPIConnection, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    try:
        async with _transaction(engine) as connection:
            await connection.run_sync(_metadata.create_all)
            row = (await connection.execute(sa.select(_meta.c.value).where(_meta.c.name == "schema"))).first()
            if row is None:
                await connection.execute(sa.insert(_meta).values(name="schema", value=_SCHEMA_VERSION))
            elif row.value in _OPENED_AS_THEY_ARE:
                await connection.execute(sa.update(_meta).where(_meta.c.name == "schema").values(value=_SCHEMA_VERSION))
            elif row.value != _SCHEMA_VERSION:
                raise StoreError(f"The store is of schema {row.value}; this version knows {_SCHEMA_VERSION}.")
        yield Store(engine)
    finally:
        await engine.dispose()


@asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    try:
        async with engine.begin() as connection:
            yield connection
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise StoreError(f"The store cannot be used: {cause}.") from error
