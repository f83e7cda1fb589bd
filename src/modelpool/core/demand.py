"""How much a model is asked for, as the gateways see it: who waits, what is in flight, how often requests come."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

RATE_OVER_S = 600.0
"""Requests a second are averaged over about this long."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway says of one model. `requests`: how many came since it said so last.

    `waiting` for the model, which is not there; `queued` for their turn at its instances: to them that is load as what
    is in flight, and nobody else has to make room for it.
    """

    waiting: int = 0
    queued: int = 0
    inflight: Mapping[str, int] = {}
    """By instance."""
    requests: int = 0


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """One model's. Times in seconds on the manager's clock. `asked_at`: when it was last asked for, or registered."""

    asked_at: float
    gateways: Mapping[str, Seen] = {}
    waiting_since: float | None = None
    rate: float = 0.0
    """Requests a second, as of `rated_at`."""
    rated_at: float = 0.0
    mean_inflight: float = 0.0
    """`total`, averaged over the last seconds, as of `rated_at`."""

    @property
    def waiting(self) -> int:
        return sum([seen.waiting for seen in self.gateways.values()])

    def inflight(self, instance: str) -> int:
        return sum([seen.inflight.get(instance, 0) for seen in self.gateways.values()])

    @property
    def total(self) -> int:
        """All that is in flight, or queued for it."""
        return sum([sum(seen.inflight.values()) + seen.queued for seen in self.gateways.values()])

    @property
    def busy(self) -> bool:
        return any(seen.waiting or seen.queued or any(seen.inflight.values()) for seen in self.gateways.values())

    def rate_at(self, now: float) -> float:
        """Requests a second; it fades while none comes."""
        return self.rate * math.exp(-max(0.0, now - self.rated_at) / RATE_OVER_S)

    def mean_at(self, now: float, over_s: float) -> float:
        """All that is in flight, averaged over about `over_s`."""
        total = self.total
        return total + (self.mean_inflight - total) * math.exp(-max(0.0, now - self.rated_at) / over_s)

    def chance(self, within_s: float, now: float) -> float:
        """Of a request within so many seconds, if they go on coming as they did lately; 1 while any is there."""
        return 1.0 if self.busy else 1.0 - math.exp(-self.rate_at(now) * within_s)


def heard(demand: Demand, gateway: str, seen: Seen, now: float, *, over_s: float = 5.0) -> Demand:
    """What a gateway says now, in the place of what it said before. What is in flight is averaged over `over_s`."""
    gateways = {name: each for name, each in demand.gateways.items() if name != gateway}
    if seen.waiting or seen.queued or seen.inflight:
        gateways[gateway] = replace(seen, requests=0)
    there = replace(demand, gateways=gateways)
    return replace(
        there,
        asked_at=now if seen.requests or there.busy else demand.asked_at,
        waiting_since=(now if demand.waiting_since is None else demand.waiting_since) if there.waiting else None,
        rate=demand.rate_at(now) + seen.requests / RATE_OVER_S,
        rated_at=now,
        mean_inflight=there.mean_at(now, over_s),
    )


def unheard(demand: Demand) -> Demand:
    """With nobody waiting, until a gateway says so again."""
    gateways = {name: replace(seen, waiting=0) for name, seen in demand.gateways.items()}
    return replace(demand, gateways=gateways, waiting_since=None)


def forgotten(demand: Demand, gateway: str) -> Demand:
    """Without what a gateway said that is gone, and its requests with it."""
    if gateway not in demand.gateways:
        return demand
    left = {name: seen for name, seen in demand.gateways.items() if name != gateway}
    without = replace(demand, gateways=left)
    return without if without.waiting else replace(without, waiting_since=None)
