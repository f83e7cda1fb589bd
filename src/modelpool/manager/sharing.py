"""What the nodes' gateways use of keys and instances, and what each node is told of the others.

Where all gateways are on one node nothing is told: what it counts itself is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import msgspec

from modelpool.core.limits import WINDOW_S, Limits, Use
from modelpool.core.shares import Claim, first_part, parts
from modelpool.messages.demand import DemandReport, KeyDemand, node_of
from modelpool.messages.routing import Others

_HALF_LIFE_S = 2.0
"""Of what was asked for: what counts when limits are shared out."""
_LOAD_MEAN_S = 6.0
"""Over about this long what is in flight elsewhere is averaged. Told as it was a moment ago, all nodes would run to the
same instance: tests/unit/test_spread.py."""
_SENT_MAX = 16

_QUANTITIES = {"requests": "requests", "tokens": "tokens", "concurrency": "running"}
"""Limit → what is used of it."""


def _left(seconds: float) -> float:
    """Of what was asked for so long ago, the part that still counts."""
    return float(0.5 ** (seconds / _HALF_LIFE_S))


class _Said:
    """What a node said of one key, and the parts of its limits that it was sent, with their numbers."""

    def __init__(self) -> None:
        self.at = 0.0
        self.use = Use()
        self.asked = {"requests": 0.0, "tokens": 0.0}
        self.part: Limits | None = None
        self.named = False
        self.sent: list[tuple[int, Limits]] = []
        self._at_first: dict[str, int] = {}
        """By limit: the part that it had before it was sent any."""

    def hear(self, demand: KeyDemand, now: float) -> None:
        left = _left(now - self.at)
        new = {"requests": demand.asked.requests, "tokens": demand.asked.tokens}
        self.asked = {what: amount * left + new[what] for what, amount in self.asked.items()}
        self.at, self.use, self.part, self.named = now, demand.use, demand.part, True

    def asked_for(self, limit: str, now: float) -> float:
        what = "tokens" if limit == "tokens" else "requests"
        running = self.use.running if limit == "concurrency" else 0
        return running + self.asked[what] * _left(now - self.at)

    def granted(self, limit: str, most: int, heard: int, first: int) -> int:
        """The largest part that the node may take itself to have, which keeps to what it was sent as `heard`.

        `first`: what it takes where it was sent nothing about this key.
        """
        kept = [part for number, part in self.sent if number <= heard]
        if kept:
            known = self._amount(kept[-1], limit, most)
        elif self.sent:
            known = self._at_first.get(limit, most)
        else:
            known = self._amount(self.part, limit, most) if self.named else first
            self._at_first[limit] = known
        return max([known, *(self._amount(part, limit, most) for number, part in self.sent if number > heard)])

    @staticmethod
    def _amount(part: Limits | None, limit: str, most: int) -> int:
        amount: int | None = getattr(part, limit, None)
        return most if amount is None else amount

    def send(self, number: int, part: Limits, heard: int) -> None:
        kept = [each for each in self.sent if each[0] <= heard][-1:]
        self.sent = [*kept, *(each for each in self.sent if each[0] > heard), (number, part)][-_SENT_MAX:]


class _Load:
    """What one gateway has in flight at each instance, on average."""

    def __init__(self) -> None:
        self._at = 0.0
        self._now: Mapping[str, int] = {}
        self._mean: dict[str, float] = {}

    def hear(self, inflight: Mapping[str, int], now: float) -> None:
        self._mean = {instance: mean for instance, mean in self.mean(now).items() if mean > 0.1 or instance in inflight}
        self._mean |= {instance: 0.0 for instance in inflight if instance not in self._mean}
        self._at, self._now = now, inflight

    def mean(self, now: float) -> dict[str, float]:
        left = math.exp((self._at - now) / _LOAD_MEAN_S)
        return {each: mean * left + self._now.get(each, 0) * (1 - left) for each, mean in self._mean.items()}


class Sharing:
    """Gateways are told apart by their names, `node.process`; what one without a node says is of no use here."""

    def __init__(self) -> None:
        self._heard: dict[str, dict[str, int]] = {}
        """By node and gateway: the number of the latest `Others` that it keeps to."""
        self._loads: dict[str, _Load] = {}
        """By gateway."""
        self._keys: dict[str, dict[str, _Said]] = {}
        """By key and node."""
        self._told: dict[str, Others] = {}
        self._count = 0

    def join(self, gateway: str) -> None:
        if node := node_of(gateway):
            self._heard.setdefault(node, {}).setdefault(gateway, 0)
            self._told.pop(node, None)

    def leave(self, gateway: str) -> None:
        """What it used of its keys' minute stays used; what it ran runs no more."""
        node = node_of(gateway)
        self._loads.pop(gateway, None)
        gateways = self._heard.get(node, {})
        gateways.pop(gateway, None)
        if node in self._heard and not gateways:
            del self._heard[node]
            self._told.pop(node, None)
            for nodes in self._keys.values():
                if node in nodes:
                    nodes[node].use = msgspec.structs.replace(nodes[node].use, running=0)

    def hear(self, report: DemandReport, now: float) -> None:
        node = node_of(report.gateway)
        if report.gateway not in self._heard.get(node, {}):
            return
        self._heard[node][report.gateway] = report.heard
        inflight = {instance: count for model in report.models.values() for instance, count in model.inflight.items()}
        self._loads.setdefault(report.gateway, _Load()).hear(inflight, now)
        for id, demand in report.keys.items():
            self._keys.setdefault(id, {}).setdefault(node, _Said()).hear(demand, now)

    def news(
        self, limits_of: Callable[[str], Limits | None], epoch: str, base: int, now: float
    ) -> Iterator[tuple[str, Others]]:
        """For each node that there is something new for, what its gateways are to be told.

        `limits_of`: a live key, by its id; None: there is none. Numbers are above `base`.
        """
        limits = self._limits(limits_of, now)
        if len(self._heard) < 2 and not self._was_shared(limits):
            return
        self._count += 1
        number = base + self._count
        shared = {id: self._parts(id, each, now) for id, each in limits.items()} if len(self._heard) > 1 else {}
        for node in self._heard:
            keys = {id: parts_[node] for id, parts_ in shared.items()}
            inflight = self._elsewhere(node, now)
            before = self._told.get(node)
            if before and (before.nodes, before.inflight, before.keys) == (len(self._heard), inflight, keys):
                continue
            self._told[node] = Others(epoch=epoch, number=number, nodes=len(self._heard), inflight=inflight, keys=keys)
            for id, part in keys.items():
                self._keys[id][node].send(number, part, self._heard_by(node))
            yield node, self._told[node]

    def _was_shared(self, limits: Mapping[str, Limits]) -> bool:
        """Whether the only node keeps to less than all, since there were others."""
        (node,) = self._heard or ("",)
        told = self._told.get(node)
        if told is not None:
            return told.nodes > 1
        return any(
            (said := nodes.get(node)) is not None and said.part not in (None, limits[id])
            for id, nodes in self._keys.items()
        )

    def _heard_by(self, node: str) -> int:
        """What all of a node's gateways keep to."""
        return min(self._heard[node].values())

    def _elsewhere(self, node: str, now: float) -> dict[str, int]:
        means: dict[str, float] = {}
        for gateway, load in self._loads.items():
            if node_of(gateway) != node:
                for instance, mean in load.mean(now).items():
                    means[instance] = means.get(instance, 0.0) + mean
        return {instance: round(mean) for instance, mean in means.items() if round(mean)}

    def _parts(self, id: str, limits: Limits, now: float) -> dict[str, Limits]:
        """Of one key's limits, by node."""
        said = self._keys[id]
        gone = [each for node, each in said.items() if node not in self._heard]
        given: dict[str, dict[str, int]] = {node: {} for node in self._heard}
        for limit, used_as in _QUANTITIES.items():
            most: int | None = getattr(limits, limit)
            if most is None:
                continue
            claims = {}
            for node in sorted(self._heard):
                each, heard = said.setdefault(node, _Said()), self._heard_by(node)
                # A gateway that has just come is told of this key before it serves anybody.
                first = first_part(most, len(self._heard)) if heard or node in self._told else 0
                claims[node] = Claim(
                    used=getattr(each.use, used_as),
                    asked=each.asked_for(limit, now),
                    granted=each.granted(limit, most, heard, first),
                )
            left = max(0, most - sum(getattr(each.use, used_as) for each in gone))
            for node, part in parts(left, claims).items():
                given[node][limit] = part
        return {node: Limits(**part) for node, part in given.items()}

    def _limits(self, limits_of: Callable[[str], Limits | None], now: float) -> dict[str, Limits]:
        """Of the keys that are used. Forgotten are those that are gone, and what was said longer than a window ago."""
        limits = {}
        for id, nodes in list(self._keys.items()):
            for node in [node for node, said in nodes.items() if said.named and now - said.at > WINDOW_S]:
                del nodes[node]
            known = limits_of(id)
            if known is None or not any(said.named for said in nodes.values()):
                del self._keys[id]
            else:
                limits[id] = known
        return limits
