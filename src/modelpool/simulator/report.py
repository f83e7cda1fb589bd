"""What came of a simulation, in the figures that a pool is run by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from modelpool.simulator.scenario import Scenario
from modelpool.simulator.simulation import Outcome
from modelpool.simulator.trace import Arrival

HOUR_S = 3600.0


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one policy. Waits in seconds, from a request's arrival until an instance began with it; of those answered.

    `always_on_hours`: device-hours that it would take to keep every model awake all the time.
    """

    requests: int
    answered: int
    refused: dict[str, int]
    waited: int
    """More than a tenth of a second."""
    wait_mean: float
    wait_p50: float
    wait_p95: float
    wait_p99: float
    wait_max: float
    starts: int
    wakes_1: int
    wakes_2: int
    sleeps: int
    unloads: int
    swaps: int
    """Instances that went to sleep or ended to make room for another model."""
    device_hours: float
    always_on_hours: float


def figures(outcome: Outcome, scenario: Scenario, arrivals: Sequence[Arrival]) -> Figures:
    answered = [each for each in outcome.served if not each.refused]
    waits = sorted(each.wait_s for each in answered)
    refused: dict[str, int] = {}
    for each in outcome.served:
        if each.refused:
            refused[each.refused] = refused.get(each.refused, 0) + 1
    devices = devices_for_all(scenario, scenario.aliases(arrivals))
    return Figures(
        requests=len(outcome.served),
        answered=len(answered),
        refused=refused,
        waited=sum(each > 0.1 for each in waits),
        wait_mean=sum(waits) / len(waits) if waits else 0.0,
        wait_p50=quantile(waits, 0.5),
        wait_p95=quantile(waits, 0.95),
        wait_p99=quantile(waits, 0.99),
        wait_max=quantile(waits, 1.0),
        starts=outcome.starts,
        wakes_1=outcome.wakes[1],
        wakes_2=outcome.wakes[2],
        sleeps=sum(outcome.sleeps.values()),
        unloads=outcome.stops,
        swaps=outcome.swaps,
        device_hours=outcome.device_s / HOUR_S,
        always_on_hours=devices * outcome.seconds / HOUR_S,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that this share of all does not exceed; 0 of none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def devices_for_all(scenario: Scenario, aliases: Sequence[str]) -> int:
    """How many devices of the largest kind hold one replica of every model, each put where it first fits."""
    size = max(kind.device_gb for kind in scenario.workers)
    free: list[float] = []
    parts = [costs.memory_gb for alias in aliases for costs in [scenario.costs(alias)] for _ in range(costs.devices)]
    for part in sorted(parts, reverse=True):
        at = next((index for index, left in enumerate(free) if left >= part), None)
        if at is None:
            free.append(size - part)
        else:
            free[at] -= part
    return len(free)
