"""What each node uses of one thing whose limits hold for all together, a key or an instance, and what it may."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from modelpool.core.limits import WINDOW_S, Limits, Use
from modelpool.core.shares import Claim, first_part, parts
from modelpool.messages.demand import KeyDemand

_HALF_LIFE_S = 2.0
"""Of what was asked for: what counts when limits are shared out."""
_UNHEARD_MAX = 16
"""Parts that a node was sent and has not heard of yet; of more the oldest are taken for one that is as large as any."""

_QUANTITIES = {"requests": "requests", "tokens": "tokens", "concurrency": "running"}
"""Limit → what is used of it."""


def _left(seconds: float) -> float:
    """Of what was asked for so long ago, the part that still counts."""
    return float(0.5 ** (seconds / _HALF_LIFE_S))


class Claims:
    """Nodes by name. `heard`: of each node that is there, the number of the latest message that it keeps to."""

    def __init__(self) -> None:
        self._said: dict[str, _Said] = {}

    @property
    def used(self) -> bool:
        """Whether a node says that it uses it, or did so lately."""
        return any(said.named for said in self._said.values())

    def hear(self, node: str, demand: KeyDemand, now: float) -> None:
        self._said.setdefault(node, _Said()).hear(demand, now)

    def leave(self, node: str) -> None:
        """What it used of a minute stays used; what it ran runs no more."""
        if said := self._said.get(node):
            said.use = Use(requests=said.use.requests, tokens=said.use.tokens)

    def forget(self, now: float) -> None:
        """What was said longer than a window ago."""
        self._said = {node: said for node, said in self._said.items() if not said.named or now - said.at <= WINDOW_S}

    def keeps_to_less(self, node: str, limits: Limits) -> bool:
        """Whether it said that it may use less than all."""
        return node in self._said and self._said[node].part not in (None, limits)

    def parts(self, limits: Limits, heard: Mapping[str, int], told: Collection[str], now: float) -> dict[str, Limits]:
        """Each node's parts of the limits from now on. `told`: the nodes that know of one another."""
        gone = [each for node, each in self._said.items() if node not in heard]
        given: dict[str, dict[str, int]] = {node: {} for node in heard}
        for limit, used_as in _QUANTITIES.items():
            most: int | None = getattr(limits, limit)
            if most is None:
                continue
            claims = {}
            for node in sorted(heard):
                each = self._said.setdefault(node, _Said())
                # A gateway that has just come is told of this before it serves anybody.
                first = first_part(most, len(heard)) if heard[node] or node in told else 0
                claims[node] = Claim(
                    used=getattr(each.use, used_as),
                    asked=each.asked_for(limit, now),
                    granted=each.granted(limit, most, heard[node], first),
                )
            left = max(0, most - sum(getattr(each.use, used_as) for each in gone))
            for node, part in parts(left, claims).items():
                given[node][limit] = part
        return {node: Limits(**part) for node, part in given.items()}

    def send(self, node: str, number: int, part: Limits, heard: int) -> None:
        """The node is sent its part in the message of this number."""
        self._said[node].sent.send(number, part, heard)


class _Said:
    """What a node said."""

    def __init__(self) -> None:
        self.at = 0.0
        self.use = Use()
        self.asked = {"requests": 0.0, "tokens": 0.0}
        self.part: Limits | None = None
        self.named = False
        self.sent = Sent()

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
        """The largest part that it may take itself to have, which keeps to what it was sent as `heard`.

        `first`: what it takes where it was sent nothing about this.
        """
        return self.sent.granted(limit, most, heard, amount(self.part, limit, most) if self.named else first)


class Sent:
    """The parts that a node was sent, with the numbers of the messages."""

    def __init__(self) -> None:
        self._sent: list[tuple[int, Limits]] = []
        self._at_first: dict[str, int] = {}
        """By limit: the part that it had before it was sent any."""

    @property
    def last(self) -> int:
        """The number of the message with its part as it is now."""
        return self._sent[-1][0] if self._sent else 0

    def granted(self, limit: str, most: int, heard: int, otherwise: int) -> int:
        """The largest part that it may take itself to have. `otherwise`: what it has where it was sent none yet."""
        kept = [part for number, part in self._sent if number <= heard]
        if kept:
            known = amount(kept[-1], limit, most)
        elif self._sent:
            known = self._at_first.get(limit, most)
        else:
            known = self._at_first[limit] = otherwise
        return max([known, *(amount(part, limit, most) for number, part in self._sent if number > heard)])

    def send(self, number: int, part: Limits, heard: int) -> None:
        if self._sent and self._sent[-1][1] == part:
            return
        kept = [each for each in self._sent if each[0] <= heard][-1:]
        unheard = [*(each for each in self._sent if each[0] > heard), (number, part)]
        if len(unheard) > _UNHEARD_MAX:
            (_, oldest), (later, next_to_it) = unheard[:2]
            unheard[:2] = [(later, _larger(oldest, next_to_it))]
        self._sent = [*kept, *unheard]


def _larger(one: Limits, other: Limits) -> Limits:
    """Of each limit the larger; one that is left out is all of it."""
    amounts = {limit: (getattr(one, limit), getattr(other, limit)) for limit in _QUANTITIES}
    return Limits(**{limit: None if None in each else max(each) for limit, each in amounts.items()})


def amount(part: Limits | None, limit: str, most: int) -> int:
    """Of a limit that is `most` for all: what this part has of it."""
    each: int | None = getattr(part, limit, None)
    return most if each is None else each
