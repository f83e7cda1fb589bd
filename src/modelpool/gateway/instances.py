"""Instances as this gateway sees them: where to send, and how much of ours each has in flight."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType

from modelpool.core.breaker import CLOSED
from modelpool.core.places import may_follow, places
from modelpool.core.shares import first_part
from modelpool.gateway.inflight import Row, SharedInflight
from modelpool.messages.routing import Others, Route
from modelpool.relay import Endpoint, Pool, Pools, fixed_headers

log = logging.getLogger(__name__)

BEYOND_PART = 1
"""Where there are several nodes, each may send an instance one more than its part. So nobody has to wait whose node has
no part of it yet; and the engine, where that one waits, has work at once when another ends."""


class Instance:
    """One ACTIVE instance. A request holds a lease on it for as long as it may be using it."""

    __slots__ = (
        "_row",
        "_suspects",
        "breaker",
        "capacity",
        "elsewhere",
        "fixed",
        "freed",
        "full_at",
        "gone",
        "inflight",
        "limit",
        "name",
        "own",
        "place",
        "pool",
        "prefix",
        "requests",
        "route",
    )

    def __init__(self, route: Route, pool: Pool, token: str, suspects: set[Instance], row: Row | None) -> None:
        self.name = route.instance
        self.place = route.place
        self.pool = pool
        self.prefix = route.prefix.encode()
        self.fixed = fixed_headers(pool.endpoint, token)
        self.own = 0
        """Requests of this process."""
        self.requests = 0
        """How many it ever was sent by this process."""
        self.inflight = 0
        """Requests of all gateway processes on this node, as of the last `count_all`, and `elsewhere`."""
        self.elsewhere = 0
        """Requests of other nodes, as they last said."""
        self.route_by(route)
        self.freed: Callable[[Instance], None] | None = None
        """Called when one of ours has ended, while requests wait for that."""
        self.breaker = CLOSED
        self.gone = False
        self._suspects = suspects
        self._row = row

    def route_by(self, route: Route) -> None:
        """It may have another capacity than before. Other nodes are not thought of."""
        self.route = route
        self.capacity = max(1, route.capacity)
        self.limit = self.capacity
        """So many this node may have there: of its capacity, what is not for other nodes."""
        self.full_at = self.limit + self.elsewhere
        """It takes no more of this process while that many are in flight."""

    def lease(self) -> Lease:
        return Lease(self)

    def count_all(self) -> None:
        """Look at what other processes of this node have there, and want to."""
        if (row := self._row) is not None:
            others = row.others(self.own)
            self.inflight = self.own + others.inflight + self.elsewhere
            self.full_at = self.inflight + places(self.limit, self.own, others)

    @property
    def places(self) -> int:
        """So many more this process may send there now."""
        if self._row is None:
            return max(0, self.limit - self.own)
        return places(self.limit, self.own, self._row.others(self.own))

    @property
    def may_be_followed(self) -> bool:
        """Whether one of ours that has just ended may be followed by one of ours at once, as far as others wait."""
        return self._row is None or may_follow(self.limit, self.own, self._row.others(self.own))

    def hear(self, elsewhere: int, limit: int) -> None:
        """What other nodes have there, and how much this one may."""
        self.inflight += elsewhere - self.elsewhere
        self.elsewhere = elsewhere
        self.limit = limit
        self.full_at = limit + elsewhere

    def want(self, freed: Callable[[Instance], None] | None) -> None:
        """Requests of ours wait for it, which `freed` is called for; or none does any more."""
        if self._row is not None and (freed is None) != (self.freed is None):
            self._row.want(freed is not None)
        self.freed = freed

    def add(self, requests: int) -> None:
        """For a lease: one more of ours, or one less."""
        self.own += requests
        self.inflight += requests
        if self._row is not None:
            self._row.put(self.own)
            if self.gone and not self.own:
                self._row.give_back()
                self._row = None

    def leave(self) -> None:
        """It is routed no more. Its count is kept until the last lease has ended."""
        self.want(None)
        self.gone = True
        self._suspects.discard(self)
        self.add(0)

    def come_back(self, pool: Pool) -> None:
        """It is routed again, while requests of before still run there."""
        self.pool = pool
        self.gone = False
        self.breaker = CLOSED

    def trust(self) -> None:
        """Its trial begins to be answered."""
        self.breaker = self.breaker.answered()
        self._suspects.discard(self)

    def judge(self, worked: bool | None) -> None:
        """A request to it ended: it worked, or the instance failed, or that was not to be seen."""
        if worked:
            self.breaker = CLOSED
            self._suspects.discard(self)
        elif worked is None:
            self.breaker = self.breaker.gave_up()
        else:
            self.breaker = breaker = self.breaker.failed(time.monotonic())
            if not breaker.closed and not self.gone:
                self._suspects.add(self)
                log.warning("%s failed %s times, left alone for %g s", self.name, breaker.failures, breaker.pause_s)


class Lease:
    """Counted from `with` to its end, whichever way that is left."""

    __slots__ = ("_trial", "instance", "worked")

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._trial = False
        self.worked: bool | None = None
        """What the request showed of the instance when it ended; None: nothing."""

    def __enter__(self) -> Lease:
        instance = self.instance
        instance.add(1)
        instance.requests += 1
        if not instance.breaker.closed:
            self._trial = not instance.breaker.trying
            instance.breaker = instance.breaker.begun()
        return self

    def answered(self) -> None:
        """Something of the answer is there, though the request may go on for hours."""
        if not self.instance.breaker.closed:
            self._trial = False
            self.instance.trust()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        instance = self.instance
        instance.add(-1)
        if instance.breaker is CLOSED:
            if self.worked is False:
                instance.judge(False)
        elif self._trial or self.worked or instance.breaker.closed:
            instance.judge(self.worked)
        if instance.freed is not None:
            instance.freed(instance)


class Instances:
    """Every instance once for as long as it is routed or requests of ours run there, so that none is counted twice."""

    def __init__(self, pools: Pools, token: str, shared: SharedInflight | None = None) -> None:
        self._pools = pools
        self._token = token
        self._shared = shared
        self._routed: dict[tuple[str, ...], Instance] = {}
        """By its place."""
        self._leaving: dict[tuple[str, ...], Instance] = {}
        """Routed no more, with requests of ours."""
        self._others: Others | None = None
        self.suspects: set[Instance] = set()
        """Those whose breaker is not closed. Mostly empty, which is all that a request needs to know."""

    @property
    def shared(self) -> bool:
        """Whether other processes on this node send to the same instances."""
        return self._shared is not None

    @property
    def inflight(self) -> int:
        """Requests of this process in flight to what is routed now."""
        return sum(instance.own for instance in self._routed.values())

    def breakers(self, now: float) -> dict[str, int]:
        """By instance, the state of its breaker: 0 closed, 1 open, 2 half open."""
        states = {}
        for instance in self._routed.values():
            breaker = instance.breaker
            states[instance.name] = 0 if breaker.closed else 2 if breaker.trying or now >= breaker.until else 1
        return states

    def of(self, route: Route) -> Instance:
        instance = self._routed.get(route.place)
        if instance is None:
            instance = self._routed[route.place] = self._come(route)
        elif instance.route == route:
            return instance
        instance.route_by(route)
        self._tell(instance)
        return instance

    def _come(self, route: Route) -> Instance:
        pool = self._pools.pool(Endpoint(route.host, route.port))
        instance = self._leaving.pop(route.place, None)
        if instance is not None and instance.own:
            instance.come_back(pool)
            return instance
        row = self._shared.take("/".join(route.place)) if self._shared else None
        return Instance(route, pool, self._token, self.suspects, row)

    def hear(self, others: Others) -> bool:
        """What other nodes have in flight at each instance, and leave to this one; whether that is less than before."""
        self._others = others
        before = [instance.limit for instance in self._routed.values()]
        for instance in self._routed.values():
            self._tell(instance)
        return any(instance.limit < limit for instance, limit in zip(self._routed.values(), before, strict=True))

    def _tell(self, instance: Instance) -> None:
        if (others := self._others) is not None:
            limit = instance.capacity
            if others.nodes > 1:
                part = others.instances.get(instance.name, first_part(limit, others.nodes))
                limit = min(limit, part) + BEYOND_PART
            instance.hear(others.inflight.get(instance.name, 0), limit)

    def keep_only(self, routed: set[Instance]) -> None:
        """Forget the instances that are routed no more, and close what is idle to where none is left.

        Requests that they still run go on; their leases end with them.
        """
        for instance in [each for each in self._routed.values() if each not in routed]:
            del self._routed[instance.place]
            instance.leave()
            self._leaving[instance.place] = instance
        self._leaving = {place: instance for place, instance in self._leaving.items() if instance.own}
        self._pools.keep_only({instance.pool.endpoint for instance in routed})
