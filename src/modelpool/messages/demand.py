"""Gateway → manager: what models are asked for. `POST /demand` on the control socket.

At once when the first request waits for a model, or one is refused because this node's part of its key's limit is used
up; else every second while there is anything to say. All models that have something in flight or waiting each time:
what is not named has nothing there. A gateway's part is forgotten when its stream of snapshots
(`GET /snapshots?gateway=…`) ends.
"""

from __future__ import annotations

import msgspec

from modelpool.core.limits import Limits, Use

INTERVAL_S = 1.0


class ModelDemand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`waiting`: for a model that is not there; `queued`: for their turn at one that is. `inflight`: by instance.

    `requests`: how many came since the last report.
    """

    waiting: int = 0
    queued: int = 0
    inflight: dict[str, int] = {}
    requests: int = 0


class KeyDemand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`use`: what all gateways of the node use of the key's limits; `part`: what they may; None: they know of none.

    `asked`: what was asked of this one since the last report, whether it was granted or not.
    """

    use: Use
    asked: Use = Use()
    part: Limits | None = None


class DemandReport(msgspec.Struct, frozen=True, kw_only=True):
    """`gateway` is `node.process`. `heard`: the number of the latest `Others` that it keeps to."""

    gateway: str
    models: dict[str, ModelDemand]
    keys: dict[str, KeyDemand] = {}
    heard: int = 0


def node_of(gateway: str) -> str:
    """ "" for one that does not say."""
    node, dot, _ = gateway.partition(".")
    return node if dot else ""
