"""The manager of one pool: brings events and time to core/, carries out the orders that come back, tells everybody.

All state changes happen between two awaits of one event loop. What must outlive the process is in the store before a
call returns; everything else is learned again from the workers.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from msgspec.structs import replace

from modelpool import __version__
from modelpool.core import events
from modelpool.core import pool as core
from modelpool.core.changes import apply, registered
from modelpool.core.demand import Seen
from modelpool.core.epoch import cluster_of, is_foreign, is_older, number_of
from modelpool.core.reconcile import next_deadline, reconcile
from modelpool.errors import Conflict, InstanceNotFound, InvalidBody, ModelNotFound, WorkerNotFound
from modelpool.manager import views
from modelpool.manager.followers import Followers
from modelpool.manager.lease import Lease
from modelpool.manager.ordering import Orders
from modelpool.manager.parts import in_parts
from modelpool.manager.recollection import SAVE_EVERY_S, Recollection
from modelpool.manager.registered import differences, missing
from modelpool.manager.roster import Roster
from modelpool.manager.store import LEASE_S, Holder, NotHeld, Store, StoreError
from modelpool.manager.translation import key_of, model_of, worker_reported
from modelpool.manager.watches import Watches
from modelpool.manager.worker_client import OrderFailed, WorkerClient, WorkerUnreachable
from modelpool.manager.writing import Writing
from modelpool.messages.admin import ModelView, PoolStatus, WorkerView
from modelpool.messages.demand import DemandReport
from modelpool.messages.dump import Dump, Loaded, StoredModel
from modelpool.messages.keys import KeyMade, KeySpec, KeyView
from modelpool.messages.models import CHANGEABLE, ModelSpec, changed
from modelpool.messages.routing import Update
from modelpool.messages.workers import (
    Heartbeat,
    HeartbeatAnswer,
    RegisterWorker,
    WorkerDescription,
    WorkerInfo,
)

log = logging.getLogger(__name__)


_BACK_S = 1.0
"""Gateways that followed the manager before this one are back within half of it."""
_ASKED_FOR = 0.8
"""Of the time that workers known from before are waited for: then one that is silent is taken to be as it was."""
_NO_LEASE_S = 0.5
"""How often it is looked whether there is a lease again."""
_FORMER_MAX = 8
"""So many changes of a model back, what it was may still be served by instances that run."""
_EPOCH_MAX = 1 << 31
"""So many managers no cluster ever has."""
_NAME_HELD_S = 15.0
"""A worker that was heard within this keeps its name."""


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
        self.lease = Lease(store, lease_s, alone=alone, back=self._reread)
        self._run_id = run_id
        self._gateways = gateways
        self._pool = core.Pool()
        self._specs: dict[str, ModelSpec] = {}
        self._facts: dict[str, views.WorkerFacts] = {}
        self._awaited: dict[str, str] = {}
        self._last_known: dict[str, WorkerDescription] = {}
        self._ask_until = 0.0
        self._changed = asyncio.Event()
        self._acted = asyncio.Event()
        self._recovered = asyncio.Event()
        self._alone_until = 0.0
        self._recollection = Recollection(store)
        self._roster = Roster(store)
        self._writing = Writing(store)
        self._tasks: asyncio.TaskGroup | None = None
        self._owned: set[asyncio.Task[None]] = set()
        self._watches = Watches(client, own=self._own, gone=self._gone)
        # Models of which a worker has said something that only the gateways heed.
        self._news: set[str] = set()
        self._followers = Followers(store)
        self._keys = self._followers.keys
        self._orders = Orders(
            client,
            self.lease,
            known=self._known,
            apply=self._apply,
            publish=self._publish,
            forget=self.unregister_worker,
        )

    # ------------------------------------------------------------ its life

    async def recall(self, policy: core.Policy, recovery_s: float) -> None:
        """Read the store. Workers known from before are awaited, so that what they run is adopted, not doubled."""
        await self.lease.begin()
        await self._keys.recall()
        now = _now()
        self._awaited, self._last_known = await self._store.workers(), await self._store.last_known()
        self._ask_until = now + _ASKED_FOR * recovery_s
        self._pool = core.Pool(policy=policy, awaited=frozenset(self._awaited), recover_until=now + recovery_s)
        for worker_id in await self._store.draining():
            self._pool = apply(self._pool, events.DrainBegun(worker_id), now)
        self._alone_until = now + _BACK_S if self._awaited else now
        experience = await self._recollection.recall()
        known = []
        for stored in await self._store.models():
            self._specs[stored.spec.alias] = stored.spec
            model = model_of(stored)
            key, learned, resting = experience.get(model.alias, ("", {}, False))
            if key != model.key:
                learned, resting = {}, False
            known.append(events.ModelRegistered(model, learned, resting))
        self._pool = registered(self._pool, known, now)
        log.info("epoch %s: %d models, %d workers awaited", self._store.epoch, len(self._specs), len(self._awaited))

    def attach(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks

    def detach(self) -> None:
        """Cancel what is under way; the task group waits for it."""
        for task in self._owned:
            task.cancel()

    async def act(self) -> None:
        """Reconcile and publish whenever something changed or time is due, until cancelled."""
        for worker_id, url in self._awaited.items():
            self._own(self._ask(worker_id, url, self._last_known.get(worker_id)))
        while True:
            self._act_now()
            due = next_deadline(self._pool) if self.lease.valid else _now() + _NO_LEASE_S
            if self._followers.behind:
                due = _now()
            try:
                async with asyncio.timeout(None if due is None else max(0.01, due - _now())):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _act_now(self) -> None:
        now = _now()
        self._pool = apply(self._pool, events.Tick(), now)
        self._changed.clear()
        self._acted.set()
        if self.lease.valid:
            self._pool, effects = reconcile(self._pool, now)
            for effect in effects:
                self._own(self._orders.give(effect))
        self._publish()
        if self._followers.complete:
            self._recovered.set()

    async def remember(self) -> None:
        """Keep what is learned, a few times a minute at most, until cancelled."""
        while True:
            await self._acted.wait()
            self._acted.clear()
            await self.save()
            await asyncio.sleep(SAVE_EVERY_S)

    async def save(self) -> None:
        async with self._writing:
            await self._recollection.save(self._pool)
            await self._recollection.save_workers(self._facts)

    def _apply(self, event: events.Event) -> None:
        self._pool = apply(self._pool, event, _now())
        self._changed.set()

    def _own(self, coroutine: asyncio._CoroutineLike[None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        task = self._tasks.create_task(coroutine)
        self._owned.add(task)
        task.add_done_callback(self._owned.discard)
        return task

    # ------------------------------------------------------------ its store

    async def _outlive(self, epoch: str) -> None:
        """Have an epoch that is later than one that was heard of: a store from a backup knows less than who runs on.

        Raises InvalidBody for nonsense, Conflict where it is of another cluster, NotHeld where it is of a manager that
        came after this one.
        """
        if number_of(epoch) > _EPOCH_MAX:
            raise InvalidBody(f"`epoch`: no manager of this cluster ever had {epoch!r}.", param="epoch")
        if is_foreign(epoch, self._store.epoch):
            raise Conflict(
                f"What is there belongs to the cluster `{cluster_of(epoch)}`; the store of this manager is that of "
                f"`{cluster_of(self._store.epoch)}`. Give the manager its own store back (MODELPOOL_STORE_URL).",
                code="other_cluster",
            )
        async with self._writing:
            if is_older(self._store.epoch, epoch):
                before = self._store.epoch
                await self._store.go_past(number_of(epoch))
                log.warning(
                    "epoch %s was known elsewhere; this manager goes from %s to %s", epoch, before, self._store.epoch
                )
                self._followers.tell_all()

    async def _reread(self) -> None:
        """Know what the store knows, after a write of which nobody knows whether it was done. Raises StoreError."""
        async with self._writing:
            await self._roster.catch_up({worker_id: facts.info.url for worker_id, facts in self._facts.items()})
            stored = {each.spec.alias: each for each in await self._store.models()}
            draining = set(await self._store.draining())
            for worker_id in draining ^ self._pool.draining.keys():
                self._apply((events.DrainBegun if worker_id in draining else events.DrainCancelled)(worker_id))
            for alias in [alias for alias in self._specs if alias not in stored]:
                self._forget_model(alias)
            new = [each for alias, each in stored.items() if alias not in self._specs]
            self._pool = registered(self._pool, [events.ModelRegistered(model_of(each)) for each in new], _now())
            self._specs |= {each.spec.alias: each.spec for each in new}
            for alias, each in stored.items():
                if self._specs[alias] != each.spec:
                    self._take_model(each)
        await self._keys.reread()
        self._followers.tell_of_epoch()
        self._changed.set()

    def _take_model(self, stored: StoredModel) -> None:
        """What the store has of a model: it is new, or has changed."""
        model = model_of(stored)
        before = self._pool.models.get(model.alias)
        if before is None:
            self._apply(events.ModelRegistered(model))
        else:
            self._apply(events.ModelChanged(model) if before.key == model.key else events.ModelReplaced(model))
        self._specs[model.alias] = stored.spec

    def _forget_model(self, alias: str) -> None:
        del self._specs[alias]
        self._apply(events.ModelRemoved(alias))

    # ------------------------------------------------------------ models

    async def register_model(self, spec: ModelSpec, replace: bool = False) -> ModelView:
        async with self._writing.in_turn():
            known = self._specs.get(spec.alias)
            if known is not None and known != spec and not replace:
                differing = differences(known, spec)
                cure = "PATCH /admin/models/{alias} (`modelpool set`) changes that."
                if not set(differing) <= set(CHANGEABLE):
                    cure = "Replace it (`replace=true`, `modelpool register --replace`), or use another alias."
                raise Conflict(
                    f"The alias `{spec.alias}` is registered with another body (it differs in "
                    f"{', '.join(differing)}). {cure}",
                    param="alias",
                    code="alias_taken",
                )
            if known is None:
                created = int(time.time())
                await self._store.add_model(spec, created)
                self._take_model(StoredModel(spec, created))
                self._act_now()
                log.info("registered %s (%s)", spec.alias, spec.model_name or spec.engine)
            elif known != spec:
                await self._change(known, spec)
        # The gateways are told before its user is: their first request may come at once. While this manager still waits
        # for its workers it tells them nothing.
        await self._recovered.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._alone_until - _now()):
                await self._followers.came.wait()
        await self._followers.told()
        return self._view(spec.alias)

    async def change_model(self, alias: str, change: dict[str, Any]) -> ModelView:
        async with self._writing.in_turn():  # each change is one to what the one before left
            self._require(alias)
            before = self._specs[alias]
            spec = changed(before, change)
            if spec != before:
                await self._change(before, spec)
                await self._followers.told()
        return self._view(alias)

    async def _change(self, before: ModelSpec, spec: ModelSpec) -> None:
        """What instances of other keys serve stays in use until those of the new one do."""
        known, key = self._pool.models[spec.alias], key_of(spec)
        former = (known.key, *known.replaces) if key != known.key else known.replaces
        replaces = tuple(each for each in former if each != key)[:_FORMER_MAX]
        await self._store.change_model(spec, replaces)
        self._take_model(StoredModel(spec, known.created, replaces))
        self._act_now()
        log.info("changed %s: %s", spec.alias, ", ".join(differences(before, spec)))

    async def remove_model(self, alias: str) -> None:
        async with self._writing.in_turn():
            self._require(alias)
            await self._store.remove_model(alias)
            self._forget_model(alias)
            self._act_now()
            await self._followers.told()  # no request that comes after the answer is served any more
            log.info("removed %s", alias)

    async def model(self, alias: str) -> ModelView:
        return self._view(alias)

    async def models(self) -> list[ModelView]:
        return await in_parts(partial(views.model_view, self._known_for_long()), sorted(self._pool.models))

    def _require(self, alias: str) -> None:
        if alias not in self._specs:
            raise ModelNotFound(alias, difflib.get_close_matches(alias, self._specs, 3))

    def _view(self, alias: str) -> ModelView:
        self._require(alias)
        return views.model_view(self._known(), alias)

    async def logs(self, alias: str, *, tail: int, follow: bool) -> AsyncIterator[bytes]:
        key = self._instance_key(alias)
        try:
            url = self._facts[key[0]].info.url
            async with aclosing(self._client.logs(url, key[1], tail=tail, follow=follow)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (OrderFailed, WorkerUnreachable) as error:
            raise InstanceNotFound(f"The log of `{key[1]}` on {key[0]} cannot be read: {error}.") from error

    def _instance_key(self, name: str) -> core.Key:
        """The instance of that name, or the first of the model of that alias."""
        for key, instance in sorted(self._pool.instances.items()):
            if name in (key[1], instance.alias):
                return key
        self._require(name)
        view = self._view(name)
        raise InstanceNotFound(f"Nothing runs `{name}`, so there is no log of it: {view.reason}.")

    async def dump(self) -> Dump:
        models = [StoredModel(spec, self._pool.models[alias].created) for alias, spec in sorted(self._specs.items())]
        return Dump(cluster=cluster_of(self._store.epoch), models=tuple(models), keys=self._keys.stored())

    async def load(self, dump: Dump, *, restore: bool) -> Loaded:
        async with self._writing.in_turn(), self._keys.writing.in_turn():
            models = missing(self._specs, dump.models)
            keys = self._keys.missing(dump.keys)
            cluster = cluster_of(self._store.epoch)
            if restore and cluster != dump.cluster:
                if self._specs or self._keys.stored():
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
        self._apply(events.DemandHeard(report.gateway, seen))
        self._followers.hear(report)

    # ------------------------------------------------------------ workers

    async def register_worker(self, message: RegisterWorker) -> HeartbeatAnswer:
        info = message.info
        _check_info(info)
        self._check_name(info)
        await self._outlive(message.epoch)
        await self._remember(info)
        known = self._facts.get(info.worker_id)
        if known is None or known.info.incarnation != info.incarnation or not known.is_after(message.number):
            log.info("worker %s registers at %s with %d instances", info.worker_id, info.url, len(message.instances))
            self._heard(info, message, message.number)
            self._watches.begin(info, anew=True)
        return HeartbeatAnswer(gateways=self._gateways, epoch=self._store.epoch)

    async def _ask(self, worker_id: str, url: str, last_known: WorkerDescription | None) -> None:
        """What a worker that is known from before runs now. While it is silent it runs what it ran, as for a manager
        that was there all the time; where nothing listens any more, nothing.
        """
        found = last_known
        try:
            async with asyncio.timeout(max(0.0, self._ask_until - _now())):
                found = await self._client.describe(url)
        except TimeoutError:
            log.info("worker %s is silent at %s", worker_id, url)
        except WorkerUnreachable as error:
            log.info("worker %s does not answer at %s: %s", worker_id, url, error)
            if error.refused:
                if worker_id in self._pool.draining and worker_id not in self._facts:
                    self._miss(WorkerInfo(worker_id=worker_id, incarnation="", url=url))
                return
        if found is not None and found.info.worker_id == worker_id and worker_id not in self._facts:
            log.info("worker %s runs on at %s with %d instances", worker_id, url, len(found.instances))
            self._heard(found.info, found)
            self._watches.begin(found.info)

    def _miss(self, info: WorkerInfo) -> None:
        """One that was being drained has ended while no manager was there to see it. It may be back."""
        self._heard(info, WorkerDescription(info=info, devices=(), engines={}, instances=()))
        self._gone(info)

    async def _remember(self, info: WorkerInfo) -> None:
        """So that the next manager waits for it. It is taken all the same while the store is out."""
        known = self._facts.get(info.worker_id)
        if known is not None and known.info.url == info.url:
            return
        try:
            async with self._writing.in_turn():
                await self._roster.enter(info.worker_id, info.url)
        except NotHeld:
            raise
        except StoreError as error:
            log.warning("worker %s is written down later: %s", info.worker_id, error)

    def _check_name(self, info: WorkerInfo) -> None:
        """Raises Conflict where another live worker has this name: the two would take each other's place for ever."""
        facts, worker = self._facts.get(info.worker_id), self._pool.workers.get(info.worker_id)
        if facts is None or worker is None or not worker.alive or facts.info.incarnation == info.incarnation:
            return
        if facts.info.url != info.url and _now() - worker.last_seen < _NAME_HELD_S:
            raise Conflict(
                f"A worker named `{info.worker_id}` is alive at {facts.info.url}; give this one another name "
                "(--worker-id, WORKER_ID).",
                param="info.worker_id",
                code="worker_id_taken",
            )

    async def heartbeat(self, worker_id: str, message: Heartbeat) -> HeartbeatAnswer:
        facts = self._facts.get(worker_id)
        if facts is None or facts.info.incarnation != message.incarnation:
            raise WorkerNotFound(f"The worker `{worker_id}` is not registered with this manager.")
        if not facts.is_after(message.number):
            self._heard(facts.info, message, message.number)
            self._watches.begin(facts.info)
        return HeartbeatAnswer(gateways=self._gateways, epoch=self._store.epoch)

    def _heard(self, info: WorkerInfo, said: RegisterWorker | Heartbeat | WorkerDescription, number: int = 0) -> None:
        facts = views.WorkerFacts(
            info=info,
            devices=said.devices,
            host=said.host,
            engines=said.engines,
            reports={report.instance: report for report in said.instances},
            number=number,
        )
        self._news |= facts.news_since(self._facts.get(info.worker_id))
        self._facts[info.worker_id] = facts
        self._apply(worker_reported(info, said))

    def _gone(self, info: WorkerInfo) -> None:
        self._apply(events.WorkerGone(info.worker_id, info.incarnation, "its process has ended"))

    def know_gateways(self, urls: tuple[str, ...]) -> None:
        """Where workers reach the gateways: told them with the next answer to a heartbeat."""
        self._gateways = urls

    async def unregister_worker(self, worker_id: str, incarnation: str = "") -> None:
        async with self._writing:
            facts = self._facts.get(worker_id)
            if facts is None:
                raise WorkerNotFound(f"The worker `{worker_id}` is not registered.")
            if incarnation not in ("", facts.info.incarnation):
                raise WorkerNotFound(f"The worker `{worker_id}` was started again since; this life of it is over.")
            await self._roster.leave(worker_id)
        log.info("worker %s leaves", worker_id)
        self._apply(events.WorkerLeft(worker_id, facts.info.incarnation))
        if worker_id not in self._pool.workers:
            self._facts.pop(worker_id, None)
        self._watches.end(worker_id)

    async def drain_worker(self, worker_id: str) -> WorkerView:
        return await self._drain(worker_id, drain=True)

    async def keep_worker(self, worker_id: str) -> WorkerView:
        return await self._drain(worker_id, drain=False)

    async def _drain(self, worker_id: str, *, drain: bool) -> WorkerView:
        async with self._writing.in_turn():
            if worker_id not in self._pool.workers:
                raise WorkerNotFound(f"The worker `{worker_id}` is not registered.")
            if drain is not (worker_id in self._pool.draining):
                await self._roster.settle()
                await self._store.drain(worker_id, drain=drain)
                self._apply(events.DrainBegun(worker_id) if drain else events.DrainCancelled(worker_id))
                self._act_now()
                log.info("worker %s %s", worker_id, "is being drained" if drain else "stays")
        return views.worker_view(self._known(), self._pool.workers[worker_id])

    async def workers(self) -> list[WorkerView]:
        workers = [worker for _, worker in sorted(self._pool.workers.items())]
        return await in_parts(partial(views.worker_view, self._known_for_long()), workers)

    # ------------------------------------------------------------ what others see

    async def status(self) -> PoolStatus:
        return PoolStatus(
            version=__version__,
            run_id=self._run_id,
            epoch=self._store.epoch,
            recovering=self._pool.recovering,
            models=tuple(await self.models()),
            workers=tuple(await self.workers()),
        )

    def _known(self) -> views.Known:
        return views.Known(pool=self._pool, specs=self._specs, facts=self._facts, now=_now())

    def _known_for_long(self) -> views.Known:
        """The same, as it is now."""
        return replace(self._known(), specs=dict(self._specs), facts=dict(self._facts))

    def _publish(self, *first: str) -> None:
        """Send the gateways what changed, of `first` before others. Nothing while recovering: what they have is better
        than half the truth.
        """
        if self._pool.recovering:
            return
        news = [*first, *self._news, *self._pool.news]
        self._news.clear()
        self._pool = replace(self._pool, news=frozenset())
        self._followers.publish(self._known(), news)

    async def snapshots(self, gateway: str = "", epoch: str = "") -> AsyncIterator[Update | None]:
        await self._outlive(epoch)
        try:
            async with aclosing(self._followers.follow(gateway)) as updates:
                async for update in updates:
                    yield update
        finally:
            if gateway and gateway not in self._followers.names:
                self._apply(events.GatewayGone(gateway))


def _now() -> float:
    return time.monotonic()


def _check_info(info: WorkerInfo) -> None:
    """A store may refuse what a JSON text may have in it."""
    parts = urlsplit(info.url)
    if parts.scheme != "http" or not parts.hostname or not info.url.isprintable():
        raise InvalidBody(f"`info.url`: must be an http:// URL with a host, got {info.url!r}.", param="info.url")
    if not info.worker_id or not info.worker_id.isprintable():
        raise InvalidBody(f"`info.worker_id`: must be a name, got {info.worker_id!r}.", param="info.worker_id")
