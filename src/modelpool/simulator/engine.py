"""A simulated instance."""

from __future__ import annotations

from collections.abc import Callable

from modelpool.core.lifecycle import InstanceState
from modelpool.simulator.scenario import ModelCosts


class Engine:
    """A Candidate for the gateway's choice."""

    __slots__ = (
        "alias",
        "capacity",
        "changed_at",
        "costs",
        "devices",
        "ending",
        "inflight",
        "name",
        "requests",
        "slept_s",
        "state",
        "step",
        "when_drained",
        "woken_from",
        "worker_id",
    )

    def __init__(self, name: str, alias: str, worker_id: str, devices: tuple[int, ...], costs: ModelCosts) -> None:
        self.name = name
        self.alias = alias
        self.worker_id = worker_id
        self.devices = devices
        self.costs = costs
        self.capacity = costs.capacity
        self.state = InstanceState.STARTING
        self.woken_from = InstanceState.STARTING
        self.changed_at = 0.0
        self.slept_s = 0.0
        self.step = 0
        """Counts what was begun with it: what was begun before is not ended any more."""
        self.ending = False
        self.when_drained: Callable[[], None] | None = None
        self.inflight = 0
        self.requests = 0
        """How many it ever was sent."""

    def take(self) -> None:
        """A request."""
        self.inflight += 1
        self.requests += 1

    def leave(self) -> None:
        """One has ended."""
        self.inflight -= 1
