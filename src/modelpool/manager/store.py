"""What survives the manager: models and what was learned of them, API keys, the workers that were known; and who the
manager is.

Of all managers that use a store, one holds it: the one that came last, as long as its lease lasts. Every write is one
transaction that begins by making sure of that, and is on disk when the call returns.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar, cast

import asyncpg
import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from modelpool.core.epoch import epoch_of
from modelpool.errors import PoolFault
from modelpool.manager import tables
from modelpool.manager.migrations import HEAD, UnknownSchema, migrate
from modelpool.manager.sqlite import sqlite_engine
from modelpool.messages.dump import StoredKey, StoredModel
from modelpool.messages.keys import KeySpec
from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import WorkerDescription

log = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_S = 10.0
_LOOK_S = 0.25
_CLOCK_S = 0.05
ANSWER_S = 5.0
"""A store that has not answered by then is taken to be out."""
_LATE = 0.5
"""Of that: who fails after it has waited, as for a lock."""


class StoreError(PoolFault):
    """The store cannot be read or written; what was asked for was not done, or nobody knows whether it was."""

    status = 503
    code = "store_unavailable"


class StoreInUse(StoreError):
    """Another manager holds the store, and renews its lease."""


class NotHeld(StoreError):
    """The store is not this manager's any more, which may not change anything in it."""

    code = "manager_away"


class Deposed(NotHeld):
    """Another manager has taken the store over since."""


class Rewound(NotHeld):
    """The store was put back to what it was before this manager, as from a backup. It can be taken over anew."""


def _stored_model(row: sa.Row[Any]) -> StoredModel | None:
    """A row as a model. One that this version cannot read must not keep all others from being served."""
    try:
        return StoredModel(msgspec.convert(row.spec, ModelSpec), row.created, tuple(row.replaces))
    except msgspec.ValidationError as error:
        log.error("the stored model `%s` is left out: %s", row.alias, error)
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


def _stored_key(row: sa.Row[Any]) -> StoredKey | None:
    """A row as a key. One that this version cannot read opens nothing."""
    try:
        spec = msgspec.convert(row.spec, KeySpec)
    except msgspec.ValidationError as error:
        log.error("the stored key %s is left out: %s", row.id, error)
        return None
    return StoredKey(id=row.id, digest=row.digest, spec=spec, created=row.created, revoked=row.revoked)


