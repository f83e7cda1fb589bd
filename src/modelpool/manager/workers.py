"""The workers of the pool: they register, say what they run, are asked it by a new manager, are let go, and leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from modelpool.core import events
from modelpool.errors import Conflict, InvalidBody, WorkerNotFound
from modelpool.manager import views
from modelpool.manager.parts import in_parts
from modelpool.manager.roster import Roster
from modelpool.manager.state import State, now
from modelpool.manager.store import NotHeld, Store, StoreError
from modelpool.manager.translation import worker_reported
from modelpool.manager.watches import Watches
from modelpool.manager.worker_client import WorkerClient, WorkerUnreachable
from modelpool.manager.writing import Writing
from modelpool.messages.admin import WorkerView
from modelpool.messages.workers import Heartbeat, RegisterWorker, WorkerDescription, WorkerInfo
from modelpool.worker_url import is_worker_url

log = logging.getLogger(__name__)

_NAME_HELD_S = 15.0
"""A worker that was heard within this keeps its name."""


class Workers:
    """`own` begins a task, and ends it with its owner."""

    def __init__(
        self,
        state: State,
        store: Store,
        client: WorkerClient,
        writing: Writing,
        *,
        own: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._state = state
        self._store = store
        self._client = client
        self._writing = writing
        self._own = own
        self._roster = Roster(store)
        self._watches = Watches(client, own=own, gone=self._gone)
        self._ask_until = 0.0
        self._recalled: dict[str, str] = {}
        self._last_known: dict[str, WorkerDescription] = {}

    async def recall(self, *, ask_until: float) -> frozenset[str]:
        """The names of those known from before, who are to be asked until then."""
        self._ask_until = ask_until
        self._recalled, self._last_known = await self._store.workers(), await self._store.last_known()
        for worker_id in await self._store.draining():
            self._state.apply(events.DrainBegun(worker_id))
        return frozenset(self._recalled)

    def ask(self) -> None:
        """Ask those known from before what they run. One that is silent until then is taken to be as it was."""
        for worker_id, url in self._recalled.items():
            self._own(self._ask(worker_id, url, self._last_known.get(worker_id)))

    async def _ask(self, worker_id: str, url: str, last_known: WorkerDescription | None) -> None:
        """What a worker that is known from before runs now. While it is silent it runs what it ran, as for a manager
        that was there all the time; where nothing listens any more, nothing.
        """
        facts, found = self._state.facts, last_known
        try:
            async with asyncio.timeout(max(0.0, self._ask_until - now())):
                found = await self._client.describe(url)
        except TimeoutError:
            log.info("worker %s is silent at %s", worker_id, url)
        except WorkerUnreachable as error:
            log.info("worker %s does not answer at %s: %s", worker_id, url, error)
            if error.refused:
                if worker_id in self._state.pool.draining and worker_id not in facts:
                    self._miss(WorkerInfo(worker_id=worker_id, incarnation="", url=url))
                return
        if found is None or found.info.worker_id != worker_id or not is_worker_url(found.info.url):
            return
        if worker_id not in facts:
            log.info("worker %s runs on at %s with %d instances", worker_id, url, len(found.instances))
            self._heard(found.info, found)
            self._watches.begin(found.info)

    def _miss(self, info: WorkerInfo) -> None:
        """One that was being drained has ended while no manager was there to see it. It may be back."""
        self._heard(info, WorkerDescription(info=info, devices=(), engines={}, instances=()))
        self._gone(info)

    async def reread(self) -> None:
        """Know what the store knows, and have it know who is there. Raises StoreError. Held to be writing."""
        await self._roster.catch_up({worker_id: facts.info.url for worker_id, facts in self._state.facts.items()})
        draining = set(await self._store.draining())
        for worker_id in draining ^ self._state.pool.draining.keys():
            self._state.apply((events.DrainBegun if worker_id in draining else events.DrainCancelled)(worker_id))

    def check(self, info: WorkerInfo) -> None:
        """Raises InvalidBody for what no store or URL can have, and Conflict where another live worker has this name:
        the two would take each other's place for ever.
        """
        _check_info(info)
        facts, worker = self._state.facts.get(info.worker_id), self._state.pool.workers.get(info.worker_id)
        if facts is None or worker is None or not worker.alive or facts.info.incarnation == info.incarnation:
            return
        if facts.info.url != info.url and now() - worker.last_seen < _NAME_HELD_S:
            raise Conflict(
                f"A worker named `{info.worker_id}` is alive at {facts.info.url}; give this one another name "
                "(--worker-id, WORKER_ID).",
                param="info.worker_id",
                code="worker_id_taken",
            )

    async def register(self, message: RegisterWorker) -> None:
        info = message.info
        await self._remember(info)
        known = self._state.facts.get(info.worker_id)
        if known is None or known.info.incarnation != info.incarnation or not known.is_after(message.number):
            log.info("worker %s registers at %s with %d instances", info.worker_id, info.url, len(message.instances))
            self._heard(info, message, message.number)
            self._watches.begin(info, anew=True)

    async def _remember(self, info: WorkerInfo) -> None:
        """So that the next manager waits for it. It is taken all the same while the store is out."""
        known = self._state.facts.get(info.worker_id)
        if known is not None and known.info.url == info.url:
            return
        try:
            async with self._writing.in_turn():
                await self._roster.enter(info.worker_id, info.url)
        except NotHeld:
            raise
        except StoreError as error:
            log.warning("worker %s is written down later: %s", info.worker_id, error)

    def heartbeat(self, worker_id: str, message: Heartbeat) -> None:
        """Raises WorkerNotFound."""
        facts = self._state.facts.get(worker_id)
        if facts is None or facts.info.incarnation != message.incarnation:
            raise WorkerNotFound(f"The worker `{worker_id}` is not registered with this manager.")
        if not facts.is_after(message.number):
            self._heard(facts.info, message, message.number)
            self._watches.begin(facts.info)

    def _heard(self, info: WorkerInfo, said: RegisterWorker | Heartbeat | WorkerDescription, number: int = 0) -> None:
        facts = views.WorkerFacts(
            info=info,
            devices=said.devices,
            host=said.host,
            engines=said.engines,
            reports={report.instance: report for report in said.instances},
            number=number,
        )
        self._state.news |= facts.news_since(self._state.facts.get(info.worker_id))
        self._state.facts[info.worker_id] = facts
        self._state.apply(worker_reported(info, said))

    def _gone(self, info: WorkerInfo) -> None:
        self._state.apply(events.WorkerGone(info.worker_id, info.incarnation, "its process has ended"))

    async def forget(self, worker_id: str, incarnation: str = "") -> None:
        """It has ended. Raises WorkerNotFound, also where that `incarnation` is over."""
        async with self._writing.at_last() as silent:
            facts = self._state.facts.get(worker_id)
            if facts is None:
                raise WorkerNotFound(f"The worker `{worker_id}` is not registered.")
            if incarnation not in ("", facts.info.incarnation):
                raise WorkerNotFound(f"The worker `{worker_id}` was started again since; this life of it is over.")
            await self._roster.leave(worker_id, later=silent)
        log.info("worker %s leaves", worker_id)
        self._state.apply(events.WorkerLeft(worker_id, facts.info.incarnation))
        if worker_id not in self._state.pool.workers:
            self._state.facts.pop(worker_id, None)
        self._watches.end(worker_id)

    async def drain(self, worker_id: str, *, drain: bool) -> None:
        """Let it go, or have it stay. Raises WorkerNotFound."""
        async with self._writing.in_turn():
            if worker_id not in self._state.pool.workers:
                raise WorkerNotFound(f"The worker `{worker_id}` is not registered.")
            if drain is not (worker_id in self._state.pool.draining):
                await self._roster.settle()
                await self._store.drain(worker_id, drain=drain)
                self._state.apply(events.DrainBegun(worker_id) if drain else events.DrainCancelled(worker_id))
                log.info("worker %s %s", worker_id, "is being drained" if drain else "stays")

    def view(self, worker_id: str) -> WorkerView:
        return views.worker_view(self._state.known(), self._state.pool.workers[worker_id])

    async def views(self) -> list[WorkerView]:
        workers = [worker for _, worker in sorted(self._state.pool.workers.items())]
        return await in_parts(partial(views.worker_view, self._state.known_for_long()), workers)


def _check_info(info: WorkerInfo) -> None:
    """A store may refuse what a JSON text may have in it."""
    if not is_worker_url(info.url):
        raise InvalidBody(
            f"`info.url`: must be http://, a host, and a port unless it is 80, got {info.url!r}.", param="info.url"
        )
    if not info.worker_id or not info.worker_id.isprintable():
        raise InvalidBody(f"`info.worker_id`: must be a name, got {info.worker_id!r}.", param="info.worker_id")
