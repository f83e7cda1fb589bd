"""The manager of one pool: brings events and time to core/, carries out the orders that come back, tells everybody.

All state changes happen between two awaits of one event loop. What must outlive the process is in the store before a
call returns; everything else is learned again from the workers.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

from msgspec.structs import replace

from modelpool import __version__
from modelpool.core import events
from modelpool.core import pool as core
from modelpool.core.demand import Seen
from modelpool.core.epoch import cluster_of, is_foreign, is_older, number_of
from modelpool.core.reconcile import next_deadline, reconcile
from modelpool.errors import Conflict, InstanceNotFound, InvalidBody
from modelpool.manager.followers import Followers
from modelpool.manager.lease import Lease
from modelpool.manager.models import Models
from modelpool.manager.ordering import Orders
from modelpool.manager.recollection import SAVE_EVERY_S, Recollection
from modelpool.manager.registered import missing
from modelpool.manager.state import State, now
from modelpool.manager.store import LEASE_S, Holder, NotHeld, Store, StoreError
from modelpool.manager.worker_client import OrderFailed, WorkerClient, WorkerUnreachable
from modelpool.manager.workers import Workers
from modelpool.manager.writing import Silent, Writing
from modelpool.messages.admin import ModelView, PoolStatus, WorkerView
from modelpool.messages.demand import DemandReport
from modelpool.messages.dump import Dump, Loaded, StoredModel
from modelpool.messages.keys import KeyMade, KeySpec, KeyView
from modelpool.messages.models import ModelSpec
from modelpool.messages.routing import Update
from modelpool.messages.workers import Heartbeat, HeartbeatAnswer, RegisterWorker

log = logging.getLogger(__name__)


_BACK_S = 1.0
"""Gateways that followed the manager before this one are back within half of it."""
_ASKED_FOR = 0.8
"""Of the time that workers known from before are waited for: then one that is silent is taken to be as it was."""
_NO_LEASE_S = 0.5
"""How often it is looked whether there is a lease again."""
_EPOCH_MAX = 1 << 31
"""So many managers no cluster ever has."""
_REFUSED_BACK_S = 3.0
"""Workers that were refused, being of another cluster, have asked again within this."""


@asynccontextmanager
async def running_manager(
    store: Store,
    *,
    policy: core.Policy,
    token: str,
    run_id: str,
    recovery_s: float,
    gateways: tuple[str, ...] = (),
    holder: Holder | None = None,
    lease_s: float = LEASE_S,
) -> AsyncIterator[Manager]:
    """A manager that holds the store, knows what it knows, and acts. On the way out its tasks have ended; instances
    run on. Raises NotHeld when another manager takes over, or the store is put back to what it was before this one.
    """
    holder = holder or Holder(id=secrets.token_hex(8), name=f"process {os.getpid()}")
    await store.take_over(holder, lease_s)
    client = WorkerClient(token, epoch=lambda: store.epoch)
    manager = Manager(store, client, lease_s=lease_s, alone=holder.alone, run_id=run_id, gateways=gateways)
    try:
        await manager.recall(policy, recovery_s)
        async with asyncio.TaskGroup() as tasks:
            manager.attach(tasks)
            own = [manager.act(), manager.remember(), manager.lease.keep()]
            working = [tasks.create_task(each) for each in own]
            try:
                yield manager
            finally:
                for task in working:
                    task.cancel()
                manager.detach()
            await manager.save()
    except BaseExceptionGroup as group:
        if lost := group.subgroup(NotHeld):
            raise lost.exceptions[0] from None
        raise
    finally:
        await client.aclose()
        with suppress(StoreError):
            await store.let_go()


class Manager:
    """The embedded implementation of ManagerPort. Use `running_manager`."""

    def __init__(
        self,
        store: Store,
        client: WorkerClient,
        *,
        lease_s: float,
        alone: bool,
        run_id: str,
        gateways: tuple[str, ...],
    ) -> None:
        self._store = store
        self._client = client
        self._run_id = run_id
        self._gateways = gateways
        self._cluster = cluster_of(store.epoch)
        self._tasks: asyncio.TaskGroup | None = None
        self._owned: set[asyncio.Task[None]] = set()
        self._acted = asyncio.Event()
        self._recovered = asyncio.Event()
        self._alone_until = 0.0
        self._state = State()
        self._writing = Writing(store)
        self._recollection = Recollection(store)
        self.lease = Lease(store, lease_s, alone=alone, back=self._reread)
        self._followers = Followers(store)
        self._keys = self._followers.keys
        self._models = Models(self._state, store, self._writing)
        self._workers = Workers(self._state, store, client, self._writing, own=self._own)
        self._orders = Orders(client, self.lease, self._state, publish=self._publish, forget=self._workers.forget)

    # ------------------------------------------------------------ its life

    async def recall(self, policy: core.Policy, recovery_s: float) -> None:
        """Read the store. Workers known from before are awaited, so that what they run is adopted, not doubled."""
        await self.lease.begin()
        began = now()
        self._state.pool = core.Pool(policy=policy)
        awaited = await self._workers.recall(ask_until=began + _ASKED_FOR * recovery_s)
        self._state.pool = replace(self._state.pool, awaited=awaited, recover_until=began + recovery_s)
        await self._keys.recall()
        await self._models.recall(self._recollection)
        self._alone_until = began + _BACK_S if awaited else began
        models = len(self._state.specs)
        log.info("epoch %s: %d models, %d workers awaited", self._store.epoch, models, len(awaited))

    def attach(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks

    def detach(self) -> None:
        """Cancel what is under way; the task group waits for it."""
        for task in self._owned:
            task.cancel()

    async def act(self) -> None:
        """Reconcile and publish whenever something changed or time is due, until cancelled."""
        self._workers.ask()
        while True:
            self._act_now()
            due = next_deadline(self._state.pool) if self.lease.valid else now() + _NO_LEASE_S
            if self._followers.behind:
                due = now()
            try:
                async with asyncio.timeout(None if due is None else max(0.01, due - now())):
                    await self._state.changed.wait()
            except TimeoutError:
                pass

    def _act_now(self) -> None:
        self._state.apply(events.Tick())
        self._state.changed.clear()
        self._acted.set()
        if self.lease.valid:
            self._state.pool, effects = reconcile(self._state.pool, now())
            for effect in effects:
                self._own(self._orders.give(effect))
        self._publish()
        if self._followers.complete:
            self._recovered.set()

    def _publish(self, *first: str) -> None:
        """Send the gateways what changed, of `first` before others. Nothing while recovering: what they have is better
        than half the truth.
        """
        if not self._state.pool.recovering:
            self._followers.publish(self._state.known(), [*first, *self._state.take_news()])

    async def remember(self) -> None:
        """Keep what is learned, a few times a minute at most, until cancelled."""
        while True:
            await self._acted.wait()
            self._acted.clear()
            await self.save()
            await asyncio.sleep(SAVE_EVERY_S)

    async def save(self) -> None:
        async with self._writing.at_last() as silent:
            if not silent:
                await self._recollection.save(self._state.pool)
        async with self._writing.at_last() as silent:
            if not silent:
                await self._recollection.save_workers(self._state.facts)

    def _own(self, coroutine: asyncio._CoroutineLike[None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        task = self._tasks.create_task(coroutine)
        self._owned.add(task)
        task.add_done_callback(self._owned.discard)
        return task

    # ------------------------------------------------------------ its store

    def _check_epoch(self, epoch: str) -> None:
        """Raises InvalidBody for nonsense, Conflict where it is of another cluster."""
        if number_of(epoch) > _EPOCH_MAX:
            raise InvalidBody(f"`epoch`: no manager of this cluster ever had {epoch!r}.", param="epoch")
        if is_foreign(epoch, self._cluster):
            raise Conflict(
                f"What is there belongs to the cluster `{cluster_of(epoch)}`; the store of this manager is that of "
                f"`{self._cluster}`. Give the manager its own store back (MODELPOOL_STORE_URL).",
                code="other_cluster",
            )

    async def _outlive(self, epoch: str) -> None:
        """Have an epoch that is later than one that was heard of: a store from a backup knows less than who runs on.

        In turn with all changes. Raises NotHeld where it is of a manager that came after this one, StoreError.
        """
        async with self._writing.at_last() as silent:
            if is_older(self._store.epoch, epoch):
                if silent:
                    raise Silent
                before = self._store.epoch
                await self._store.go_past(number_of(epoch))
                log.warning(
                    "epoch %s was known elsewhere; this manager goes from %s to %s", epoch, before, self._store.epoch
                )
                self._followers.tell_all()

    async def _reread(self) -> None:
        """Know what the store knows, after a write of which nobody knows whether it was done. Raises StoreError.

        Where that is another pool, its workers and gateways are refused until it is known, as they were before.
        """
        if cluster_of(self._store.epoch) != self._cluster:
            self._begin_anew()
        async with self._writing.in_turn():
            await self._workers.reread()
            await self._models.reread()
        await self._keys.reread()
        if cluster_of(self._store.epoch) != self._cluster:
            self._cluster = cluster_of(self._store.epoch)
            self._state.pool = replace(self._state.pool, recover_until=now() + _REFUSED_BACK_S)
        self._followers.tell_of_epoch()
        self._state.changed.set()

    def _begin_anew(self) -> None:
        """The pool is another: that whose workers this manager refused until now. They come back, and run what they
        ran; until then it knows half the truth.
        """
        self._state.pool = replace(self._state.pool, anyone_awaited=True, recover_until=math.inf)
        self._recovered.clear()
        self._followers.begin_anew()

    async def dump(self) -> Dump:
        models = self._state.pool.models
        stored = tuple(StoredModel(spec, models[alias].created) for alias, spec in sorted(self._state.specs.items()))
        return Dump(cluster=cluster_of(self._store.epoch), models=stored, keys=self._keys.stored())

    async def load(self, dump: Dump, *, restore: bool) -> Loaded:
        specs = self._state.specs
        async with self._writing.in_turn(), self._keys.writing.in_turn():
            models = missing(specs, dump.models)
            keys = self._keys.missing(dump.keys)
            cluster = cluster_of(self._store.epoch)
            if restore and cluster != dump.cluster:
                if specs or self._keys.stored():
                    raise Conflict(
                        "Only an empty pool can become the one that was dumped; this one has models or keys. "
                        "Leave `restore` out to add to it.",
                        code="not_empty",
                    )
                cluster = dump.cluster
            await self._store.load(models, keys, cluster)
        try:
            await self._reread()
        except StoreError:
            self._store.trouble.set()  # it is done, and known as soon as the store can be read
            raise
        self._act_now()
        self._followers.tell_all()
        await self._followers.told()
        log.info("loaded %d models and %d keys of the cluster %s", len(models), len(keys), dump.cluster)
        return Loaded(models=tuple(each.spec.alias for each in models), keys=tuple(each.id for each in keys))

    # ------------------------------------------------------------ models

    async def register_model(self, spec: ModelSpec, replace: bool = False) -> ModelView:
        await self._models.register(spec, replace=replace)
        self._act_now()
        # The gateways are told before its user is: their first request may come at once. While this manager still waits
        # for its workers it tells them nothing.
        await self._recovered.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._alone_until - now()):
                await self._followers.came.wait()
        await self._followers.told()
        return self._models.view(spec.alias)

    async def change_model(self, alias: str, change: dict[str, Any]) -> ModelView:
        await self._models.change(alias, change)
        self._act_now()
        await self._followers.told()
        return self._models.view(alias)

    async def remove_model(self, alias: str) -> None:
        await self._models.remove(alias)
        self._act_now()
        await self._followers.told()  # no request that comes after the answer is served any more

    async def model(self, alias: str) -> ModelView:
        return self._models.view(alias)

    async def models(self) -> list[ModelView]:
        return await self._models.views()

    async def logs(self, alias: str, *, tail: int, follow: bool) -> AsyncIterator[bytes]:
        worker_id, name = self._instance_key(alias)
        try:
            url = self._state.facts[worker_id].info.url
            async with aclosing(self._client.logs(url, name, tail=tail, follow=follow)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (OrderFailed, WorkerUnreachable) as error:
            raise InstanceNotFound(f"The log of `{name}` on {worker_id} cannot be read: {error}.") from error

    def _instance_key(self, name: str) -> core.Key:
        """The instance of that name, or the first of the model of that alias."""
        for key, instance in sorted(self._state.pool.instances.items()):
            if name in (key[1], instance.alias):
                return key
        view = self._models.view(name)
        raise InstanceNotFound(f"Nothing runs `{name}`, so there is no log of it: {view.reason}.")

    # ------------------------------------------------------------ keys

    async def make_key(self, spec: KeySpec) -> KeyMade:
        made = await self._keys.make(spec)
        await self._followers.told()
        return made

    async def keys(self) -> list[KeyView]:
        return self._keys.views()

    async def revoke_key(self, id: str) -> KeyView:
        view = await self._keys.revoke(id)
        await self._followers.told()
        return view

    # ------------------------------------------------------------ gateways

    async def demand(self, report: DemandReport) -> None:
        seen = {
            alias: Seen(waiting=each.waiting, queued=each.queued, inflight=each.inflight, requests=each.requests)
            for alias, each in report.models.items()
        }
        self._state.apply(events.DemandHeard(report.gateway, seen))
        self._followers.hear(report)

    async def snapshots(self, gateway: str = "", epoch: str = "") -> AsyncIterator[Update | None]:
        self._check_epoch(epoch)
        if is_older(self._store.epoch, epoch):  # others need not wait for the store
            await self._outlive(epoch)
        try:
            async with aclosing(self._followers.follow(gateway)) as updates:
                async for update in updates:
                    yield update
        finally:
            if gateway and gateway not in self._followers.names:
                self._state.apply(events.GatewayGone(gateway))

    def know_gateways(self, urls: tuple[str, ...]) -> None:
        """Where workers reach the gateways: told them with the next answer to a heartbeat."""
        self._gateways = urls

    # ------------------------------------------------------------ workers

    async def register_worker(self, message: RegisterWorker) -> HeartbeatAnswer:
        self._workers.check(message.info)
        if message.instances or not is_foreign(message.epoch, self._cluster):
            self._check_epoch(message.epoch)
        await self._outlive(message.epoch)  # and not before it is forgotten, where that has begun
        await self._workers.register(message)
        return self._answer()

    async def heartbeat(self, worker_id: str, message: Heartbeat) -> HeartbeatAnswer:
        self._workers.heartbeat(worker_id, message)
        return self._answer()

    def _answer(self) -> HeartbeatAnswer:
        return HeartbeatAnswer(gateways=self._gateways, epoch=self._store.epoch)

    async def unregister_worker(self, worker_id: str, incarnation: str = "") -> None:
        await self._workers.forget(worker_id, incarnation)

    async def drain_worker(self, worker_id: str) -> WorkerView:
        return await self._drain(worker_id, drain=True)

    async def keep_worker(self, worker_id: str) -> WorkerView:
        return await self._drain(worker_id, drain=False)

    async def _drain(self, worker_id: str, *, drain: bool) -> WorkerView:
        await self._workers.drain(worker_id, drain=drain)
        self._act_now()
        return self._workers.view(worker_id)

    async def workers(self) -> list[WorkerView]:
        return await self._workers.views()

    async def status(self) -> PoolStatus:
        return PoolStatus(
            version=__version__,
            run_id=self._run_id,
            epoch=self._store.epoch,
            recovering=self._state.pool.recovering,
            models=tuple(await self.models()),
            workers=tuple(await self.workers()),
        )
