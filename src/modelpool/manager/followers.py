"""The gateways that follow this manager, and what each is told: models, keys, and what the nodes of others use."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import suppress

from modelpool.core.epoch import number_of
from modelpool.manager.keys import KeyRegister
from modelpool.manager.routing_table import RoutingTable
from modelpool.manager.sharing import Sharing
from modelpool.manager.store import Store
from modelpool.manager.views import Known
from modelpool.messages.demand import DemandReport, node_of
from modelpool.messages.routing import KEEPALIVE_S, Delta, Snapshot, Update

_BACKLOG = 256
_TELL_S = 0.5
_SHARE_S = 0.05
"""So often at most the nodes are told of each other."""


class Followers:
    """Each has a queue of what it is still to be told."""

    def __init__(self, store: Store) -> None:
        self.came = asyncio.Event()
        """One has been told all that there is."""
        self.keys = KeyRegister(store, tell=self.tell)
        self._store = store
        self._epoch = store.epoch
        self._table = RoutingTable()
        self._sequence = 0
        self._sharing = Sharing()
        self._shared_at = -math.inf
        self._queues: dict[asyncio.Queue[Update], str] = {}

    @property
    def complete(self) -> bool:
        """There is a routing table of all models."""
        return self._table.complete

    @property
    def behind(self) -> bool:
        """More is to be published at once."""
        return self._table.behind

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._queues.values())

    def tell(self, update: Update, names: Collection[str] | None = None) -> None:
        """Tell all, or those of these names."""
        for queue, name in list(self._queues.items()):
            if names is not None and name not in names:
                continue
            try:
                queue.put_nowait(update)
            except asyncio.QueueFull:
                self._queues.pop(queue, None)  # it sees no more keepalives, and asks for a new snapshot

    def publish(self, known: Known, news: Collection[str]) -> None:
        """Tell what changed of the models, first of those with `news`."""
        known_before = self._table.complete
        changed, removed = self._table.refresh(known, news)
        if self._table.complete and (changed or removed or not known_before):
            self._sequence += 1
            self.tell(
                Delta(epoch=self._store.epoch, sequence=self._sequence, changed=changed, removed=removed)
                if known_before
                else self._snapshot()
            )

    def tell_of_epoch(self) -> None:
        """Tell all of it anew, where that is of another epoch than they know."""
        if self._store.epoch != self._epoch:
            self.tell_all()

    def tell_all(self) -> None:
        """Tell all of it anew."""
        self._epoch = self._store.epoch
        if self._table.complete:
            self._sequence += 1
        for update in self._whole():
            self.tell(update)

    def begin_anew(self) -> None:
        """Tell nothing of models until there is a routing table of all of them again."""
        self._table = RoutingTable()

    def hear(self, report: DemandReport) -> None:
        """What one of them uses, which the other nodes are told."""
        now = time.monotonic()
        self._sharing.hear(report, self._table.capacity_of, now)
        if now - self._shared_at >= _SHARE_S:
            self._tell_of_others()

    async def follow(self, name: str) -> AsyncGenerator[Update | None, None]:
        """All as it is now, then what is told; None where there was nothing for KEEPALIVE_S."""
        queue: asyncio.Queue[Update] = asyncio.Queue(_BACKLOG)
        self._queues[queue] = name
        self._sharing.join(name)
        self._tell_of_others()
        try:
            keys, *models = self._whole()
            for update in (keys, *_taken(queue), *models):  # what it may use, before it serves anybody
                yield update
            self.came.set()
            while queue in self._queues or not queue.empty():
                try:
                    async with asyncio.timeout(KEEPALIVE_S):
                        update = await queue.get()
                except TimeoutError:
                    yield None
                else:
                    yield update
                    queue.task_done()
        finally:
            self._queues.pop(queue, None)
            if name and name not in self.names:
                self._sharing.leave(name)
                self._tell_of_others()

    async def told(self) -> None:
        """Wait until what was told is on its way to every one; not long for one that reads nothing."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_TELL_S):
                for queue in list(self._queues):
                    await queue.join()

    def _snapshot(self) -> Snapshot:
        return Snapshot(epoch=self._store.epoch, sequence=self._sequence, models=dict(self._table.entries))

    def _whole(self) -> Iterator[Update]:
        """All that a gateway is to know."""
        yield self.keys.update()
        if self._table.complete:
            yield self._snapshot()

    def _tell_of_others(self) -> None:
        """Tell the gateways of each node what is new of the others."""
        self._shared_at = now = time.monotonic()
        base = number_of(self._store.epoch) << 32
        for node, others in self._sharing.news(self.keys.limits, self._table.capacity_of, self._store.epoch, base, now):
            self.tell(others, {name for name in self.names if node_of(name) == node})


def _taken(queue: asyncio.Queue[Update]) -> list[Update]:
    """All that is in the queue now."""
    taken = []
    while not queue.empty():
        taken.append(queue.get_nowait())
        queue.task_done()
    return taken
