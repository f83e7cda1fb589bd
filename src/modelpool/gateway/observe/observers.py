"""Everything that observes requests in one gateway process, and what it is asked."""

from __future__ import annotations

import asyncio
import time
from time import monotonic

from modelpool.errors import PoolError, RequestNotKnown
from modelpool.gateway.instances import Instances
from modelpool.gateway.listener import Listener
from modelpool.gateway.observe.explain import explain, seconds
from modelpool.gateway.observe.exposition import expose
from modelpool.gateway.observe.ids import RequestIds
from modelpool.gateway.observe.journey import Journey, Journeys
from modelpool.gateway.observe.metrics import Metrics
from modelpool.gateway.observe.recent import RECORDS, Recent
from modelpool.gateway.request import Request
from modelpool.gateway.shared import Node
from modelpool.gateway.snapshots import SnapshotFeed
from modelpool.gateway.table import Table
from modelpool.messages.explain import Explanation

SAY_S = 1.0
"""How often a process says what others cannot see of it."""


class Observers:
    """Request ids, metrics and journeys. `metrics_open`: anybody may read the metrics."""

    def __init__(self, node: Node, table: Table, instances: Instances, *, metrics_open: bool = False) -> None:
        self._node = node
        self._instances = instances
        self.metrics_open = metrics_open
        self.ids = RequestIds()
        self.metrics = Metrics(node, table.has)
        self._recent = Recent(node)
        self.journeys = Journeys((self.metrics, self._recent), instances.suspects)

    def begin(self, request: Request) -> Journey:
        """The journey of a request for a model, which ends it."""
        caller = request.caller.name if request.caller is not None else ""
        return self.journeys.begin(request.id, request.path, len(request.body), caller)

    def refused(self, request: Request | None, error: PoolError) -> bytes:
        """Counted, and named: the header lines for the answer."""
        self.metrics.refused(error)
        if request is None:
            return self.ids.line()
        if not request.id:
            self.ids.give(request)
        return request.added

    def explain(self, id_: bytes) -> Explanation:
        """Of any gateway process of this node. Raises RequestNotKnown."""
        self._node.reap()
        found, now = self._recent.find(id_), monotonic()
        if found is None:
            raise _not_known(id_, self._recent.since(), now)
        record, slot = found
        alive = self.metrics.serves_since(slot) <= record.accepted
        return explain(record, slot=slot, alive=alive, now=now, wall=time.time())

    async def expose(self, accept: str) -> tuple[str, bytes]:
        """The content type that suits `accept`, and the metrics of all gateways of this node."""
        self._node.reap()
        return await asyncio.to_thread(expose, self.metrics, accept)

    async def keep_saying(self, feed: SnapshotFeed, listener: Listener) -> None:
        """Until cancelled."""
        while True:
            breakers = self._instances.breakers(monotonic())
            self.metrics.say(heard_at=feed.heard_at, connections=listener.connections, breakers=breakers)
            await asyncio.sleep(SAY_S)


def _not_known(id_: bytes, since: float | None, now: float) -> RequestNotKnown:
    shown = id_.decode("utf-8", "replace")
    kept = "none was served yet" if since is None else f"now back to {seconds(now - since)} ago"
    return RequestNotKnown(
        f"No recent request has the id `{shown[:128]}`. The gateway processes of this machine keep the last {RECORDS} "
        f"requests each, {kept}."
    )
