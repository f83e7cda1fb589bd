"""Requests of several nodes over the same instances, in virtual time: none is given more than it can take but for one
of each node, and what they can take is used.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque

import msgspec
import pytest

from modelpool.core.routing.choice import least_loaded
from modelpool.core.shares import first_part
from modelpool.gateway.instances import BEYOND_PART
from modelpool.manager.sharing import Sharing
from modelpool.messages.demand import INTERVAL_S, DemandReport, ModelDemand
from modelpool.messages.routing import Others

CAPACITY = 8
INSTANCES = ("m", "m-r2", "m-r3", "m-r4")
CAPACITIES = dict.fromkeys(INSTANCES, CAPACITY)
ALL = CAPACITY * len(INSTANCES)
SHORT_S = 0.1
"""So often at most a node says at once that requests wait."""
LATE_S = 0.05
"""A message takes so long at most."""


class Seen:
    """An instance as a node sees it."""

    capacity = CAPACITY

    def __init__(self, name: str) -> None:
        self.name = name
        self.own = 0
        self.elsewhere = 0
        self.limit = CAPACITY

    @property
    def inflight(self) -> int:
        return self.own + self.elsewhere


class Node:
    """As gateway/instances.py and gateway/hold.py do it. `queue`: when those came that wait."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.gateway = f"{number}.p"
        self.instances = [Seen(name) for name in INSTANCES]
        self.queue: deque[float] = deque()
        self.heard = 0
        self.said_short = -1.0
        self.arrives_at = self.hears_at = 0.0
        """When its last report, and the last message to it, arrive: neither overtakes another."""
        self.turn = 0

    def choose(self) -> Seen | None:
        self.turn += 1
        free = [each for each in self.instances if each.own < each.limit]
        return least_loaded(free, self.turn)[0] if free else None

    def hear(self, others: Others) -> bool:
        """Whether it is to be said at once that it keeps to this."""
        before = [each.limit for each in self.instances]
        self.heard = others.number
        for each in self.instances:
            each.elsewhere = others.inflight.get(each.name, 0)
            each.limit = CAPACITY
            if others.nodes > 1:
                each.limit = others.instances.get(each.name, first_part(CAPACITY, others.nodes)) + BEYOND_PART
        return any(each.limit < limit for each, limit in zip(self.instances, before, strict=True))

    def report(self) -> DemandReport:
        inflight = {each.name: each.own for each in self.instances if each.own}
        demand = ModelDemand(inflight=inflight, queued=len(self.queue))
        return DemandReport(gateway=self.gateway, models={"m": demand}, heard=self.heard)


class Outcome(msgspec.Struct):
    most_above: int = 0
    """Of any instance at any time."""
    served: int = 0
    waits: list[float] = []


def play(count: int, lasting_s: float, load: float, *, seconds: float, seed: int, warm_s: float = 5.0) -> Outcome:
    """Unevenly asked nodes, whose part of all requests changes every now and then; `load`: of all that can be taken."""
    order = random.Random(seed)
    nodes, sharing = [Node(number) for number in range(count)], Sharing()
    there: list[Node] = []
    running = dict.fromkeys(INSTANCES, 0)
    shares = [1.0] * count
    outcome, ticks = Outcome(), itertools.count()
    events: list[tuple[float, int, str, Node, object]] = []

    def later(at: float, what: str, node: Node, more: object = None) -> None:
        heapq.heappush(events, (at, next(ticks), what, node, more))

    def serve(node: Node, now: float) -> None:
        while node.queue and (chosen := node.choose()):
            came = node.queue.popleft()
            chosen.own += 1
            running[chosen.name] += 1
            outcome.most_above = max(outcome.most_above, running[chosen.name] - CAPACITY)
            if now > warm_s:
                outcome.waits.append(now - came)
            later(now + order.expovariate(1 / lasting_s), "ends", node, chosen)
        if node.queue and now >= node.said_short + SHORT_S:
            node.said_short = now
            later(now, "says", node)

    def tell(now: float) -> None:
        for name, others in sharing.news(lambda id: None, CAPACITIES.get, "c.1", 0, now):
            to = nodes[int(name)]
            to.hears_at = max(to.hears_at, now + order.random() * LATE_S if to in there else now)
            later(to.hears_at, "hears", to, others)

    for node in nodes:
        later(0.7 * node.number, "joins", node)
    later(0.0, "comes", nodes[0])
    while (now := events[0][0]) < seconds:
        _, _, what, node, more = heapq.heappop(events)
        if what == "joins":
            sharing.join(node.gateway)
            tell(now)
            later(now, "serves", node)
            later(now + order.random() * INTERVAL_S, "reports", node)
        elif what == "serves":
            there.append(node)
        elif what in ("reports", "says"):
            if what == "reports":
                later(now + INTERVAL_S, what, node)
            node.arrives_at = max(node.arrives_at, now + order.random() * LATE_S)
            later(node.arrives_at, "arrives", node, node.report())
        elif what == "arrives":
            assert isinstance(more, DemandReport)
            sharing.hear(more, CAPACITIES.get, now)
            tell(now)
        elif what == "hears":
            assert isinstance(more, Others)
            if node.hear(more):
                later(now, "says", node)
            serve(node, now)
        elif what == "comes":
            later(now + order.expovariate(load * ALL / lasting_s), what, node)
            if order.random() < 0.02 / max(1.0, 1 / lasting_s):
                shares = [order.random() ** 3 for _ in nodes]
            (asked,) = order.choices(there, shares[: len(there)]) if there else nodes[:1]
            asked.queue.append(now)
            serve(asked, now)
        else:
            assert isinstance(more, Seen)
            running[more.name] -= 1
            more.own -= 1
            outcome.served += now > warm_s
            serve(node, now)
    return outcome


@pytest.mark.parametrize("load", [0.5, 0.95, 1.3])
@pytest.mark.parametrize("lasting_s", [0.05, 0.5, 2.0, 30.0])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_instance_is_given_more_above_its_capacity_than_there_are_nodes(
    count: int, lasting_s: float, load: float
) -> None:
    seconds = 15 + 5 * lasting_s
    assert max(play(count, lasting_s, load, seconds=seconds, seed=seed).most_above for seed in range(3)) <= count


@pytest.mark.parametrize("lasting_s", [0.2, 2.0])
@pytest.mark.parametrize("count", [2, 5])
def test_where_more_is_asked_for_than_can_be_taken_nearly_all_of_it_is_used(count: int, lasting_s: float) -> None:
    seconds = 65.0
    outcome = play(count, lasting_s, 1.3, seconds=seconds, seed=1)
    assert outcome.served > 0.9 * ALL / lasting_s * (seconds - 5)


@pytest.mark.parametrize("count", [2, 5])
def test_where_there_is_enough_for_all_hardly_anybody_waits(count: int) -> None:
    waits = sorted(play(count, 1.0, 0.5, seconds=65.0, seed=2).waits)
    assert waits[int(0.9 * len(waits))] == 0
    assert waits[int(0.99 * len(waits))] < 0.2