def _description(row: sa.Row[Any]) -> WorkerDescription | None:
    """A row as what a worker said. What cannot be read is asked for anew."""
    try:
        return msgspec.convert(row.description, WorkerDescription)
    except msgspec.ValidationError as error:
        log.warning("what worker %s said last is left out: %s", row.worker_id, error)
        return None


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A manager process. No two that live at once have the same `id`: what held the store under it has ended.

    `name` is for people: host and process. `alone`: as long as it lives a lock keeps every other manager of the store
    out, so that nothing need be written for it to be the one.
    """

    id: str
    name: str
    alone: bool = False


class _Held(msgspec.Struct, frozen=True):
    by: str
    left_s: float


class Store:
    """An open store. Reading is for anybody, writing for its holder (`take_over`)."""

    def __init__(self, engine: AsyncEngine, answer_s: float) -> None:
        self._engine = engine
        self._answer_s = answer_s
        self._cluster = ""
        self._number = 0
        self._lease_s = LEASE_S
        self._holder = ""
        self._went_to: list[int] = []
        """Epochs that this manager gave itself, of which nobody knows whether that was done."""
        self._unwritten: Holder | None = None
        """Who holds it here, where that could not be written yet."""
        self.trouble = asyncio.Event()
        """Set when a write failed: whether it was done is not known. Whoever looks into it clears it."""
        self.silences = 0
        """How often it has failed late, or not answered at all."""
        # Transactions that were given up: the driver still waits for a database that says nothing.
        self._given_up: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------ who holds it

    @property
    def epoch(self) -> str:
        """Of the manager that holds it here."""
        return epoch_of(self._cluster, self._number)

    async def take_over(self, holder: Holder, lease_s: float = LEASE_S) -> None:
        """Hold the store, as soon as whoever held it has let its lease run out. Raises StoreInUse, StoreError.

        Where it cannot be written to, who is alone holds it all the same: what it writes first says so.
        """
        self._lease_s, self._holder = lease_s, holder.id
        try:
            await self._take_over(holder)
        except StoreInUse:
            raise
        except StoreError as error:
            if not holder.alone:
                raise
            await self._within(self._take_unwritten(holder))
            log.warning("the store can be read only: %s", error)

    async def _take_over(self, holder: Holder) -> None:
        waited_for, give_up = "", 0.0
        while held := await self._within(self._take(holder)):
            now = asyncio.get_running_loop().time()
            if held.by != waited_for:
                log.info("waiting up to %.1f s for the lease of the manager %s to end", held.left_s, held.by)
                waited_for, give_up = held.by, now + held.left_s + _CLOCK_S
            elif now >= give_up:
                raise StoreInUse(f"The store is in use by the manager {held.by}, which is alive.")
            await asyncio.sleep(min(_LOOK_S, held.left_s + _CLOCK_S))

    async def _take(self, holder: Holder) -> _Held | None:
        """Who holds it; None: it is ours now."""
        row, free = tables.cluster.c, _is_free_for(holder)
        mine = {"epoch": row.epoch + 1, "holder": holder.id, "held_by": holder.name}
        taken = sa.update(tables.cluster).where(free).values(**mine, lease_until=_clock() + self._lease_s)
        async with _transaction(self._engine) as connection:
            ours = (await connection.execute(taken.returning(row.cluster, row.epoch))).first()
            if ours is not None:
                self._cluster, self._number = ours.cluster, ours.epoch
                return None
            other = (await connection.execute(sa.select(row.held_by, row.lease_until - _clock()))).one()
            return _Held(other[0], max(0.0, other[1]))

    async def _take_unwritten(self, holder: Holder) -> None:
        query = sa.select(tables.cluster.c.cluster, tables.cluster.c.epoch).where(_is_free_for(holder))
        async with _transaction(self._engine) as connection:
            known = (await connection.execute(query)).first()
        if known is None:
            raise StoreInUse("The store is in use by another manager, and cannot be written to.")
        self._cluster, self._number, self._unwritten = known.cluster, known.epoch + 1, holder

    async def renew(self) -> None:
        """Hold the store for another lease. Raises NotHeld, StoreError."""
        await self._write()

    async def go_past(self, number: int) -> None:
        """Give this manager an epoch above `number`: after a restore the store may know less than the workers do.

        Raises Deposed where it was another manager that went there.
        """
        self._went_to.append(number + 1)
        await self._write(sa.update(tables.cluster).values(epoch=number + 1))
        self._number = number + 1
        self._went_to.clear()

    async def let_go(self) -> None:
        """The next manager need not wait."""
        await self._write(sa.update(tables.cluster).values(lease_until=0.0))

    # ------------------------------------------------------------ models

    async def models(self) -> list[StoredModel]:
        rows = await self._read(sa.select(tables.models).order_by(tables.models.c.created, tables.models.c.alias))
        return [each for each in map(_stored_model, rows) if each is not None]

    async def add_model(self, spec: ModelSpec, created: int) -> None:
        await self._write((sa.insert(tables.models), [_model_row(StoredModel(spec, created))]))

    async def change_model(self, spec: ModelSpec, replaces: Sequence[str]) -> None:
        changed = sa.update(tables.models).where(tables.models.c.alias == spec.alias)
        await self._write(changed.values(spec=_raw(spec), replaces=list(replaces)))

    async def remove_model(self, alias: str) -> None:
        await self._write(
            sa.delete(tables.models).where(tables.models.c.alias == alias),
            sa.delete(tables.experience).where(tables.experience.c.alias == alias),
        )

    async def experience(self) -> list[StoredExperience]:
        rows = await self._read(sa.select(tables.experience))
        return [each for each in map(_stored_experience, rows) if each is not None]

    async def keep_experience(self, new: Sequence[StoredExperience]) -> None:
        """In the place of what was kept of these models."""
        stale = sa.delete(tables.experience).where(tables.experience.c.alias == sa.bindparam("of"))
        await self._write(
            (stale, [{"of": each.alias} for each in new]),
            (sa.insert(tables.experience), [msgspec.to_builtins(each) for each in new]),
        )

    # ------------------------------------------------------------ keys

    async def keys(self) -> list[StoredKey]:
        """All keys that were ever made."""
        rows = await self._read(sa.select(tables.keys))
        return [each for each in map(_stored_key, rows) if each is not None]

    async def has_keys(self) -> bool:
        """Whether one was ever made, readable or not."""
        return bool(await self._read(sa.select(tables.keys.c.id).limit(1)))

    async def add_key(self, key: StoredKey) -> None:
        await self._write((sa.insert(tables.keys), [_key_row(key)]))

    async def revoke_key(self, id: str, revoked: int) -> None:
        await self._write(sa.update(tables.keys).where(tables.keys.c.id == id).values(revoked=revoked))

    async def load(self, models: Sequence[StoredModel], keys: Sequence[StoredKey], cluster: str) -> None:
        """All of it, or nothing; `cluster` is the store's id from then on."""
        await self._write(
            *([(sa.insert(tables.models), [_model_row(each) for each in models])] if models else ()),
            *([(sa.insert(tables.keys), [_key_row(each) for each in keys])] if keys else ()),
            sa.update(tables.cluster).values(cluster=cluster),
        )
        self._cluster = cluster

    # ------------------------------------------------------------ workers

    async def workers(self) -> dict[str, str]:
        """Their URLs, by their names."""
        return {row.worker_id: row.url for row in await self._read(sa.select(tables.workers))}

    async def remember_worker(self, worker_id: str, url: str) -> None:
        await self._write(
            sa.delete(tables.workers).where(tables.workers.c.worker_id == worker_id),
            sa.insert(tables.workers).values(worker_id=worker_id, url=url),
        )

    async def forget_worker(self, worker_id: str) -> None:
        await self._write(
            sa.delete(tables.workers).where(tables.workers.c.worker_id == worker_id),
            sa.delete(tables.draining).where(tables.draining.c.worker_id == worker_id),
            sa.delete(tables.last_known).where(tables.last_known.c.worker_id == worker_id),
        )

    async def draining(self) -> list[str]:
        """The workers that are to go."""
        return [row.worker_id for row in await self._read(sa.select(tables.draining))]

    async def drain(self, worker_id: str, *, drain: bool) -> None:
        """The worker is to go, or to stay after all."""
        statements: list[sa.Executable] = [sa.delete(tables.draining).where(tables.draining.c.worker_id == worker_id)]
        if drain:
            statements.append(sa.insert(tables.draining).values(worker_id=worker_id))
        await self._write(*statements)

    async def last_known(self) -> dict[str, WorkerDescription]:
        """What each worker said last, and what it ran."""
        rows = await self._read(sa.select(tables.last_known))
        return {each.info.worker_id: each for each in map(_description, rows) if each is not None}

    async def keep_last_known(self, new: Sequence[WorkerDescription]) -> None:
        """In the place of what these workers said before."""
        stale = sa.delete(tables.last_known).where(tables.last_known.c.worker_id == sa.bindparam("of"))
        rows = [{"worker_id": each.info.worker_id, "description": _raw(each)} for each in new]
        await self._write((stale, [{"of": each["worker_id"]} for each in rows]), (sa.insert(tables.last_known), rows))

    # ------------------------------------------------------------ transactions

    async def _read(self, query: sa.Select[Any]) -> list[sa.Row[Any]]:
        async def read() -> list[sa.Row[Any]]:
            async with _transaction(self._engine) as connection:
                return list((await connection.execute(query)).all())

        return await self._within(read())

    async def _write(self, *statements: sa.Executable | tuple[sa.Executable, list[dict[str, Any]]]) -> None:
        """All of it or nothing, as the holder, whose lease is renewed by it. A statement may come with its rows."""

        async def write() -> None:
            async with _transaction(self._engine) as connection:
                await self._make_sure(connection)
                for each in statements:
                    statement, rows = each if isinstance(each, tuple) else (each, None)
                    await connection.execute(statement, rows)

        try:
            await self._within(write())
        except BaseException:
            self.trouble.set()
            raise
        self._unwritten = None

    async def _make_sure(self, connection: AsyncConnection) -> None:
        """This manager holds the store until the end of the transaction: the row stays locked. Raises NotHeld.

        What the store has as its epoch is known after that, also where a change of it was in doubt.
        """
        row, written, values, in_doubt = tables.cluster.c, self._number, {}, [*self._went_to]
        if (new := self._unwritten) is not None:
            written, values = self._number - 1, {"epoch": self._number, "holder": new.id, "held_by": new.name}
            in_doubt.append(self._number)
        there = [row.epoch == written, *(sa.and_(row.epoch == each, row.holder == self._holder) for each in in_doubt)]
        mine = sa.update(tables.cluster).where(sa.or_(*there))
        renewed = mine.values(**values, lease_until=_clock() + self._lease_s).returning(row.cluster, row.epoch)
        held = (await connection.execute(renewed)).first()
        if held is None:
            raise await self._why_not_held(connection, written)
        self._cluster, self._number = held

    async def _why_not_held(self, connection: AsyncConnection, written: int) -> NotHeld:
        there = (await connection.execute(sa.select(tables.cluster.c.epoch))).scalar_one()
        if there < written:
            return Rewound(f"The store is an earlier one than that of this manager: {there} is there, not {written}.")
        return Deposed(f"Another manager has taken over from this one, which had epoch {self.epoch}.")

    async def _within(self, work: Awaitable[T]) -> T:
        """Do not wait longer than `answer_s`, nor for a driver that cannot be cancelled while its server is silent."""
        task, clock = asyncio.ensure_future(work), asyncio.get_running_loop().time
        late = clock() + _LATE * self._answer_s
        try:
            await asyncio.wait({task}, timeout=self._answer_s)
        finally:
            if not task.done():
                self._given_up.add(task)
                task.add_done_callback(self._forget)
                task.cancel()
                await self._engine.dispose(close=False)
        if clock() > late and not (task.done() and task.exception() is None):
            self.silences += 1
        if not task.done():
            raise StoreError(f"The store has not answered for {self._answer_s:g} s.")
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._given_up.discard(task)
        if not task.cancelled():
            task.exception()

    async def close(self) -> None:
        if self._given_up:
            await asyncio.wait(self._given_up, timeout=1.0)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._answer_s):
                await self._engine.dispose()


