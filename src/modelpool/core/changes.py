"""How what happens changes what the manager knows. What it does about it is in core/reconcile.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from modelpool.core.demand import Demand, Seen, forgotten, heard
from modelpool.core.events import (
    DemandHeard,
    DrainBegun,
    DrainCancelled,
    Event,
    GatewayGone,
    ModelChanged,
    ModelRegistered,
    ModelRemoved,
    ModelReplaced,
    OrderAnswered,
    OrderPostponed,
    OrderRefused,
    Tick,
    WorkerGone,
    WorkerLeft,
    WorkerReported,
)
from modelpool.core.pool import (
    UNWANTED_GRACE_S,
    Instance,
    Pool,
    change,
    instances_of,
    instances_on,
    is_meant_up,
    key_of,
    put,
    room_changed,
    touched,
    with_instances,
    without,
)
from modelpool.core.reports import failed, reported
from modelpool.core.scaling import LEVEL, Step

WORKER_BACK_S = 30.0
"""A worker whose process has ended is started again by what keeps it, and imports its engines: within this."""
_NOTHING = Seen()


def apply(pool: Pool, event: Event, now: float) -> Pool:
    match event:
        case ModelRegistered():
            return registered(pool, [event], now)
        case ModelChanged(model):
            changed = replace(pool, models={**pool.models, model.alias: model}, news=pool.news | {model.alias})
            return touched(changed, [model.alias])
        case ModelReplaced(model):
            return replace(
                touched(pool, [model.alias]),
                models={**pool.models, model.alias: model},
                learned={**pool.learned, model.alias: {}},
                wanted_up=pool.wanted_up | {model.alias},
                news=pool.news | {model.alias},
            )
        case ModelRemoved(alias):
            return _removed(pool, alias, now)
        case WorkerReported():
            return reported(pool, event, now)
        case WorkerGone():
            return _gone(pool, event, now)
        case WorkerLeft(worker_id, incarnation):
            worker = pool.workers.get(worker_id)
            if worker is None or worker.incarnation != incarnation:
                return pool
            return replace(
                _without_instances(pool, worker_id),
                workers=without(pool.workers, worker_id),
                missed=without(pool.missed, worker_id),
                draining=without(pool.draining, worker_id),
            )
        case DrainBegun(worker_id):
            return replace(_worker_changed(pool, worker_id), draining={**pool.draining, worker_id: -math.inf})
        case DrainCancelled(worker_id):
            return replace(_worker_changed(pool, worker_id), draining=without(pool.draining, worker_id))
        case OrderAnswered(key):
            return change(pool, key, acknowledged=True, missing=0)
        case OrderRefused():
            return _refused(pool, event, now)
        case OrderPostponed(key):
            return change(pool, key, ordered_at=-math.inf)
        case DemandHeard(gateway, seen):
            return _demanded(pool, gateway, seen, now)
        case GatewayGone(gateway):
            left = {alias: forgotten(pool.demand[alias], gateway) for alias in pool.heard_of.get(gateway, ())}
            return replace(
                touched(pool, left), demand={**pool.demand, **left}, heard_of=without(pool.heard_of, gateway)
            )
        case Tick():
            return _time_passed(pool, now)


def _removed(pool: Pool, alias: str, now: float) -> Pool:
    unwanted = {
        key_of(each): replace(each, unwanted_since=now - UNWANTED_GRACE_S) for each in instances_of(pool, alias)
    }
    return replace(
        touched(with_instances(pool, unwanted), [alias]),
        models=without(pool.models, alias),
        news=pool.news | {alias},
        hopeless=pool.hopeless - {alias},
        due=without(pool.due, alias),
        shortages=without(pool.shortages, alias),
        learned=without(pool.learned, alias),
        demand=without(pool.demand, alias),
        heard_of={gateway: models - {alias} for gateway, models in pool.heard_of.items()},
        wanted_up=pool.wanted_up - {alias},
        stepped_at=without(pool.stepped_at, alias),
        wishes=without(pool.wishes, alias),
    )


def registered(pool: Pool, events: Sequence[ModelRegistered], now: float) -> Pool:
    """With several models at once."""
    aliases = frozenset(each.model.alias for each in events)
    return replace(
        pool,
        models={**pool.models, **{each.model.alias: each.model for each in events}},
        learned={**pool.learned, **{each.model.alias: each.learned for each in events}},
        demand={**pool.demand, **{alias: Demand(asked_at=now) for alias in aliases}},
        wanted_up=pool.wanted_up.union(each.model.alias for each in events if not each.resting),
        touched=pool.touched | aliases,
        news=pool.news | aliases,
    )


def _demanded(pool: Pool, gateway: str, seen: Mapping[str, Seen], now: float) -> Pool:
    """A model that a gateway says nothing of has nothing there."""
    over_s = pool.policy.scaling.averaged_over_s
    told = pool.heard_of.get(gateway, frozenset()).union(alias for alias in seen if alias in pool.demand)
    changed = {
        alias: heard(pool.demand[alias], gateway, seen.get(alias, _NOTHING), now, over_s=over_s) for alias in told
    }
    there = frozenset(alias for alias, each in changed.items() if gateway in each.gateways)
    return replace(
        touched(pool, told),
        demand={**pool.demand, **changed},
        heard_of={**pool.heard_of, gateway: there} if there else without(pool.heard_of, gateway),
    )


def _gone(pool: Pool, event: WorkerGone, now: float) -> Pool:
    worker = pool.workers.get(event.worker_id)
    if worker is None or worker.incarnation != event.incarnation:
        return pool
    lost = replace(worker, alive=False, reason=event.reason)
    return replace(
        _without_instances(pool, event.worker_id),
        workers={**pool.workers, event.worker_id: lost},
        missed={**pool.missed, event.worker_id: now + WORKER_BACK_S},
        workers_due=min(pool.workers_due, now + WORKER_BACK_S),
    )


def _without_instances(pool: Pool, worker_id: str) -> Pool:
    """They are lost; the models of those that were up are to be brought up again."""
    gone = pool.on_worker.get(worker_id, ())
    lost = {each.alias for key in gone if is_meant_up(each := pool.instances[key])}
    return replace(
        room_changed(with_instances(pool, {}, gone=gone), worker_id),
        ledgers=without(pool.ledgers, worker_id),
        wanted_up=pool.wanted_up | (lost & pool.models.keys()),
    )


def _refused(pool: Pool, event: OrderRefused, now: float) -> Pool:
    instance = pool.instances.get(event.key)
    if instance is None or instance.stopping:
        return pool
    if instance.order is not Step.NONE:
        as_it_was = replace(instance, order=Step.NONE, state=instance.ordered_in)
        level = LEVEL.get(instance.order) if event.permanent else None
        return put(pool, event.key, as_it_was if level is None else without_level(as_it_was, level, event.reason))
    refused = replace(instance, permanent=event.permanent)
    return put(pool, event.key, failed(pool.policy, refused, event.reason, now))


def without_level(instance: Instance, level: int, reason: str) -> Instance:
    levels = tuple(each for each in instance.levels if each != level)
    return replace(instance, levels=levels, refuses={**instance.refuses, level: reason})


def _time_passed(pool: Pool, now: float) -> Pool:
    if now >= pool.recover_until and pool.recovering:
        pool = replace(pool, awaited=frozenset(), anyone_awaited=False)
    if now < pool.workers_due:
        return pool
    lost = {
        worker.worker_id: replace(worker, alive=False, reason=f"no heartbeat for {now - worker.last_seen:.0f} s")
        for worker in pool.workers.values()
        if worker.alive and now - worker.last_seen >= pool.policy.heartbeat_timeout_s
    }
    missed = {worker_id: until for worker_id, until in pool.missed.items() if now < until}
    pool = replace(pool, workers={**pool.workers, **lost}, missed=missed)
    silent_at = [each.last_seen + pool.policy.heartbeat_timeout_s for each in pool.workers.values() if each.alive]
    pool = replace(pool, workers_due=min([*silent_at, *missed.values()], default=math.inf))
    there = [pool.instances[key] for worker_id in lost for key in pool.on_worker.get(worker_id, ())]
    aliases = {each.alias for each in there}
    wanted_up = pool.wanted_up | ({each.alias for each in there if is_meant_up(each)} & pool.models.keys())
    for worker_id in lost:
        pool = room_changed(pool, worker_id)
    return replace(touched(pool, aliases), wanted_up=wanted_up, news=pool.news | aliases)


def _worker_changed(pool: Pool, worker_id: str) -> Pool:
    """With a look at those who are on this worker, or lack room."""
    return touched(room_changed(pool, worker_id), (each.alias for each in instances_on(pool, worker_id)))
