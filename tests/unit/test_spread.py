"""Requests of several nodes over the same instances, in virtual time: none is given much more than it can take."""

from __future__ import annotations

import heapq
import random

import pytest

from modelpool.core.routing.choice import least_loaded
from modelpool.manager.sharing import Sharing
from modelpool.messages.demand import INTERVAL_S, DemandReport, ModelDemand

CAPACITY = 8
INSTANCES = ("m", "m-r2", "m-r3", "m-r4")
ALL = CAPACITY * len(INSTANCES)


class Seen:
    """An instance as a node sees it."""

    capacity = CAPACITY

    def __init__(self, name: str) -> None:
        self.name = name
        self.own = 0
        self.elsewhere = 0

    @property
    def inflight(self) -> int:
        return self.own + self.elsewhere


class Node:
    def __init__(self, number: int) -> None:
        self.gateway = f"n{number}.p"
        self.instances = [Seen(name) for name in INSTANCES]
        self.turn = 0

    def choose(self) -> Seen:
        self.turn += 1
        return least_loaded(self.instances, self.turn)[0]

    def report(self) -> DemandReport:
        inflight = {each.name: each.own for each in self.instances if each.own}
        return DemandReport(gateway=self.gateway, models={"m": ModelDemand(inflight=inflight)})


def most_above_capacity(count: int, lasting_s: float, load: float, *, seconds: float, seed: int) -> int:
    """Of any instance at any time, while never more run in all than all instances can take at once."""
    order = random.Random(seed)
    nodes, sharing = [Node(number) for number in range(count)], Sharing()
    for node in nodes:
        sharing.join(node.gateway)
    running = dict.fromkeys(INSTANCES, 0)
    shares = [1.0] * count
    worst, events = 0, [(order.random() * INTERVAL_S, number, "report") for number in range(count)]
    heapq.heappush(events, (0.0, count, "comes"))
    heapq.heapify(events)
    while (now := events[0][0]) < seconds:
        _, number, what = heapq.heappop(events)
        if what == "report":
            heapq.heappush(events, (now + INTERVAL_S, number, what))
            sharing.hear(nodes[number].report(), now)
            for name, others in sharing.news(lambda id: None, "c.1", 0, now):
                for each in nodes[int(name[1:])].instances:
                    each.elsewhere = others.inflight.get(each.name, 0)
        elif what == "comes":
            heapq.heappush(events, (now + order.expovariate(load * ALL / lasting_s), count, what))
            if order.random() < 0.02:
                shares = [order.random() ** 3 for _ in nodes]
            if sum(running.values()) < ALL:
                (number,) = order.choices(range(count), shares)
                chosen = nodes[number].choose()
                chosen.own += 1
                running[chosen.name] += 1
                worst = max(worst, running[chosen.name] - CAPACITY)
                heapq.heappush(events, (now + order.expovariate(1 / lasting_s), number, chosen.name))
        else:
            running[what] -= 1
            next(each for each in nodes[number].instances if each.name == what).own -= 1
    return worst


@pytest.mark.parametrize("load", [0.95, 1.3])
@pytest.mark.parametrize(("lasting_s", "more"), [(0.05, 2), (0.5, 1), (2.0, 1), (30.0, 0)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_instance_is_given_much_more_above_its_capacity_than_there_are_nodes(
    count: int, lasting_s: float, more: int, load: float
) -> None:
    seconds = 15 + 5 * lasting_s
    worst = max(most_above_capacity(count, lasting_s, load, seconds=seconds, seed=seed) for seed in range(3))
    assert worst <= count + more
