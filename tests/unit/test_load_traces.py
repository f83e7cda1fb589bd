"""Replicas follow their load, step by step and without flapping: the real controller in virtual time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from modelpool.core.orders import Effect, Sleep, Start, Stop, Wake
from modelpool.core.placement import GB
from modelpool.core.pool import Model, Policy
from modelpool.core.scaling import ScalingPolicy
from tests.controller_world import World

CAPACITY = 10
MOST = 4
SCALING = ScalingPolicy(idle_sleep_1_s=300, idle_sleep_2_s=600, idle_unload_s=900)
INTERVAL, COOLDOWN = SCALING.averaged_over_s, SCALING.cooldown_s
UP, DOWN = (Start, Wake), (Sleep, Stop)


def world() -> World:
    policy = Policy(scaling=SCALING, max_replicas=MOST, heartbeat_timeout_s=1e9)
    model = Model(alias="m", key="m", engine="fake", created=0, memory_bytes=GB)
    begun = World(policy, [model], total_gb=80, capacity=CAPACITY)
    begun.run(10)
    return begun


def follow(world: World, inflight: Callable[[int], float], seconds: float) -> list[tuple[float, Effect]]:
    """The steps taken while so many requests are in flight, given how many replicas are awake; heard each second."""
    before = len(world.steps)
    for _ in range(math.ceil(seconds)):
        active = sorted(world.active("m"))
        each, more = divmod(round(inflight(len(active))), max(1, len(active)))
        world.asked("m")
        world.serve({name: each + (index < more) for index, name in enumerate(active)})
        world.run(world.now + 1)
    return world.steps[before:]


def names(steps: list[tuple[float, Effect]]) -> list[str]:
    return [order.instance for _, order in steps]


def test_a_high_load_brings_one_replica_after_another_each_within_two_intervals() -> None:
    pool = world()
    since = pool.now
    steps = follow(pool, lambda active: 0.9 * CAPACITY * active, 200)
    assert names(steps) == ["m-r2", "m-r3", "m-r4"]
    assert all(isinstance(order, Start) for _, order in steps)
    for at, _ in steps:
        assert at - since <= 2 * INTERVAL
        since = at + pool.costs.start_s


def test_a_low_load_takes_them_down_in_the_order_of_the_ladder() -> None:
    pool = world()
    follow(pool, lambda active: 0.9 * CAPACITY * active, 60)
    steps = follow(pool, lambda active: 0.1 * CAPACITY * active, 3 * SCALING.idle_unload_s)
    first = [at for at, order in steps if isinstance(order, Sleep) and order.level == 1]
    assert names(steps[:3]) == ["m-r4", "m-r3", "m-r2"]
    assert all(later - sooner >= COOLDOWN for sooner, later in itertools.pairwise(first))
    for name in ("m-r2", "m-r3", "m-r4"):
        mine = [order for _, order in steps if order.instance == name]
        assert [order.level if isinstance(order, Sleep) else 3 for order in mine] == [1, 2, 3]
    assert "m" not in names(steps)


@pytest.mark.parametrize("replicas", range(1, MOST + 1))
def test_a_steady_load_of_a_half_causes_nothing_for_200_intervals(replicas: int) -> None:
    pool = world()
    while len(pool.active("m")) < replicas:
        follow(pool, lambda active: 0.9 * CAPACITY * active, 1)
    assert follow(pool, lambda active: 0.5 * CAPACITY * active, 200 * INTERVAL) == []


@pytest.mark.parametrize("period", [10, 60, 300])
@pytest.mark.parametrize("peak", [1.0, 3.6])
def test_a_load_that_swings_causes_no_flapping(period: float, peak: float) -> None:
    """At most one step up in an interval, one down in a cooldown, and none down within a cooldown of one up."""
    pool = world()
    steps = follow(pool, lambda _: peak * CAPACITY * (1 + math.sin(2 * math.pi * pool.now / period)) / 2, 1500)
    up = [at for at, order in steps if isinstance(order, UP)]
    down = [at for at, order in steps if isinstance(order, Sleep) and order.level == 1]
    assert all(later - sooner >= INTERVAL for sooner, later in itertools.pairwise(up))
    assert all(later - sooner >= COOLDOWN for sooner, later in itertools.pairwise(down))
    assert all(later - sooner >= COOLDOWN for sooner in up for later in down if later > sooner)
    assert len(up) <= 1500 / max(period, COOLDOWN) * MOST
