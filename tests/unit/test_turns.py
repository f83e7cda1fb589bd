"""Eight models, memory for two, and clients who ask for all of them in any order: the controller in virtual time."""

from __future__ import annotations

import math
import random

import pytest

from modelpool.core.orders import Start, Wake
from modelpool.core.placement import GB
from modelpool.core.pool import Model, Policy
from tests.controller_world import Client, Costs, World
from tests.swaps import first_come_first_served

MODELS = tuple("abcdefgh")
REQUESTS = 200
PLACES = 2
POLICY = Policy(heartbeat_timeout_s=1e9, swaps_per_minute=1000)
COSTS = Costs(held=(1.0, 1.0))
"""A sleeper holds as much as one that is awake: only an end makes room."""


def bound_s(models: int, places: int) -> float:
    """What docs/operations.md says that a request waits at most."""
    swap_s = COSTS.stop_s + COSTS.start_s + 0.5
    return POLICY.turn_max_s + math.ceil((models - places) / places) * (POLICY.turn_max_s + swap_s)


def played(seed: int, policy: Policy, costs: Costs, clients: int = 8) -> tuple[World, list[Client]]:
    rng = random.Random(seed)
    trace = [alias for alias in MODELS for _ in range(REQUESTS // len(MODELS))]
    rng.shuffle(trace)
    models = [Model(alias=alias, key=alias, engine="fake", created=0, memory_bytes=4 * GB) for alias in MODELS]
    world = World(policy, models, total_gb=4.0 * PLACES, costs=costs)
    todo = iter(trace)
    all_ = [Client(world, todo, service_s=rng.uniform(0.1, 0.4)) for _ in range(clients)]
    world.when_active = lambda alias: grant(all_, alias)
    for each in all_:
        each.ask()
    while world.now < 3600 and any(each.busy for each in all_):
        world.run(world.now + 1)
    return world, all_


def grant(clients: list[Client], alias: str) -> None:
    for each in clients:
        if each.waits_for == alias:
            each.granted()


@pytest.mark.parametrize("seed", range(3))
def test_eight_models_in_memory_for_two_are_swapped_half_as_often_as_first_come_first_served(seed: int) -> None:
    world, clients = played(seed, POLICY, COSTS)
    asked = [alias for _, alias in sorted(pair for each in clients for pair in each.asked)]
    assert len(asked) == sum(len(each.waits) for each in clients) == REQUESTS
    assert world.most_used <= world.total
    brought = sum(isinstance(order, Start | Wake) for _, order in world.steps)
    assert brought <= first_come_first_served(asked, PLACES) / 2
    assert max(wait for each in clients for wait in each.waits) <= bound_s(len(MODELS), PLACES)


def test_a_large_model_is_not_overtaken_for_ever_by_small_ones_that_fit_sooner() -> None:
    """It needs what two of them hold, and they are asked for without pause."""
    models = [Model(alias="large", key="large", engine="fake", created=0, memory_bytes=8 * GB)]
    models += [Model(alias=alias, key=alias, engine="fake", created=0, memory_bytes=4 * GB) for alias in "abcd"]
    world = World(POLICY, models, total_gb=10, costs=COSTS)
    rng = random.Random(1)
    small = [Client(world, (rng.choice("abcd") for _ in range(1000)), service_s=0.3) for _ in range(8)]
    large = Client(world, iter(["large"] * 5), service_s=0.3)
    world.when_active = lambda alias: grant([*small, large], alias)
    for each in small:
        each.ask()
    world.run(50)
    large.ask()
    world.run(500)
    assert len(large.waits) == 5
    assert max(wait for each in [*small, large] for wait in each.waits) <= bound_s(models=5, places=1)
