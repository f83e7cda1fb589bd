"""Each node's part of a key's limit, so that all nodes together keep to it, and none asks another about a request.

    part = what the node has used + its share of what nobody has used yet

While there is enough each gets as much again as it was asked for lately, and all alike what is left then, so that
whoever is asked next need not refuse. Where there is not, shares go by what was asked for, but for a tenth, which is
for all alike. A node may not have heard of its latest part yet. So a part grows only by what others are known to have
given up: at no time do all of them take themselves to be allowed more than the limit, whichever messages have
arrived.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

RESERVE = 0.1


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One node. `used`: of the limit, as it last said; `asked`: how much was asked of it lately, granted or not.

    `granted`: the largest part that it may take itself to have.
    """

    used: int
    asked: float
    granted: int


def parts(limit: int, claims: Mapping[str, Claim]) -> dict[str, int]:
    """Each node's part from now on."""
    free = max(0, limit - sum(each.used for each in claims.values()))
    shares = _shares(free, {node: each.asked for node, each in claims.items()})
    held = {node: max(each.granted, each.used) for node, each in claims.items()}
    given: dict[str, int] = {}
    for node, claim in claims.items():
        left = limit - (sum(held.values()) - held[node])
        given[node] = max(0, min(claim.used + shares[node], left))
        held[node] = max(held[node], given[node])
    return given


def _shares(free: int, asked: Mapping[str, float]) -> dict[str, int]:
    """`free` in whole numbers; what rounding leaves goes to those who were asked for most."""
    total, rest = sum(asked.values()), free * (1.0 - RESERVE)
    equal = (free * RESERVE + max(0.0, rest - total)) / len(asked)
    enough = min(1.0, rest / total) if total else 0.0
    shares = {node: int(equal + enough * each) for node, each in asked.items()}
    for node in sorted(asked, key=lambda node: (-asked[node], node))[: free - sum(shares.values())]:
        shares[node] += 1
    return shares


def first_part(limit: int, nodes: int) -> int:
    """A node's part of a limit of which nobody has said anything yet. One at least, also where the limit has fewer."""
    return max(1, limit // nodes)
