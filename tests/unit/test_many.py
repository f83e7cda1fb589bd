"""The controller where there is very much of everything: a bounded part of it at once, and nobody forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from modelpool.core.changes import registered
from modelpool.core.demand import Seen
from modelpool.core.events import DemandHeard, GatewayGone, ModelRegistered, Report, Tick, WorkerReported
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import Effect, Sleep, Start, Stop
from modelpool.core.placement import GB
from modelpool.core.pool import Device, Model, Policy, Pool
from modelpool.core.reconcile import next_deadline, step

S = InstanceState
POLICY = Policy(min_residence_s=5, heartbeat_timeout_s=1e9)
WORKERS = 60


def model(alias: str, gb: int = 8) -> Model:
    return Model(alias=alias, key=alias, engine="fake", created=0, memory_bytes=gb * GB)


def heard(worker: str, *aliases: str, free: int = 2) -> WorkerReported:
    return WorkerReported(
        worker_id=worker,
        incarnation="1",
        devices=(Device(index=0, kind="cuda", total_bytes=10 * GB, free_bytes=free * GB),),
        engines={"fake": ""},
        reports=tuple(
            Report(
                instance=alias,
                alias=alias,
                key=alias,
                state=S.ACTIVE,
                devices=(0,),
                memory_bytes=8 * GB,
                held_bytes=8 * GB,
                levels=(1, 2),
            )
            for alias in aliases
        ),
    )


def asked(*aliases: str) -> DemandHeard:
    return DemandHeard("g", {alias: Seen(waiting=1, requests=1) for alias in aliases})


def settled(pool: Pool, now: float) -> tuple[Pool, list[Effect]]:
    """Once nothing is due any more, with all that was ordered."""
    effects: list[Effect] = []
    while (due := next_deadline(pool)) is not None and due <= now:
        pool, more = step(pool, Tick(), now)
        effects += more
    return pool, effects


def full(*more: str) -> Pool:
    """On each of many workers a model that fills it; these have no room."""
    known = [ModelRegistered(model(f"m{number}"), resting=True) for number in range(WORKERS)]
    pool = registered(Pool(policy=POLICY), [*known, *(ModelRegistered(model(alias)) for alias in more)], 0.0)
    for number in range(WORKERS):
        pool, effects = step(pool, heard(f"w{number}", f"m{number}"), 0.0)
        assert not effects
    return settled(pool, 100.0)[0]


def given_up(effects: Sequence[Effect]) -> list[str]:
    return [each.instance for each in effects if isinstance(each, (Sleep, Stop))]


def test_while_room_is_being_made_on_one_worker_nobody_gives_way_on_another() -> None:
    pool, effects = step(full("x"), asked("x"), 100.0)
    (leaving,) = given_up(effects)
    for second in range(1, 5):
        pool, effects = step(pool, asked("x"), 100.0 + second)
        assert effects == ()
    number = leaving.removeprefix("m")
    pool, effects = step(pool, heard(f"w{number}", free=10), 105.0)
    assert [(type(each), each.worker_id) for each in effects] == [(Start, f"w{number}")]


def test_of_very_many_who_lack_room_all_are_looked_at_and_one_takes_what_becomes_free() -> None:
    lacking = [f"x{number}" for number in range(500)]
    pool = full(*lacking)
    assert pool.shortages.keys() == set(lacking)
    now, effects = 200.0, list[Effect]()
    for number in (7, 8, 7, 8):  # what is missing twice has ended
        pool, more = step(pool, heard(f"w{number}", free=10), now)
        effects += more
    # Not later than those before them were looked at.
    while (due := next_deadline(pool)) is not None and due < now + 4:
        pool, more = step(pool, Tick(), max(now, due))
        effects += more
    assert sorted(each.worker_id for each in effects if isinstance(each, Start)) == ["w7", "w8"]


def test_models_that_are_registered_together_are_all_started_in_as_many_steps_as_it_takes() -> None:
    pool = Pool(policy=POLICY)
    for number in range(3):
        device = Device(index=0, kind="cuda", total_bytes=1000 * GB, free_bytes=1000 * GB)
        pool, _ = step(pool, replace(heard(f"w{number}"), devices=(device,)), 0.0)
    known = [ModelRegistered(model(f"m{number}", gb=1)) for number in range(1200)]
    pool, first = step(registered(pool, known, 1.0), Tick(), 1.0)
    assert 0 < len(first) < 100
    _, others = settled(pool, 1.0)
    assert len({each.instance for each in (*first, *others)}) == len(first) + len(others) == 1200


def test_a_gateway_that_says_nothing_more_of_a_model_is_asked_no_more_of_it() -> None:
    pool, _ = step(full("x"), DemandHeard("g", {"m1": Seen(inflight={"m1": 2}), "m2": Seen(requests=1)}), 100.0)
    assert pool.heard_of == {"g": {"m1"}}
    pool, _ = step(pool, DemandHeard("h", {"m1": Seen(inflight={"m1": 1})}), 101.0)
    assert pool.demand["m1"].total == 3
    pool, _ = step(pool, GatewayGone("g"), 102.0)
    assert pool.demand["m1"].total == 1
    pool, _ = step(pool, DemandHeard("h", {}), 103.0)
    assert (pool.demand["m1"].gateways, pool.heard_of) == ({}, {})
