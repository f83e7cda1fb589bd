"""`modelpool simulate`: a trace played to the controller in virtual time, by one policy or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from modelpool.cli.listing import Listing
from modelpool.manager.policy import policy_of
from modelpool.picture import Panel, draw
from modelpool.settings import Settings
from modelpool.simulator.policies import Named, applied
from modelpool.simulator.report import Figures, figures
from modelpool.simulator.scenario import Scenario, read_scenario
from modelpool.simulator.simulation import Gateway, Simulation
from modelpool.simulator.trace import Arrival, read_trace, spread

SCENARIO_SUFFIX = ".pool.yaml"


def arrivals_of(path: Path, *, models: int, skew: float, seed: int) -> list[Arrival]:
    """Of a trace that names no models, spread over so many. Raises TraceError."""
    arrivals = read_trace(path)
    return arrivals if arrivals[0].model else spread(arrivals, models, skew=skew, seed=seed)


def scenario_of(trace: Path | None, given: Path | None) -> Scenario:
    """The one given, else the one beside the trace, else made-up costs. Raises ScenarioError."""
    beside = trace.with_suffix(SCENARIO_SUFFIX) if trace is not None else None
    if given is None and beside is not None and beside.exists():
        given = beside
    return Scenario() if given is None else read_scenario(given)


def simulated(
    arrivals: Sequence[Arrival], scenario: Scenario, settings: Settings, policies: Sequence[Named], *, seed: int
) -> dict[str, Figures]:
    """The figures of each policy."""
    gateway = Gateway(
        max_ongoing=settings.gateway.max_ongoing_requests or Gateway().max_ongoing,
        max_wait_s=settings.gateway.waiting_max_s,
        max_waiting=settings.gateway.waiting_max_requests,
        drain_s=settings.worker.drain_timeout_s,
    )
    found = {}
    for name in policies:
        policy, world = applied(name, policy_of(settings), scenario)
        outcome = Simulation(world, arrivals, policy=policy, gateway=gateway, seed=seed).run()
        found[name.value] = figures(outcome, world, arrivals)
    return found


def figures_table(found: dict[str, Figures]) -> Listing:
    """A column for each policy."""
    table = Listing("", *found)
    rows: dict[str, Callable[[Figures], str]] = {
        "requests": lambda each: f"{each.requests:,}",
        "refused": lambda each: f"{each.requests - each.answered:,}",
        "that waited": lambda each: f"{each.waited:,}",
        "wait, mean": lambda each: f"{each.wait_mean:.2f} s",
        "wait, 50 %": lambda each: f"{each.wait_p50:.2f} s",
        "wait, 95 %": lambda each: f"{each.wait_p95:.2f} s",
        "wait, 99 %": lambda each: f"{each.wait_p99:.2f} s",
        "wait, longest": lambda each: f"{each.wait_max:.2f} s",
        "cold starts": lambda each: f"{each.starts:,}",
        "wakes from level 1": lambda each: f"{each.wakes_1:,}",
        "wakes from level 2": lambda each: f"{each.wakes_2:,}",
        "sleeps, unloads": lambda each: f"{each.sleeps:,}, {each.unloads:,}",
        "swaps": lambda each: f"{each.swaps:,}",
        "device-hours": lambda each: f"{each.device_hours:.2f}",
        "all always awake": lambda each: f"{each.always_on_hours:.2f}",
    }
    for name, text in rows.items():
        table.add_row(name, *(text(each) for each in found.values()))
    return table


def refusals(found: dict[str, Figures]) -> list[str]:
    """A line for each policy that refused requests: how many, and why."""
    return [
        f"{name}: " + ", ".join(f"{count:,} refused, since {why}" for why, count in each.refused.items())
        for name, each in found.items()
        if each.refused
    ]


def picture(found: dict[str, Figures]) -> str:
    """In SVG; the first policy is what the others are compared with."""
    hours = {name: each.device_hours for name, each in found.items()}
    first = next(iter(found))
    return draw(
        [
            Panel("Wait, 50 %", "ms", {name: each.wait_p50 * 1e3 for name, each in found.items()}),
            Panel("Wait, 95 %", "ms", {name: each.wait_p95 * 1e3 for name, each in found.items()}),
            Panel("Wait, 99 %", "ms", {name: each.wait_p99 * 1e3 for name, each in found.items()}),
            Panel("Cold starts", "", {name: float(each.starts) for name, each in found.items()}),
            Panel("Swaps", "", {name: float(each.swaps) for name, each in found.items()}),
            Panel("Device-hours", "h", {**hours, "all always awake": found[first].always_on_hours}),
        ],
        first,
    )
