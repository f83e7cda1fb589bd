"""The controller as stories tell it: models on a worker with one accelerator, what is heard of them, what it does.

And the controller checked at every step: looking only at what may have changed decides as looking at all does.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from modelpool.core.changes import apply
from modelpool.core.demand import Seen
from modelpool.core.events import DemandHeard, Event, ModelChanged, ModelRegistered, Report, WorkerReported
from modelpool.core.ledger import ledger
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import Effect, Sleep, Start, Stop, Wake
from modelpool.core.placement import GB
from modelpool.core.pool import Device, Model, Policy, Pool, instances_on
from modelpool.core.reconcile import reconcile, step
from modelpool.core.scaling import ScalingPolicy

S = InstanceState
POLICY = Policy(
    scaling=ScalingPolicy(idle_sleep_1_s=100, idle_sleep_2_s=200, idle_unload_s=300, cooldown_s=10),
    min_residence_s=5,
    heartbeat_timeout_s=1e9,
)
TOTAL = 10 * GB


def model(alias: str = "m", gb: int = 6, *, least: int | None = None, **fields: object) -> Model:
    one = Model(alias=alias, key=alias, engine="fake", created=0, memory_bytes=gb * GB, min_replicas=least)
    return replace(one, **fields)


def report(alias: str = "m", state: S = S.ACTIVE, *, gb: float = 6, held: float = 0, sleeps: bool = True) -> Report:
    return Report(
        instance=alias,
        alias=alias,
        key=alias,
        state=state,
        devices=(0,),
        memory_bytes=int(gb * GB),
        held_bytes=int(held * GB),
        capacity=10,
        levels=(1, 2) if sleeps else (),
    )


def heard(*reports: Report) -> WorkerReported:
    used = sum(each.held_bytes if each.state in (S.SLEEP_1, S.SLEEP_2) else each.memory_bytes for each in reports)
    device = Device(index=0, kind="cuda", total_bytes=TOTAL, free_bytes=TOTAL - used)
    return WorkerReported(worker_id="w", incarnation="1", devices=(device,), engines={"fake": ""}, reports=reports)


def asked(*aliases: str, **waiting: int) -> DemandHeard:
    """So many wait for each model; one, where no number is given."""
    waiting = dict.fromkeys(aliases, 1) | waiting
    return DemandHeard("g", {alias: Seen(waiting=count, requests=count) for alias, count in waiting.items()})


def serving(**inflight: int) -> DemandHeard:
    seen = {alias: Seen(inflight={alias: count}, requests=count) for alias, count in inflight.items()}
    return DemandHeard("g", seen)


def play(*events: tuple[float, Event], pool: Pool | None = None) -> tuple[Pool, Sequence[Effect]]:
    """The pool after the events, and the effects of the last one."""
    pool = pool or Pool(policy=POLICY)
    effects: Sequence[Effect] = ()
    for now, event in events:
        pool, effects = step(pool, event, now)
    return pool, effects


def told(effects: Sequence[Effect]) -> list[tuple[str, str]]:
    words = {Start: "start", Stop: "stop", Wake: "wake"}
    return [
        (f"sleep {each.level}" if isinstance(each, Sleep) else words[type(each)], each.instance) for each in effects
    ]


def up(*aliases: str, gb: int = 6) -> Pool:
    """At time 0 these run, and nobody asks for them."""
    events: list[tuple[float, Event]] = [(0, ModelRegistered(model(alias, gb))) for alias in aliases]
    pool, _ = play(*events, (0, heard(*(report(alias, gb=gb) for alias in aliases))))
    return pool


def changed(alias: str, **settings: object) -> ModelChanged:
    return ModelChanged(replace(model(alias), **settings))


def checked_step(pool: Pool, event: Event, now: float) -> tuple[Pool, Sequence[Effect]]:
    """`step`, which must decide as it does when it looks at every model, and must keep its indexes right.

    But for those who wait for room: these are looked at once a second. Nor is said at once what those wait for who give
    way in this very round: they are looked at in the next.
    """
    applied = apply(pool, event, now)
    after, effects = reconcile(applied, now)
    everything = frozenset(applied.models.keys() | applied.of_model.keys())
    touched = (everything - applied.shortages.keys()) | applied.touched
    whole, all_effects = reconcile(replace(applied, touched=touched), now)
    assert effects == all_effects
    assert after.instances == whole.instances
    later = after.touched - applied.touched
    assert {each: after.shortages.get(each) for each in everything - later} == {
        each: whole.shortages.get(each) for each in everything - later
    }
    assert after.hopeless - later == whole.hopeless - later
    for index, group in (
        (after.of_model, lambda key: after.instances[key].alias),
        (after.on_worker, lambda key: key[0]),
    ):
        assert {(name, key) for name, keys in index.items() for key in keys} == {
            (group(key), key) for key in after.instances
        }
        assert sum(map(len, index.values())) == len(after.instances)
    for worker_id, books in after.ledgers.items():
        assert books == ledger(after.workers[worker_id], instances_on(after, worker_id))
    return after, effects
