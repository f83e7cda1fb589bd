"""What the nodes' gateways use of keys and instances, and what each node is told of the others.

Where all gateways are on one node nothing is told: what it counts itself is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from modelpool.core.limits import Limits
from modelpool.core.shares import first_part
from modelpool.manager.capacity import USED_MUCH, Asked, Capacities, Hears
from modelpool.manager.claims import Claims
from modelpool.messages.demand import DemandReport, ModelDemand, node_of
from modelpool.messages.routing import Others

_LOAD_MEAN_S = 6.0
"""Over about this long what is in flight elsewhere is averaged. Told as it was a moment ago, all nodes would run to the
same instance: tests/unit/test_spread.py."""

_COUNTS_MAX = 64


class _Load:
    """What one gateway has in flight at each instance, now and on average, and queued for it."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {}
        self.queued: dict[str, float] = {}
        """Of what waits for a model, an equal part for each of its instances that this gateway uses."""
        self._at = 0.0
        self._mean: dict[str, float] = {}

    def hear(self, models: Iterable[ModelDemand], now: float) -> None:
        mean, self.now, self.queued = self.mean(now), {}, {}
        for model in models:
            for instance, inflight in model.inflight.items():
                self.now[instance] = inflight
                if model.queued:
                    self.queued[instance] = model.queued / len(model.inflight)
        self._mean = {instance: each for instance, each in mean.items() if each > 0.1 or instance in self.now}
        self._mean |= {instance: 0.0 for instance in self.now if instance not in self._mean}
        self._at = now

    def mean_of(self, instance: str, now: float) -> float:
        left = math.exp((self._at - now) / _LOAD_MEAN_S)
        return self._mean.get(instance, 0.0) * left + self.now.get(instance, 0) * (1 - left)

    def mean(self, now: float) -> dict[str, float]:
        left = math.exp((self._at - now) / _LOAD_MEAN_S)
        return {each: mean * left + self.now.get(each, 0) * (1 - left) for each, mean in self._mean.items()}


