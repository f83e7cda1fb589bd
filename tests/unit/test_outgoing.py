"""Rolling changes: what goes is let go once others are in its place."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from modelpool.core.availability import is_routed
from modelpool.core.changes import WORKER_BACK_S
from modelpool.core.demand import Demand, Seen
from modelpool.core.events import (
    DemandHeard,
    DrainBegun,
    DrainCancelled,
    ModelRegistered,
    ModelReplaced,
    OrderAnswered,
    Report,
    Tick,
    WorkerGone,
    WorkerLeft,
)
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import ORDER_RETRY_S, Dismiss, Effect, Sleep, Stop
from modelpool.core.outgoing import UNHURRIED_S, needed
from modelpool.core.pool import Pool
from modelpool.core.reconcile import next_deadline
from modelpool.core.scaling import Replica, ScalingPolicy
from tests.unit.test_pool import POLICY, heard, model, play, report, started, stopped

S = InstanceState


def asked(waiting: int = 0, requests: int = 1, **inflight: int) -> DemandHeard:
    return DemandHeard("g", {"m": Seen(waiting=waiting, inflight=inflight, requests=requests)})


def two_workers(*reports: Report, other_gb: float = 10, gb: float = 2, asking: DemandHeard | None = None) -> Pool:
    """A model that runs so on `w`, and is asked for at 10; `x` has that much memory free."""
    pool, _ = play(
        (10, ModelRegistered(model(gb=gb), resting=True)),
        (10, asking or asked()),
        (10, heard("w", *reports)),
        (10, heard("x", free_gb=other_gb)),
    )
    return pool


def dismissed(effects: list[Effect]) -> list[str]:
    return [each.worker_id for each in effects if isinstance(each, Dismiss)]


def routed(pool: Pool) -> set[tuple[str, str]]:
    return {key for key, each in pool.instances.items() if is_routed(pool, each)}


def test_a_worker_is_drained_without_a_moment_in_which_its_model_is_not_served() -> None:
    pool, effects = play((11, DrainBegun("w")), pool=two_workers(report()))
    assert (started(effects), stopped(effects)) == ([("x", "m-r2")], [])
    pool, effects = play((12, OrderAnswered(("x", "m-r2"))), (13, heard("x", report("m-r2", S.STARTING))), pool=pool)
    assert effects == []
    assert routed(pool) == {("w", "m")}
    pool, effects = play((14, heard("x", report("m-r2"))), pool=pool)
    assert effects == [Stop(worker_id="w", instance="m", reason="w is being drained", drain_s=UNHURRIED_S)]
    assert routed(pool) == {("x", "m-r2")}
    pool, effects = play((15, heard("w", report(state=S.DRAINING))), pool=pool)
    assert effects == []
    pool, effects = play((16, heard("w")), pool=pool)
    assert dismissed(effects) == ["w"]
    pool, effects = play((17, heard("w")), pool=pool)
    assert effects == []
    pool, effects = play((16 + ORDER_RETRY_S, Tick()), pool=pool)
    assert dismissed(effects) == ["w"]
    pool, effects = play((30, WorkerLeft("w", "1")), (31, heard("w")), pool=pool)
    assert not pool.draining
    assert routed(pool) == {("x", "m-r2")}


def test_requests_of_what_goes_are_never_hurried_by_an_order_that_is_repeated() -> None:
    pool, _ = play((11, DrainBegun("w")), (12, heard("x", report("m-r2"))), pool=two_workers(report()))
    pool, effects = play((13, DrainCancelled("w")), (18, heard("w", report(state=S.DRAINING))), pool=pool)
    assert effects == [Stop(worker_id="w", instance="m", reason="asked again", drain_s=UNHURRIED_S)]


def test_while_it_ends_another_replica_does_not_wait_for_its_name() -> None:
    pool, _ = play((11, DrainBegun("w")), (12, heard("x", report("m-r2"))), pool=two_workers(report()))
    _, effects = play((20, asked(waiting=3, **{"m-r2": 8})), (26, asked(waiting=3, **{"m-r2": 8})), pool=pool)
    assert started(effects) == [("x", "m-r3")]


def test_what_is_used_and_fits_nowhere_else_stays_and_it_is_said_why() -> None:
    pool, effects = play((11, DrainBegun("w")), (12, Tick()), pool=two_workers(report(), other_gb=1))
    assert effects == []
    assert routed(pool) == {("w", "m")}
    assert "w: it is being drained" in pool.shortages["m"]
    assert "x: needs 2.0 GB on device 0, 1.0 GB free" in pool.shortages["m"]
    pool, effects = play((13, heard("x", free_gb=9)), pool=pool)
    assert started(effects) == [("x", "m-r2")]


def test_what_nobody_asks_for_and_fits_nowhere_else_is_ended() -> None:
    pool, _ = play((11, DrainBegun("w")), pool=two_workers(report(), other_gb=1))
    idle = 10 + POLICY.scaling.idle_sleep_1_s
    _, effects = play((idle - 1, heard("w", report())), (idle, Tick()), pool=pool)
    assert stopped(effects) == [("w", "m")]


@pytest.mark.parametrize("state", [S.SLEEP_1, S.SLEEP_2])
def test_a_sleeper_moves_where_there_is_room_for_it_else_it_ends(state: S) -> None:
    pool = two_workers(report(state=state))
    _, effects = play((1000, DrainBegun("w")), pool=pool)
    assert (started(effects), stopped(effects)) == ([("x", "m-r2")], [("w", "m")])
    pool = two_workers(report(state=state), other_gb=1)
    pool, effects = play((1000, DrainBegun("w")), pool=pool)
    assert (started(effects), stopped(effects)) == ([], [("w", "m")])


def test_what_failed_on_a_worker_that_is_drained_is_started_elsewhere() -> None:
    pool, effects = play(
        (11, DrainBegun("w")), (12, heard("w", report(state=S.FAILED, at=1))), pool=two_workers(report())
    )
    assert stopped(effects) == [("w", "m")]
    assert {key for key, each in pool.instances.items() if not each.stopping} == {("x", "m-r2")}


def test_nothing_new_comes_to_a_worker_that_is_drained() -> None:
    pool, effects = play((0, heard("w")), (1, DrainBegun("w")), (2, ModelRegistered(model(gb=1))))
    assert started(effects) == []
    assert pool.shortages == {"m": "w: it is being drained"}
    pool, effects = play((3, DrainCancelled("w")), pool=pool)
    assert started(effects) == [("w", "m")]


def test_a_drain_that_is_cancelled_leaves_all_as_it_is_but_the_surplus() -> None:
    pool, _ = play((11, DrainBegun("w")), (12, OrderAnswered(("x", "m-r2"))), pool=two_workers(report()))
    pool, effects = play((13, DrainCancelled("w")), pool=pool)
    assert effects == []
    pool, effects = play((14, heard("x", report("m-r2"))), pool=pool)
    assert effects == []
    assert routed(pool) == {("w", "m"), ("x", "m-r2")}


def test_of_several_all_go_at_once_that_the_load_does_not_need() -> None:
    two = [replace(report(name), capacity=10) for name in ("m", "m-r2")]
    pool = two_workers(*two, asking=asked(**{"m": 4, "m-r2": 3}))
    pool, effects = play((11, DrainBegun("w")), pool=pool)
    assert started(effects) == [("x", "m-r3")]
    _, effects = play((12, heard("x", replace(report("m-r3"), capacity=10))), pool=pool)
    assert sorted(stopped(effects)) == [("w", "m"), ("w", "m-r2")]


def test_a_worker_that_ended_without_a_word_is_dismissed_too() -> None:
    pool, effects = play((11, DrainBegun("w")), (12, WorkerGone("w", "1", "its process has ended")), pool=two_workers())
    assert dismissed(effects) == ["w"] or dismissed(play((16, Tick()), pool=pool)[1]) == ["w"]


def test_a_drain_outlives_a_worker_that_dies_in_the_middle_of_it_and_is_started_again() -> None:
    gone = WorkerGone("w", "1", "its process has ended")
    pool, effects = play((11, DrainBegun("w")), (12, gone), (13, Tick()), pool=two_workers(report()))
    assert dismissed(effects) == []
    back, effects = play((14, heard("w", incarnation="2")), pool=pool)
    assert (dismissed(effects), list(back.draining)) == (["w"], ["w"])
    due = next_deadline(pool)
    assert due is not None
    assert 13 < due <= 12 + WORKER_BACK_S
    _, effects = play((12 + WORKER_BACK_S, Tick()), pool=pool)
    assert dismissed(effects) == ["w"]


def new(alias: str = "m", *, replaces: tuple[str, ...] = ("k",), gb: float = 2) -> ModelReplaced:
    return ModelReplaced(replace(model(alias, key="k2", gb=gb), replaces=replaces))


def test_a_model_is_replaced_without_a_moment_in_which_it_is_not_served() -> None:
    pool, effects = play((11, new()), pool=two_workers(report(), other_gb=0))
    assert (started(effects), stopped(effects)) == ([("w", "m-r2")], [])
    pool, effects = play((12, heard("w", report(), report("m-r2", S.STARTING, key="k2"))), pool=pool)
    assert routed(pool) == {("w", "m")}
    pool, effects = play((13, heard("w", report(), report("m-r2", key="k2"))), pool=pool)
    stop = Stop(worker_id="w", instance="m", reason="its model was registered anew", drain_s=UNHURRIED_S)
    assert effects == [stop]
    assert routed(pool) == {("w", "m-r2")}


def test_of_several_that_are_all_needed_one_goes_for_one_that_came_where_there_is_no_room_for_all() -> None:
    old, newer = (report(), report("m-r2")), (report("m-r3", key="k2"), report("m", key="k2"))
    pool = two_workers(*old, other_gb=0, asking=asked(**{"m": 1, "m-r2": 1}))
    pool, _ = play((11, heard("w", *old, free_gb=3)), pool=pool)
    pool, effects = play((12, new()), pool=pool)
    assert started(effects) == [("w", "m-r3")]
    pool, effects = play((13, heard("w", *old, newer[0], free_gb=1)), pool=pool)
    assert stopped(effects) == [("w", "m")]
    ending = (report(state=S.DRAINING), old[1], newer[0])
    pool, effects = play((14, Tick()), (15, heard("w", *ending, free_gb=1)), pool=pool)
    assert routed(pool) == {("w", "m-r2"), ("w", "m-r3")}
    pool, effects = play((16, heard("w", old[1], newer[0], free_gb=3)), pool=pool)
    assert (started(effects), stopped(effects)) == ([("w", "m")], [])
    pool, effects = play((17, heard("w", old[1], *newer, free_gb=1)), pool=pool)
    assert (started(effects), stopped(effects)) == ([], [("w", "m-r2")])


def test_where_the_new_one_fails_the_old_one_stays_also_under_a_new_manager() -> None:
    pool, _ = play((11, new()), pool=two_workers(report(), other_gb=0))
    failed = report("m-r2", S.FAILED, key="k2", reason="no such file", permanent=True, at=1)
    pool, effects = play((12, heard("w", report(), failed)), (400, heard("w", report(), failed)), pool=pool)
    assert stopped(effects) == []
    assert routed(pool) == {("w", "m")}
    again = replace(model(key="k2", gb=2), replaces=("k",))
    pool, effects = play((0, ModelRegistered(again)), (1, heard("w", report())), (2, asked(m=1)))
    assert stopped(effects) == []
    assert routed(pool) == {("w", "m")}
    back = ModelReplaced(replace(model(gb=2), replaces=("k2",)))
    pool, effects = play((3, heard("w", report(), failed)), (4, back), pool=pool)
    assert stopped(effects) == [("w", "m-r2")]
    assert routed(pool) == {("w", "m")}


def test_what_is_of_no_known_form_of_the_model_is_ended_at_once() -> None:
    _, effects = play((0, heard("w", report(key="old"))), (1, ModelRegistered(model(gb=2))))
    assert stopped(effects) == [("w", "m")]


def test_without_room_for_both_the_old_one_stays_and_it_is_said_why() -> None:
    pool = two_workers(report(), other_gb=0)
    pool, effects = play((11, heard("w", report(), free_gb=1)), (12, new()), pool=pool)
    assert effects == []
    assert "w: needs 2.0 GB on device 0, 1.0 GB free" in pool.shortages["m"]
    assert routed(pool) == {("w", "m")}


def test_a_replaced_model_forgets_what_was_learned_of_the_one_before() -> None:
    pool, _ = play((11, new()), pool=two_workers(report()))
    assert pool.learned["m"] == {}


@pytest.mark.parametrize(
    ("asked_for", "most", "count"), [(0, 4, 1), (5, 4, 1), (6, 4, 2), (11, 4, 2), (12, 4, 3), (99, 4, 3), (99, 2, 2)]
)
def test_so_many_are_needed_as_the_load_asks_for(asked_for: int, most: int, count: int) -> None:
    serving = [Replica(name=f"m-{n}", number=n, state=S.ACTIVE, idle_since=-math.inf, capacity=8) for n in range(3)]
    demand = Demand(asked_at=0, gateways={"g": Seen(inflight={"m": asked_for})})
    assert needed(ScalingPolicy(max_replicas=most), demand, serving) == count


def test_a_sleeper_of_before_may_give_way_to_the_new_one_that_is_asked_for() -> None:
    pool = two_workers(report(state=S.SLEEP_1), other_gb=0)
    sleeper = replace(report(state=S.SLEEP_1), memory_bytes=2 * 10**9, held_bytes=10**9, levels=(1, 2))
    pool, _ = play((11, heard("w", sleeper, free_gb=1)), (12, new()), pool=pool)
    _, effects = play((20, asked(waiting=1)), pool=pool)
    assert [type(each) for each in effects] in ([Stop], [Sleep])
