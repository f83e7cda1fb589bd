"""Gateway → manager: what models are asked for. `POST /demand` on the control socket.

At once when the first request waits for a model, else every second while there is anything to say. All models that
have something in flight or waiting each time: what is not named has nothing there. A gateway's part is forgotten when
its stream of snapshots (`GET /snapshots?gateway=…`) ends.
"""

from __future__ import annotations

import msgspec

INTERVAL_S = 1.0


class ModelDemand(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`inflight`: by instance. `requests`: how many came since the last report."""

    waiting: int = 0
    inflight: dict[str, int] = {}
    requests: int = 0


class DemandReport(msgspec.Struct, frozen=True, kw_only=True):
    gateway: str
    models: dict[str, ModelDemand]
