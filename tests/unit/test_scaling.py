"""What becomes of one model: demand, load, idleness."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpool.core.demand import RATE_OVER_S, Demand, Seen, forgotten, heard
from modelpool.core.lifecycle import InstanceState
from modelpool.core.scaling import Replica, ScalingPolicy, Step, Wish, wish

S = InstanceState
POLICY = ScalingPolicy(idle_sleep_1_s=100, idle_sleep_2_s=200, idle_unload_s=300, cooldown_s=10)
NOW = 1000.0


def demand(*, waiting: int = 0, asked_at: float = NOW, **inflight: int) -> Demand:
    seen = Seen(waiting=waiting, inflight={name.replace("_", "-"): count for name, count in inflight.items()})
    return Demand(asked_at=asked_at, gateways={"g": seen})


def replica(
    number: int, state: InstanceState, inflight: int = 0, idle_since: float = NOW, up_since: float = 0.0
) -> Replica:
    name = "m" if number == 1 else f"m-r{number}"
    return Replica(
        name=name,
        number=number,
        state=state,
        inflight=inflight,
        capacity=10,
        idle_since=idle_since,
        up_since=up_since,
    )


def decide(
    replicas: list[Replica],
    demanded: Demand | None = None,
    *,
    policy: ScalingPolicy = POLICY,
    changed_at: float = 0.0,
    wanted_once: bool = False,
    now: float = NOW,
) -> Wish:
    return wish(policy, demanded or demand(), replicas, changed_at=changed_at, wanted_once=wanted_once, now=now)


def test_who_waits_wakes_the_lightest_sleeper_and_starts_one_where_none_sleeps() -> None:
    waiting = demand(waiting=3)
    both = [replica(1, S.SLEEP_2), replica(2, S.SLEEP_1)]
    assert (decide(both, waiting).step, decide(both, waiting).replica) == (Step.WAKE, "m-r2")
    assert decide(both[:1], waiting).replica == "m"
    started = decide([], waiting)
    assert (started.step, started.urgent) == (Step.START, True)
    assert "3 requests wait" in started.reason


def test_nothing_more_is_brought_up_while_one_is_on_its_way() -> None:
    for state in (S.STARTING, S.WAKING):
        assert decide([replica(1, state)], demand(waiting=50)).step is Step.NONE


def test_a_new_model_is_brought_up_once_and_the_least_replicas_always() -> None:
    assert decide([], wanted_once=True).step is Step.START
    assert decide([]).step is Step.NONE
    two = ScalingPolicy(min_replicas=2)
    assert decide([replica(1, S.ACTIVE)], policy=two).step is Step.START
    idle = [replica(1, S.ACTIVE, idle_since=0), replica(2, S.ACTIVE, idle_since=0)]
    assert decide(idle, demand(asked_at=0), policy=two).step is Step.NONE


def test_load_brings_one_more_up_to_the_most_once_that_with_the_last_one_was_seen() -> None:
    busy = [replica(1, S.ACTIVE, inflight=8)]
    assert decide(busy, demand(m=8)).step is Step.START
    young = decide(busy, demand(m=8), changed_at=NOW - 2)
    assert (young.step, young.due) == (Step.NONE, NOW - 2 + POLICY.averaged_over_s)
    new = decide([*busy, replica(2, S.ACTIVE, inflight=8, up_since=NOW - 1)], demand(m=8, m_r2=8))
    assert (new.step, new.due) == (Step.NONE, NOW - 1 + POLICY.averaged_over_s)
    assert decide(busy, demand(m=8), policy=ScalingPolicy(max_replicas=1)).step is Step.NONE
    assert decide([*busy, replica(2, S.SLEEP_1)], demand(m=8)).step is Step.WAKE
    assert decide([*busy, replica(2, S.STARTING)], demand(m=8)).step is Step.NONE


def test_a_burst_that_is_over_brings_nothing_up() -> None:
    """Its average is still high, and another replica would find nothing to do."""
    over = msgspec.structs.replace(demand(), mean_inflight=50.0, rated_at=NOW - 2)
    assert decide([replica(1, S.ACTIVE)], over).step is Step.NONE


def test_little_load_puts_the_least_busy_replica_to_sleep_if_the_others_can_take_it() -> None:
    calm = [replica(1, S.ACTIVE, inflight=3), replica(2, S.ACTIVE, inflight=1)]
    assert decide(calm, demand(m=3)).replica == "m-r2"
    tight = ScalingPolicy(load_high=0.4, load_low=0.3)
    assert decide(calm, demand(m=3, m_r2=1), policy=tight).step is Step.NONE


def test_who_is_not_asked_for_goes_down_step_by_step() -> None:
    for state, after, step in (
        (S.ACTIVE, 100, Step.SLEEP_1),
        (S.SLEEP_1, 200, Step.SLEEP_2),
        (S.SLEEP_2, 300, Step.UNLOAD),
    ):
        idle = [replica(1, state, idle_since=NOW)]
        assert decide(idle, now=NOW + after - 1).step is Step.NONE
        assert decide(idle, now=NOW + after - 1).due == NOW + after
        assert decide(idle, now=NOW + after).step is step
    assert decide([replica(1, S.SLEEP_2)], now=NOW + 299).due == NOW + 300


def test_who_is_asked_for_does_not_sleep_but_its_sleeping_replica_sinks_on() -> None:
    replicas = [replica(1, S.ACTIVE, inflight=5, idle_since=0), replica(2, S.SLEEP_1, idle_since=0)]
    assert decide(replicas, demand(m=5)).replica == "m-r2"
    assert decide(replicas[:1], demand(m=5)).step is Step.NONE


@pytest.mark.parametrize("inflight", range(0, 41, 3))
def test_a_steady_load_causes_no_change_once_it_was_answered(inflight: int) -> None:
    """However many replicas there were at first: it comes to rest, and stays there."""
    for begin in (1, 2, 3, 4):
        count, changes, now = begin, [], NOW
        for _ in range(50):
            now += 20
            each, rest = divmod(inflight, count)
            replicas = [replica(n, S.ACTIVE, each + (n <= rest), now) for n in range(1, count + 1)]
            asked = demand(asked_at=now, **{r.name.replace("-", "_"): r.inflight for r in replicas})
            step = decide(replicas, asked, now=now).step
            changes.append(step)
            count += {Step.START: 1, Step.SLEEP_1: -1}.get(step, 0)
        assert set(changes[10:]) == {Step.NONE}, (begin, changes)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3), st.integers(0, 3), st.integers(0, 9))))
def test_demand_is_what_the_gateways_said_last(reports: list[tuple[str, int, int, int]]) -> None:
    known, last, now = Demand(asked_at=0.0), dict[str, tuple[int, int]](), 0.0
    for gateway, waiting, inflight, requests in reports:
        now += 1
        seen = Seen(waiting=waiting, inflight={"m": inflight}, requests=requests)
        known = heard(known, gateway, seen, now)
        last[gateway] = (waiting, inflight)
        assert known.waiting == sum(pair[0] for pair in last.values())
        assert known.inflight("m") == sum(pair[1] for pair in last.values())
        assert (known.waiting_since is None) == (known.waiting == 0)
        assert 0 <= known.chance(60, now) <= 1
    for gateway in ("a", "b"):
        known = forgotten(known, gateway)
    assert (known.waiting, known.busy, known.waiting_since) == (0, False, None)


def test_the_rate_fades() -> None:
    known = heard(Demand(asked_at=0.0), "g", Seen(requests=60), now=0.0)
    assert known.rate_at(0.0) == pytest.approx(60 / RATE_OVER_S)
    assert known.rate_at(RATE_OVER_S) == pytest.approx(60 / RATE_OVER_S / math.e)
    assert known.chance(60, 0.0) > known.chance(60, RATE_OVER_S) > 0
