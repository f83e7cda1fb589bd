"""Instances as this gateway sees them: where to send, and how much of ours each has in flight."""

from __future__ import annotations

from types import TracebackType

from modelpool.messages.routing import Route
from modelpool.relay import Endpoint, Pool, Pools, fixed_headers


class Instance:
    """One ACTIVE instance. A request holds a lease on it for as long as it may be using it."""

    __slots__ = ("capacity", "fixed", "inflight", "name", "pool", "prefix", "route")

    def __init__(self, route: Route, pool: Pool, token: str) -> None:
        self.route = route
        self.name = route.instance
        self.capacity = max(1, route.capacity)
        self.pool = pool
        self.prefix = route.prefix.encode()
        self.fixed = fixed_headers(pool.endpoint, token)
        self.inflight = 0

    def lease(self) -> Lease:
        return Lease(self)


class Lease:
    """Counted from `with` to its end, whichever way that is left."""

    __slots__ = ("_instance",)

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def __enter__(self) -> None:
        self._instance.inflight += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._instance.inflight -= 1


class Instances:
    """Every routed instance once, so that its count outlives a change of the snapshot that leaves it alone."""

    def __init__(self, pools: Pools, token: str) -> None:
        self._pools = pools
        self._token = token
        self._by_route: dict[Route, Instance] = {}

    @property
    def inflight(self) -> int:
        """Requests in flight to what is routed now."""
        return sum(instance.inflight for instance in self._by_route.values())

    def of(self, route: Route) -> Instance:
        instance = self._by_route.get(route)
        if instance is None:
            pool = self._pools.pool(Endpoint(route.host, route.port))
            instance = self._by_route[route] = Instance(route, pool, self._token)
        return instance

    def keep_only(self, routes: set[Route]) -> None:
        """Forget the instances that are routed no more, and close what is idle to where none is left.

        Requests that they still run go on; their leases end with them.
        """
        for route in self._by_route.keys() - routes:
            del self._by_route[route]
        self._pools.keep_only({Endpoint(route.host, route.port) for route in routes})
