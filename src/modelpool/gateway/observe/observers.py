"""Everything that observes requests in one gateway process, and what it is asked."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from modelpool.errors import PoolError, RequestNotKnown
from modelpool.gateway.instances import Instances
from modelpool.gateway.listener import Listener
from modelpool.gateway.observe.access_log import AccessLog
from modelpool.gateway.observe.access_log import line_of as access_line
from modelpool.gateway.observe.explain import explain, seconds
from modelpool.gateway.observe.exposition import expose
from modelpool.gateway.observe.ids import RequestIds
from modelpool.gateway.observe.journey import Journey, Journeys, Record
from modelpool.gateway.observe.log_file import log_file
from modelpool.gateway.observe.metrics import Metrics
from modelpool.gateway.observe.recent import RECORDS, Recent
from modelpool.gateway.observe.request_log import RequestLog
from modelpool.gateway.observe.request_log import line_of as request_line
from modelpool.gateway.request import Request
from modelpool.gateway.shared import Node
from modelpool.gateway.snapshots import SnapshotFeed
from modelpool.gateway.table import Table
from modelpool.messages.explain import Explanation
from modelpool.messages.requests import Finished, FinishedRequests
from modelpool.process import StartupError
from modelpool.settings import GatewaySettings

if TYPE_CHECKING:  # traces cost a quarter of a second of imports
    from modelpool.gateway.observe.tracing import Tracing

_WRITTEN_S = 0.01
"""What ended this long ago is in the shared memory, whichever process it is of."""
_TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
SAY_S = 1.0
"""How often a process says what others cannot see of it."""


class AskedFor(NamedTuple):
    """What observes only where it is asked for."""

    tracing: Tracing | None = None
    access_log: AccessLog | None = None
    request_log: RequestLog | None = None


class Observers:
    """Use `observing`. `metrics_open`: anybody may read the metrics."""

    def __init__(
        self, node: Node, table: Table, instances: Instances, asked_for: AskedFor, *, metrics_open: bool
    ) -> None:
        self._node = node
        self._instances = instances
        self.metrics_open = metrics_open
        self.ids = RequestIds()
        self.metrics = Metrics(node, table.has)
        self._recent = Recent(node)
        self._tracing, self._access_log, self._request_log = asked_for
        more = [each for each in (asked_for.tracing, asked_for.access_log) if each is not None]
        self.journeys = Journeys((self.metrics, self._recent, *more), instances.suspects)

    def begin(self, request: Request) -> Journey:
        """The journey of a request for a model, which ends it."""
        caller = request.caller.name if request.caller is not None else ""
        journey = self.journeys.begin(request.id, request.path, len(request.body), caller)
        if self._tracing is not None:
            self._tracing.begin(journey, request)
        if self._request_log is not None:
            self._request_log.put(request)
        return journey

    def refused(self, request: Request | None, error: PoolError) -> bytes:
        """Counted, and named: the header lines for the answer."""
        self.metrics.refused(error)
        if request is None:
            return self.ids.line()
        if not request.id:
            self.ids.give(request)
        if self._access_log is not None:
            now = monotonic()
            self._access_log.put(
                Record(request.id, request.path, now, 0, status=error.status, code=error.code, ended=now)
            )
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

    async def finished(self, after: float) -> FinishedRequests:
        """What all gateways of this node still know of requests for models that ended after this moment."""
        until = monotonic() - _WRITTEN_S
        records = await asyncio.to_thread(self._recent.ended_within, after, until)
        requests = tuple(_finished(each) for each in records if each.alias)
        return FinishedRequests(until=until, complete_since=self._recent.complete_since(), requests=requests)

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


@asynccontextmanager
async def observing(
    node: Node, table: Table, instances: Instances, settings: GatewaySettings, logs: Path
) -> AsyncIterator[Observers]:
    """Left, what was observed is written and exported. `logs`: the folder for those that are asked for.

    Raises StartupError where traces are asked for and OpenTelemetry is not installed.
    """
    async with AsyncExitStack() as stack:
        tracing = access_log = request_log = None
        if settings.otlp_endpoint or os.environ.get(_TRACES_ENDPOINT):
            tracing = _tracing(settings.otlp_endpoint, node.slot)
            stack.push_async_callback(asyncio.to_thread, tracing.close)
        if sample := settings.access_log_sample:
            line = partial(access_line, slot=node.slot)
            access_log = AccessLog(await stack.enter_async_context(log_file(logs / "access.log", line)), sample)
        if sample := settings.request_log_sample:
            asked_line = partial(request_line, content=settings.request_log_content)
            request_log = RequestLog(
                await stack.enter_async_context(log_file(logs / "requests.log", asked_line)), sample
            )
        asked_for = AskedFor(tracing, access_log, request_log)
        yield Observers(node, table, instances, asked_for, metrics_open=settings.metrics_open)


def _tracing(endpoint: str, slot: int) -> Tracing:
    try:
        from modelpool.gateway.observe.tracing import Tracing, otlp
    except ImportError as error:
        raise StartupError(
            f"Traces are asked for, and OpenTelemetry is not installed: {error}.",
            "pip install 'modelpool[otel]', or unset OTEL_EXPORTER_OTLP_ENDPOINT.",
        ) from error
    # With the variable for traces alone, the SDK goes there.
    return Tracing(otlp("" if os.environ.get(_TRACES_ENDPOINT) else endpoint), slot=slot)


def _finished(record: Record) -> Finished:
    sent = record.sent
    return Finished(
        model=record.alias,
        accepted=record.accepted,
        ended=record.ended,
        status=record.status,
        wait_s=round(record.waited, 6),
        first_byte_s=round(record.first_byte - sent, 6) if sent and record.first_byte else None,
        service_s=round(record.ended - sent, 6) if sent else None,
    )


def _not_known(id_: bytes, since: float | None, now: float) -> RequestNotKnown:
    shown = id_.decode("utf-8", "replace")
    kept = "none was served yet" if since is None else f"now back to {seconds(now - since)} ago"
    return RequestNotKnown(
        f"No recent request has the id `{shown[:128]}`. The gateway processes of this machine keep the last {RECORDS} "
        f"requests each, {kept}."
    )