class Sharing:
    """Gateways are told apart by their names, `node.process`; what one without a node says is of no use here."""

    def __init__(self) -> None:
        self._heard: dict[str, dict[str, int]] = {}
        """By node and gateway: the number of the latest `Others` that it keeps to."""
        self._loads: dict[str, dict[str, _Load]] = {}
        """By node and gateway."""
        self._keys: dict[str, Claims] = {}
        self._capacities = Capacities()
        self._told: dict[str, Others] = {}
        self._counts: list[tuple[int, int]] = []
        """The number of each message that said there are more nodes than before, or fewer, and how many."""
        self._count = 0

    def join(self, gateway: str) -> None:
        if node := node_of(gateway):
            if node not in self._heard:
                self._capacities.share_all()
            self._heard.setdefault(node, {}).setdefault(gateway, 0)
            self._told.pop(node, None)

    def leave(self, gateway: str) -> None:
        """What it used of its keys' minute stays used; what it ran runs no more."""
        node = node_of(gateway)
        self._loads.get(node, {}).pop(gateway, None)
        gateways = self._heard.get(node, {})
        gateways.pop(gateway, None)
        if node in self._heard and not gateways:
            del self._heard[node]
            self._loads.pop(node, None)
            self._told.pop(node, None)
            self._capacities.share_all()
            for key in self._keys.values():
                key.leave(node)

    def hear(self, report: DemandReport, capacity_of: Callable[[str], int | None], now: float) -> None:
        """`capacity_of`: an instance that requests are sent to, by its name; None: there is none."""
        node = node_of(report.gateway)
        if report.gateway not in self._heard.get(node, {}):
            return
        self._heard[node][report.gateway] = report.heard
        load = self._loads.setdefault(node, {}).setdefault(report.gateway, _Load())
        load.hear(report.models.values(), now)
        for id, demand in report.keys.items():
            self._keys.setdefault(id, Claims()).hear(node, demand, now)
        self._share(load, capacity_of)

    def news(
        self,
        limits_of: Callable[[str], Limits | None],
        capacity_of: Callable[[str], int | None],
        epoch: str,
        base: int,
        now: float,
    ) -> Iterator[tuple[str, Others]]:
        """For each node that there is something new for, what its gateways are to be told.

        `limits_of`: a live key, by its id; None: there is none. `capacity_of`: as for `hear`. Numbers are above `base`.
        """
        limits = self._limits(limits_of, now)
        several = len(self._heard) > 1
        if not several and not self._was_shared(limits):
            return
        self._count += 1
        number = base + self._count
        heard = {node: min(gateways.values()) for node, gateways in self._heard.items()}
        keys = {id: self._keys[id].parts(each, heard, self._told, now) for id, each in limits.items() if several}
        nodes = {node: Hears(each, self._nodes_known(node, each)) for node, each in heard.items()}
        if not self._counts or self._counts[-1][1] != len(nodes):
            self._counts = [*self._counts, (number, len(nodes))][-_COUNTS_MAX:]
            for loads in self._loads.values():
                for load in loads.values():
                    self._share(load, capacity_of)
        if several:
            self._capacities.give_out(capacity_of, lambda instance: self._asked(instance, now), nodes, now)
        for node in self._heard:
            others = Others(
                epoch=epoch,
                number=number,
                nodes=len(self._heard),
                inflight=self._elsewhere(node, now),
                keys={id: parts[node] for id, parts in keys.items()},
                instances=self._capacities.parts(node) if several else {},
            )
            before = self._told.get(node)
            if before and msgspec.structs.replace(before, epoch=epoch, number=number) == others:
                continue
            self._told[node] = others
            for id, part in others.keys.items():
                self._keys[id].send(node, number, part, heard[node])
            self._capacities.sent(node, number)
            yield node, others

    def _share(self, load: _Load, capacity_of: Callable[[str], int | None]) -> None:
        """Give out parts of what is used much, or short, there."""
        nodes = len(self._heard)
        for instance, inflight in load.now.items() if nodes > 1 else ():
            if instance in load.queued or (
                instance not in self._capacities
                and (capacity := capacity_of(instance)) is not None
                and inflight > USED_MUCH * first_part(capacity, nodes)
            ):
                self._capacities.share(instance)

    def _was_shared(self, limits: Mapping[str, Limits]) -> bool:
        """Whether the only node keeps to less than all, since there were others."""
        (node,) = self._heard or ("",)
        told = self._told.get(node)
        if told is not None:
            return told.nodes > 1
        return any(key.keeps_to_less(node, limits[id]) for id, key in self._keys.items())

    def _nodes_known(self, node: str, heard: int) -> int:
        """As `Hears` has it."""
        if not heard and node not in self._told and node not in self._loads:
            return 0
        known = [count for number, count in self._counts if number <= heard][-1:] or [1]
        return min(known + [count for number, count in self._counts if number > heard])

    def _elsewhere(self, node: str, now: float) -> dict[str, int]:
        means: dict[str, float] = {}
        for other, loads in self._loads.items():
            if other != node:
                for load in loads.values():
                    for instance, mean in load.mean(now).items():
                        means[instance] = means.get(instance, 0.0) + mean
        return {instance: round(mean) for instance, mean in means.items() if round(mean)}

    def _asked(self, instance: str, now: float) -> dict[str, Asked]:
        asked = {}
        for node, loads in self._loads.items():
            each = asked[node] = Asked()
            for load in loads.values():
                each.now += load.now.get(instance, 0)
                each.wanted += load.mean_of(instance, now) + load.queued.get(instance, 0.0)
        return asked

    def _limits(self, limits_of: Callable[[str], Limits | None], now: float) -> dict[str, Limits]:
        """Of the keys that are used. Forgotten are those that are gone, and what was said longer than a window ago."""
        limits = {}
        for id, key in list(self._keys.items()):
            key.forget(now)
            known = limits_of(id)
            if known is None or not key.used:
                del self._keys[id]
            else:
                limits[id] = known
        return limits
