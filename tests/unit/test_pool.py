"""The manager's decisions, told as short stories: events in, orders out."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from modelpool.core.changes import WORKER_BACK_S
from modelpool.core.events import (
    DrainBegun,
    DrainCancelled,
    Event,
    ModelRegistered,
    ModelRemoved,
    ModelReplaced,
    OrderAnswered,
    OrderRefused,
    Report,
    Tick,
    WorkerGone,
    WorkerLeft,
    WorkerReported,
)
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import ORDER_RETRY_S, Dismiss, Effect, Start, Stop
from modelpool.core.placement import GB
from modelpool.core.pool import UNWANTED_GRACE_S, Device, Model, Policy, Pool
from modelpool.core.reconcile import next_deadline, step
from modelpool.core.replicas import free_name
from modelpool.core.room import ever_fits
from tests.unit.controller import checked_step

S = InstanceState
POLICY = Policy(backoff_initial_s=1, backoff_max_s=8, heartbeat_timeout_s=60)


def model(alias: str = "m", *, replicas: int | None = None, key: str = "k", gb: float | None = None) -> Model:
    memory = None if gb is None else int(gb * GB)
    return Model(alias=alias, key=key, engine="fake", created=0, min_replicas=replicas, memory_bytes=memory)


def report(
    instance: str = "m",
    state: S = S.ACTIVE,
    *,
    alias: str = "m",
    key: str = "k",
    reason: str = "",
    permanent: bool = False,
    at: float = 0,
) -> Report:
    return Report(
        instance=instance,
        alias=alias,
        key=key,
        state=state,
        reason=reason,
        permanent=permanent,
        changed_at=at,
        devices=(0,),
    )


def heard(worker: str = "w", *reports: Report, incarnation: str = "1", free_gb: float = 10) -> WorkerReported:
    device = Device(index=0, kind="cpu", total_bytes=20 * GB, free_bytes=int(free_gb * GB))
    return WorkerReported(
        worker_id=worker, incarnation=incarnation, devices=(device,), engines={"fake": ""}, reports=reports
    )


def play(*events: tuple[float, Event], pool: Pool | None = None) -> tuple[Pool, list[Effect]]:
    """The pool after the events, and the effects of the last one."""
    pool = pool or Pool(policy=POLICY)
    effects: tuple[Effect, ...] = ()
    for now, event in events:
        pool, effects = step(pool, event, now)
    return pool, list(effects)


def started(effects: Iterable[Effect]) -> list[tuple[str, str]]:
    return [(each.worker_id, each.instance) for each in effects if isinstance(each, Start)]


def stopped(effects: Iterable[Effect]) -> list[tuple[str, str]]:
    return [(each.worker_id, each.instance) for each in effects if isinstance(each, Stop)]


def test_a_registered_model_is_started_as_soon_as_a_worker_is_there() -> None:
    pool, effects = play((0, ModelRegistered(model())))
    assert effects == []
    assert pool.shortages == {"m": "no worker is registered"}
    pool, effects = play((1, heard()), pool=pool)
    assert started(effects) == [("w", "m")]
    assert pool.shortages == {}


def test_an_order_is_given_once_and_again_only_when_nothing_came_of_it() -> None:
    pool, _ = play((0, ModelRegistered(model())), (1, heard()))
    pool, effects = play((2, heard()), (3, Tick()), pool=pool)
    assert effects == []
    pool, effects = play((1 + ORDER_RETRY_S, Tick()), pool=pool)
    assert started(effects) == [("w", "m")]
    pool, effects = play((7, OrderAnswered(("w", "m"))), (30, Tick()), pool=pool)
    assert effects == []


def test_a_started_instance_that_vanishes_from_two_reports_is_started_anew() -> None:
    pool, _ = play((0, ModelRegistered(model())), (1, heard()), (2, OrderAnswered(("w", "m"))))
    pool, effects = play((3, heard()), pool=pool)
    assert effects == []
    _, effects = play((4, heard()), pool=pool)
    assert started(effects) == [("w", "m")]


def test_a_failed_instance_is_tried_again_after_a_pause_that_doubles() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()))
    now = 0.0
    for failure, pause in enumerate([1, 2, 4, 8, 8], start=1):
        pool, effects = play((now, heard("w", report(state=S.FAILED, reason="boom", at=now + 0.5))), pool=pool)
        assert effects == []
        instance = pool.instances["w", "m"]
        assert (instance.state, instance.failures, instance.reason) == (S.FAILED, failure, "boom")
        _, effects = play((now + pause - 0.1, Tick()), pool=pool)
        assert effects == []
        pool, effects = play((now + pause, Tick()), pool=pool)
        assert started(effects) == [("w", "m")]
        assert pool.instances["w", "m"].reason == "boom"
        now += pause + 1


def test_a_failure_that_will_be_the_same_again_waits_the_longest_time_at_once() -> None:
    wrong = heard("w", report(state=S.FAILED, reason="no such argument", permanent=True, at=0.5))
    pool, effects = play((0, ModelRegistered(model())), (0, heard()), (1, wrong), (1 + 7.9, Tick()))
    assert effects == []
    pool, effects = play((1 + POLICY.backoff_max_s, Tick()), pool=pool)
    assert started(effects) == [("w", "m")]
    trying = heard("w", report(state=S.STARTING, at=10))
    pool, _ = play((10, trying), pool=pool)
    assert (pool.instances["w", "m"].permanent, pool.instances["w", "m"].reason) == (True, "no such argument")
    pool, _ = play((11, heard("w", report(at=11))), pool=pool)
    assert not pool.instances["w", "m"].permanent


def test_an_old_report_of_a_failure_does_not_undo_the_new_order() -> None:
    failed = heard("w", report(state=S.FAILED, reason="boom", at=5))
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (5, failed), (6, Tick()))
    pool, effects = play((6.1, failed), pool=pool)
    assert effects == []
    assert pool.instances["w", "m"].state is S.STARTING
    assert pool.instances["w", "m"].failures == 1


def test_failures_are_forgotten_once_it_has_run_for_a_while() -> None:
    failed = heard("w", report(state=S.FAILED, reason="boom", at=5))
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (5, failed), (6, Tick()), (7, heard("w", report())))
    assert pool.instances["w", "m"].failures == 1
    pool, _ = play((7 + POLICY.backoff_max_s, heard("w", report())), pool=pool)
    assert pool.instances["w", "m"].failures == 0


def test_a_refused_order_backs_off_and_keeps_its_reason() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (0, OrderRefused(("w", "m"), "no")))
    pool, effects = play((0.1, heard()), (0.2, heard()), (0.3, heard()), pool=pool)
    assert effects == []
    assert pool.instances["w", "m"].reason == "no"
    _, effects = play((1, Tick()), pool=pool)
    assert started(effects) == [("w", "m")]


def test_replicas_go_to_different_workers() -> None:
    pool, effects = play((0, heard("a")), (0, heard("b")), (1, ModelRegistered(model(replicas=2))))
    assert started(effects) == [("a", "m"), ("b", "m-r2")]
    _, effects = play((2, ModelRegistered(model("n", replicas=3))), pool=pool)
    assert [instance for _, instance in started(effects)] == ["n", "n-r2", "n-r3"]


def test_memory_promised_to_a_start_is_not_promised_again() -> None:
    pool, effects = play(
        (0, heard(free_gb=10)), (1, ModelRegistered(model("a", gb=6))), (2, ModelRegistered(model("b", gb=6)))
    )
    assert effects == []
    assert pool.shortages == {"b": "w: needs 6.0 GB on device 0, 4.0 GB free of 20.0 GB"}


def test_a_removed_model_is_stopped_at_once_and_the_order_repeated_until_it_is_gone() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (1, heard("w", report())))
    pool, effects = play((2, ModelRemoved("m")), pool=pool)
    assert stopped(effects) == [("w", "m")]
    pool, effects = play((3, heard("w", report(state=S.DRAINING))), pool=pool)
    assert effects == []
    pool, effects = play((2 + ORDER_RETRY_S, heard("w", report())), pool=pool)
    assert stopped(effects) == [("w", "m")]
    pool, effects = play((9, heard()), pool=pool)
    assert (effects, dict(pool.instances)) == ([], {})


def test_a_model_registered_again_waits_for_its_former_instance() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (1, heard("w", report())), (2, ModelRemoved("m")))
    pool, effects = play((3, ModelRegistered(model(key="k2"))), pool=pool)
    assert started(effects) == []
    assert pool.shortages == {"m": "waits for its former instance to end"}
    _, effects = play((4, heard()), pool=pool)
    assert started(effects) == [("w", "m")]


@pytest.mark.parametrize("state", [S.ACTIVE, S.SLEEP_1, S.DRAINING])
def test_what_was_there_and_is_no_more_is_gone_at_once_and_comes_back_where_it_is_wanted(state: S) -> None:
    there = (
        (0, ModelRegistered(model(replicas=1))),
        (0, heard()),
        (1, heard("w", report())),
        (2, heard("w", report(state=state))),
    )
    _, effects = play(*there, (3, heard("w")))
    assert [type(each) for each in effects] == [Start]


def test_what_nobody_registered_is_left_alone_for_a_grace() -> None:
    pool, effects = play((0, heard("w", report())), (UNWANTED_GRACE_S - 1, heard("w", report())))
    assert effects == []
    _, effects = play((UNWANTED_GRACE_S, heard("w", report())), pool=pool)
    assert stopped(effects) == [("w", "m")]


def test_a_worker_that_ends_loses_its_instances_but_no_model() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (1, heard("w", report())))
    pool, effects = play((2, WorkerGone("w", "1", "its process has ended")), pool=pool)
    assert (effects, dict(pool.instances), list(pool.models)) == ([], {}, ["m"])
    _, effects = play((3, heard("w", incarnation="2")), pool=pool)
    assert started(effects) == [("w", "m")]


def test_a_worker_that_ended_may_be_back_for_a_while() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (5, WorkerGone("w", "1", "its process has ended")))
    assert pool.missed["w"] == next_deadline(pool) == 5 + WORKER_BACK_S
    back, _ = play((6, heard(incarnation="2")), pool=pool)
    assert not back.missed
    pool, _ = play((5 + WORKER_BACK_S, Tick()), pool=pool)
    assert (pool.missed, next_deadline(pool)) == ({}, None)
    assert not pool.workers["w"].alive


def test_a_worker_that_said_goodbye_is_forgotten() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard("a")), (1, heard("a", report())), (2, heard("b")))
    pool, effects = play((3, WorkerLeft("a", "an earlier one")), pool=pool)
    assert (effects, list(pool.workers)) == ([], ["a", "b"])
    pool, effects = play((3, WorkerLeft("a", "1")), pool=pool)
    assert list(pool.workers) == ["b"]
    assert started(effects) == [("b", "m")]


def test_what_no_worker_could_take_even_if_it_were_empty_is_known() -> None:
    others = [(0.0, ModelRegistered(model("n", gb=15)))]
    pool, _ = play((0, heard("a")), (0, heard("b")), *others)
    assert ever_fits(pool, model(gb=20))
    assert ever_fits(pool, model(gb=10, replicas=4))
    assert not ever_fits(pool, model(gb=20.1))
    assert not ever_fits(pool, model(gb=10, replicas=5))
    assert not ever_fits(pool, replace(model(), engine="vllm"))
    assert ever_fits(Pool(policy=POLICY), model(gb=1000))


def test_news_of_an_earlier_process_of_a_worker_changes_nothing() -> None:
    pool, _ = play(
        (0, ModelRegistered(model())), (0, heard(incarnation="2")), (1, heard("w", report(), incarnation="2"))
    )
    after, effects = play((2, WorkerGone("w", "1", "late")), pool=pool)
    assert effects == []
    assert after.instances == pool.instances


def test_a_silent_worker_gets_no_orders_but_keeps_its_routes() -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard("a")), (1, heard("a", report())))
    pool, effects = play((61, Tick()), pool=pool)
    assert effects == []
    assert not pool.workers["a"].alive
    assert pool.instances["a", "m"].state is S.ACTIVE
    pool, effects = play((62, heard("b")), pool=pool)
    assert started(effects) == [("b", "m-r2")]
    pool, effects = play((63, heard("b", report("m-r2"))), (64, heard("a", report())), pool=pool)
    assert effects == []
    _, effects = play((63 + POLICY.scaling.cooldown_s, Tick()), pool=pool)
    assert stopped(effects) == [("b", "m-r2")]


def test_a_new_manager_adopts_what_runs_and_waits_for_the_workers_it_knew() -> None:
    pool = Pool(policy=POLICY, awaited=frozenset({"a", "b"}), recover_until=10)
    pool, effects = play((0, ModelRegistered(model())), (1, heard("a")), pool=pool)
    assert effects == []
    assert pool.recovering
    pool, effects = play((2, heard("b", report())), pool=pool)
    assert effects == []
    assert not pool.recovering


def test_a_new_manager_does_not_wait_for_ever() -> None:
    pool = Pool(policy=POLICY, awaited=frozenset({"b"}), recover_until=10)
    pool, _ = play((0, ModelRegistered(model())), (1, heard("a")), pool=pool)
    assert next_deadline(pool) == 10
    _, effects = play((10, Tick()), pool=pool)
    assert started(effects) == [("a", "m")]


def test_an_instance_of_an_older_body_of_the_alias_is_replaced() -> None:
    pool, effects = play((0, ModelRegistered(model(key="new"))), (1, heard("w", report(key="old"))))
    assert stopped(effects) == [("w", "m")]
    _, effects = play((2, heard()), pool=pool)
    assert started(effects) == [("w", "m")]


def test_replica_names_fill_the_gaps() -> None:
    assert free_name("m", []) == "m"
    assert free_name("m", ["m", "m-r3"]) == "m-r2"


# ---------------------------------------------------------------- any order of events


class World:
    """Workers that carry out orders, in the hands of hypothesis: they die, fail, lose orders and report late."""

    def __init__(self) -> None:
        self.pool = Pool(policy=POLICY)
        self.now = 0.0
        self.running: dict[str, dict[str, Report]] = {"a": {}, "b": {}}
        self.incarnation = {"a": 1, "b": 1}
        self.orders: list[Effect] = []

    def happens(self, event: Event) -> None:
        self.pool, effects = checked_step(self.pool, event, self.now)
        self.orders += effects

    def report(self, worker: str) -> None:
        reports = tuple(self.running[worker].values())
        self.happens(heard(worker, *reports, incarnation=str(self.incarnation[worker])))

    def carry_out(self, keys: dict[str, str]) -> None:
        orders, self.orders = self.orders, []
        for order in orders:
            mine = self.running[order.worker_id]
            if isinstance(order, Stop):
                mine.pop(order.instance, None)
                continue
            if isinstance(order, Dismiss):
                continue  # it would refuse while it runs something
            assert isinstance(order, Start)
            known = mine.get(order.instance)
            if order.alias in keys and (known is None or known.state is S.FAILED):
                mine[order.instance] = report(order.instance, alias=order.alias, key=keys[order.alias], at=self.now)

    def settle(self, keys: dict[str, str]) -> None:
        """Nothing goes wrong any more: all report, all orders are carried out, time passes."""
        for _ in range(40):
            self.now += 3
            for worker in self.running:
                self.report(worker)
            self.happens(Tick())
            self.carry_out(keys)


actions = st.lists(
    st.tuples(
        st.sampled_from(
            ["add", "replace", "remove", "report", "die", "fail", "obey", "forget", "wait", "drain", "keep"]
        ),
        st.sampled_from(["a", "b"]),
        st.sampled_from(["m", "n"]),
        st.integers(1, 3),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(actions)
def test_whatever_happened_what_is_wanted_runs_in_the_end_and_nothing_else(
    script: list[tuple[str, str, str, int]],
) -> None:
    world = World()
    wanted: dict[str, int] = {}
    keys: dict[str, str] = {}
    for action, worker, alias, number in script:
        world.now += 0.7
        if action == "add" and alias not in wanted:
            wanted[alias], keys[alias] = number, f"{alias}{number}"
            world.happens(ModelRegistered(model(alias, replicas=number, key=keys[alias])))
        elif action == "replace" and alias in wanted:
            before = world.pool.models[alias]
            keys[alias] = f"{alias}{len(before.replaces)}{number}"
            after = replace(
                model(alias, replicas=wanted[alias], key=keys[alias]), replaces=(before.key, *before.replaces)
            )
            if before.key != keys[alias]:
                world.happens(ModelReplaced(after))
        elif action == "drain":
            world.happens(DrainBegun(worker))
        elif action == "keep":
            world.happens(DrainCancelled(worker))
        elif action == "remove" and alias in wanted:
            del wanted[alias], keys[alias]
            world.happens(ModelRemoved(alias))
        elif action == "report":
            world.report(worker)
        elif action == "die":
            world.happens(WorkerGone(worker, str(world.incarnation[worker]), "died"))
            world.incarnation[worker] += 1
            world.running[worker] = {}
        elif action == "fail":
            mine = world.running[worker]
            for name, each in mine.items():
                mine[name] = report(name, S.FAILED, alias=each.alias, key=each.key, reason="x", at=world.now)
        elif action == "obey":
            world.carry_out(keys)
        elif action == "forget":
            world.orders.clear()
        elif action == "wait":
            world.now += 20 * number
            world.happens(Tick())
    if len(world.pool.draining) == len(world.running):
        world.happens(DrainCancelled("a"))
    world.settle(keys)
    assert not any(world.running[worker] for worker in world.pool.draining)
    running = [each for mine in world.running.values() for each in mine.values()]
    assert {alias: sum(each.alias == alias for each in running) for alias in wanted} == wanted
    assert len(running) == sum(wanted.values())
    assert all(each.state is S.ACTIVE and each.key == keys[each.alias] for each in running)
    deadline = next_deadline(world.pool)
    assert deadline is not None
    assert deadline > world.now


@pytest.mark.parametrize("state", [S.DRAINING, S.SLEEP_1, S.SLEEP_2, S.WAKING])
def test_an_instance_that_sleeps_is_a_replica_like_others_nothing_is_started_or_stopped_for_it(state: S) -> None:
    pool, _ = play((0, ModelRegistered(model())), (0, heard()))
    for now in (1.0, 2.0, 500.0):
        pool, effects = play((now, heard("w", report(state=state, at=1))), (now, Tick()), pool=pool)
        assert effects == []
    assert pool.instances["w", "m"].state is state
    assert pool.shortages == {}
    # A manager that has just started finds it so, and leaves it so.
    adopted, effects = play((0, ModelRegistered(model())), (1, heard("w", report(state=state, at=1))))
    assert effects == []
    assert adopted.instances["w", "m"].state is state


def test_one_that_somebody_else_put_to_sleep_is_idle_from_then_on() -> None:
    """Not since ever: it would go on to the next level at once."""
    pool, _ = play((0, ModelRegistered(model())), (0, heard()), (1, heard("w", report(at=1))))
    for now, state in ((10_000.0, S.DRAINING), (10_001.0, S.SLEEP_1), (10_002.0, S.SLEEP_1)):
        pool, effects = play((now, heard("w", report(state=state, at=now))), pool=pool)
        assert effects == []
    assert pool.instances["w", "m"].idle_since == 10_000.0


def test_a_wake_that_fails_is_a_failure_like_others() -> None:
    asleep = heard("w", report(state=S.SLEEP_2, at=1))
    failed = heard("w", report(state=S.FAILED, reason="wrong after waking", at=3))
    pool, effects = play((0, ModelRegistered(model())), (0, heard()), (1, asleep), (3, failed))
    assert effects == []
    pool, effects = play((4, Tick()), pool=pool)
    assert started(effects) == [("w", "m")]
    assert pool.instances["w", "m"].reason == "wrong after waking"


def test_of_too_many_replicas_those_that_sleep_go_first() -> None:
    both = (report(state=S.SLEEP_1), report("m-r2"))
    _, effects = play((0, ModelRegistered(replace(model(), max_replicas=1))), (1, heard("w", *both)))
    assert stopped(effects) == [("w", "m")]


@pytest.mark.parametrize("state", [S.SLEEP_1, S.SLEEP_2, S.WAKING])
def test_a_sleeper_of_a_model_that_was_removed_is_stopped(state: S) -> None:
    pool, _ = play((0, ModelRegistered(model())), (1, heard("w", report(state=state))))
    _, effects = play((2, ModelRemoved("m")), pool=pool)
    assert stopped(effects) == [("w", "m")]
