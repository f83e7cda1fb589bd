"""Each node's part of what instances take at once, where several nodes have gateways.

Of an instance that is little used every node has an equal part, which it reckons itself. Those of the others are given
out by what nodes have there and would like to, and a part grows only by what others are known to have given up
(core/shares.py). So whatever is late, all parts together are never more than the capacity. Gateways go beyond theirs by
one (gateway/instances.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec

from modelpool.core.limits import Limits
from modelpool.core.shares import Claim, first_part, parts
from modelpool.manager.claims import Sent

USED_MUCH = 0.5
"""Of its equal part, by any node."""
_AGAIN_S = 1.0
"""So often parts are given out anew where nothing is short."""
_LIMIT = "concurrency"


class Asked(msgspec.Struct):
    """What a node has at an instance now, and what it has on average and queued for it."""

    now: int = 0
    wanted: float = 0.0


class Hears(msgspec.Struct, frozen=True):
    """`heard`: the number of the latest message that a node keeps to. `nodes`: the fewest that it may take to have
    gateways; 0 for one that goes by nothing yet.
    """

    heard: int
    nodes: int


class Capacities:
    """Instances are told apart by their names, nodes too."""

    def __init__(self) -> None:
        self._shared: dict[str, _Shared] = {}

    def __contains__(self, instance: str) -> bool:
        """Whether its parts are given out."""
        return instance in self._shared

    def share(self, instance: str) -> None:
        """It is used much, or short: its parts are given out, now."""
        self._shared.setdefault(instance, _Shared()).due_at = -math.inf

    def share_all(self) -> None:
        """Other nodes are there than before."""
        for instance in self._shared:
            self.share(instance)

    def give_out(
        self,
        capacity_of: Callable[[str], int | None],
        asked: Callable[[str], Mapping[str, Asked]],
        nodes: Mapping[str, Hears],
        now: float,
    ) -> None:
        """All that is due. `asked`: what nodes have and want at an instance; `nodes`: all that have gateways."""
        for instance, shared in list(self._shared.items()):
            if now < shared.due_at:
                continue
            capacity = capacity_of(instance)
            if capacity is None or not shared.give_out(capacity, asked(instance), nodes, now):
                del self._shared[instance]

    def parts(self, node: str) -> dict[str, int]:
        return {instance: shared.parts[node] for instance, shared in self._shared.items() if node in shared.parts}

    def sent(self, node: str, number: int) -> None:
        """The node is sent all its parts in the message of this number."""
        for shared in self._shared.values():
            shared.sent(node, number)


class _Shared:
    """One instance."""

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self.due_at = -math.inf
        self._sent: dict[str, Sent] = {}
        self._heard: dict[str, int] = {}

    def give_out(self, capacity: int, asked: Mapping[str, Asked], nodes: Mapping[str, Hears], now: float) -> bool:
        """Whether there is anything to give out: not where nobody asks, and equal parts are safe."""
        equal = first_part(capacity, len(nodes))
        self._heard = {node: each.heard for node, each in nodes.items()}
        self._sent = {node: self._sent.get(node) or Sent() for node in nodes}
        claims = {}
        for node, hears in sorted(nodes.items()):
            each = asked.get(node, Asked())
            reckoned = first_part(capacity, hears.nodes) if hears.nodes else 0
            granted = self._sent[node].granted(_LIMIT, capacity, hears.heard, reckoned)
            claims[node] = Claim(used=each.now, asked=each.wanted, granted=granted)
        if all(claim.asked < USED_MUCH * equal for claim in claims.values()):
            most = sum(max(claim.granted, claim.used, equal) for claim in claims.values())
            if most <= max(capacity, len(nodes)):
                return False
        given = parts(capacity, claims)
        settled = given == self.parts and all(nodes[node].heard >= sent.last for node, sent in self._sent.items())
        self.parts = given
        self.due_at = now + _AGAIN_S if settled else -math.inf
        return True

    def sent(self, node: str, number: int) -> None:
        if node in self.parts:
            self._sent[node].send(number, Limits(concurrency=self.parts[node]), self._heard[node])