def _is_free_for(holder: Holder) -> sa.ColumnElement[bool]:
    row = tables.cluster.c
    return sa.or_(row.holder == holder.id, row.lease_until <= _clock())


def _model_row(model: StoredModel) -> dict[str, Any]:
    columns = {"alias": model.spec.alias, "spec": _raw(model.spec)}
    return {**columns, "created": model.created, "replaces": list(model.replaces)}


def _key_row(key: StoredKey) -> dict[str, Any]:
    values = {"id": key.id, "digest": key.digest, "spec": _raw(key.spec)}
    return {**values, "created": key.created, "revoked": key.revoked}


def _raw(struct: msgspec.Struct) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(msgspec.json.encode(struct)))


@asynccontextmanager
async def open_store(url: str, *, answer_s: float = ANSWER_S) -> AsyncIterator[Store]:
    """The store at a URL, made if it is new, brought to this version's tables if it is old. Raises StoreError.

    `postgresql://…` as libpq has it, or `sqlite:///` and an absolute path.
    """
    engine = _engine(url, answer_s)
    store = Store(engine, answer_s)

    async def prepare() -> None:
        async with _transaction(engine) as connection:
            await connection.run_sync(migrate)

    try:
        try:
            await prepare()
        except UnknownSchema as error:
            raise StoreError(f"The store is of schema {error}; this version knows {HEAD}.") from error
        yield store
    finally:
        await store.close()


