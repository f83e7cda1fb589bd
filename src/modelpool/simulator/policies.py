"""The pool's own policy, and others to compare it with."""

from __future__ import annotations

from enum import StrEnum

from msgspec.structs import replace

from modelpool.core.pool import Policy
from modelpool.simulator.scenario import ModelCosts, Scenario


class Named(StrEnum):
    LADDER = "ladder"
    """What the settings say: sleep by levels, and turns for models that cannot live together."""
    UNLOAD = "unload"
    """The same without sleep: an idle model is unloaded after its first idle time."""
    FIRST_COME = "first-come"
    """The same as the ladder without turns: whoever asks first gets the room at once, however short the last had it."""


def applied(name: Named, policy: Policy, scenario: Scenario) -> tuple[Policy, Scenario]:
    """The settings and the models by that policy."""
    if name is Named.FIRST_COME:
        hasty = replace(policy, min_residence_s=0.0, turn_max_s=0.001, swaps_per_minute=10**9)
        return hasty, scenario
    if name is Named.UNLOAD:
        awake_only = {alias: _without_sleep(costs) for alias, costs in scenario.models.items()}
        return policy, replace(scenario, models=awake_only, default=_without_sleep(scenario.default))
    return policy, scenario


def _without_sleep(costs: ModelCosts) -> ModelCosts:
    return replace(costs, sleeps=False)