async def reach_store(url: str, *, answer_s: float = ANSWER_S) -> None:
    """Raises StoreError where nobody answers at a URL as `open_store` has it. What is there is left as it is."""
    engine = _engine(url, answer_s)
    try:
        async with _transaction(engine) as connection:
            await connection.execute(sa.select(1))
    finally:
        await engine.dispose()


def _engine(url: str, answer_s: float) -> AsyncEngine:
    """Raises StoreError for a URL of another kind."""
    scheme, _, rest = url.partition("://")
    if scheme in ("postgresql", "postgres"):

        async def connect() -> asyncpg.Connection[asyncpg.Record]:
            # Given the URL as it is: SQLAlchemy's reading of it knows no `sslmode`, and no second host.
            return await asyncpg.connect(
                url,
                timeout=answer_s,
                server_settings={
                    "application_name": "modelpool manager",
                    "lock_timeout": f"{answer_s * 800:.0f}",
                    # What a manager that was stopped in the middle holds is not held for ever.
                    "idle_in_transaction_session_timeout": f"{answer_s * 1000:.0f}",
                },
            )

        return create_async_engine("postgresql+asyncpg://", async_creator=connect, pool_pre_ping=True)
    if scheme == "sqlite" and rest.startswith("/"):
        return sqlite_engine(rest, lock_timeout_s=0.8 * answer_s)
    raise StoreError(f"The store's address begins with `{scheme}`; it must be postgresql:// or sqlite:/// and a path.")


@asynccontextmanager
async def _transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    try:
        async with engine.begin() as connection:
            yield connection
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        raise StoreError(f"The store cannot be used: {str(cause) or type(cause).__name__}.") from error


class _clock(FunctionElement[float]):
    """Seconds since 1970, by the database's clock."""

    inherit_cache = True
    type = sa.Float(53)


@compiles(_clock, "sqlite")
def _clock_of_sqlite(*_: object, **__: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(_clock, "postgresql")
def _clock_of_postgresql(*_: object, **__: object) -> str:
    return "extract(epoch from clock_timestamp())::float8"
