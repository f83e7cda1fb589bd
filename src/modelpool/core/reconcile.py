"""What the manager does: the orders that bring what runs nearer to what is wanted.

Pure, like core/pool.py: the manager's loop brings the events and the time, and carries out the effects.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import Candidate, DeviceRoom, Need, Placement, Refusal, place
from modelpool.core.pool import (
    UNWANTED_GRACE_S,
    Event,
    Instance,
    Key,
    Model,
    Policy,
    Pool,
    apply,
    change,
    has_failed,
    key_of,
    put,
)

ORDER_RETRY_S = 5.0
"""An order whose effect has not shown up in a report by then is given again."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    instance: str
    alias: str
    devices: tuple[int, ...]


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    instance: str
    reason: str


Effect = Start | Stop


def step(pool: Pool, event: Event, now: float) -> tuple[Pool, tuple[Effect, ...]]:
    """The event taken in, and the orders that follow from it."""
    return reconcile(apply(pool, event, now), now)


def reconcile(pool: Pool, now: float) -> tuple[Pool, tuple[Effect, ...]]:
    """The orders that bring what runs nearer to what is wanted, and the pool as it is once they are given."""
    if pool.recovering:
        return pool, ()
    effects: list[Effect] = []
    pool = _stop_unwanted(pool, now, effects)
    shortages: dict[str, str] = {}
    by_alias: dict[str, list[Instance]] = {}
    for instance in pool.instances.values():
        by_alias.setdefault(instance.alias, []).append(instance)
    for model in pool.models.values():
        pool, shortage = _fill(pool, model, by_alias.get(model.alias, []), now, effects)
        if shortage:
            shortages[model.alias] = shortage
    return replace(pool, shortages=shortages), tuple(effects)


def replicas_wanted(policy: Policy, model: Model) -> int:
    """At least one for a registered model, `min_replicas` when that is more, never above `max_replicas`."""
    if model.min_replicas is not None:
        return max(1, model.min_replicas)
    most = policy.max_replicas if model.max_replicas is None else model.max_replicas
    return max(1, min(policy.min_replicas, most))


def _stop_unwanted(pool: Pool, now: float, effects: list[Effect]) -> Pool:
    for key, instance in list(pool.instances.items()):
        model = pool.models.get(instance.alias)
        if not _alive(pool, instance):
            continue
        if instance.stopping:
            if _due(instance.ordered_at, ORDER_RETRY_S, now):
                effects.append(Stop(worker_id=key[0], instance=key[1], reason="asked again"))
                pool = change(pool, key, ordered_at=now)
        elif model is not None and model.key != instance.key:
            pool = _stop(pool, key, "the alias was registered with another model", now, effects)
        elif model is None and instance.unwanted_since is None:
            pool = change(pool, key, unwanted_since=now)
        elif model is None and _due(instance.unwanted_since, UNWANTED_GRACE_S, now):
            pool = _stop(pool, key, "its model is not registered", now, effects)
        elif model is not None and instance.unwanted_since is not None:
            pool = change(pool, key, unwanted_since=None)
    return pool


def _stop(pool: Pool, key: Key, reason: str, now: float, effects: list[Effect]) -> Pool:
    effects.append(Stop(worker_id=key[0], instance=key[1], reason=reason))
    return change(pool, key, stopping=True, ordered_at=now)


def _fill(pool: Pool, model: Model, instances: list[Instance], now: float, effects: list[Effect]) -> tuple[Pool, str]:
    """Start the replicas of one model that are missing, start failed ones again, stop those that are too many."""
    wanted = replicas_wanted(pool.policy, model)
    usable = [each for each in instances if not each.stopping and each.key == model.key and _alive(pool, each)]
    for surplus in sorted(usable, key=_worth)[wanted:]:
        pool = _stop(pool, key_of(surplus), f"{wanted} replicas are wanted", now, effects)
    for instance in sorted(usable, key=_worth)[:wanted]:
        retry = has_failed(instance) and _due(instance.retry_at, 0.0, now)
        unheard = not instance.acknowledged and _due(instance.ordered_at, ORDER_RETRY_S, now)
        if retry or unheard:
            pool = _start(pool, instance, now, effects)
    ending = {each.instance for each in instances if each.stopping and _alive(pool, each)}
    taken = {each.instance for each in instances} - ending
    for _ in range(len(usable), wanted):
        name = free_name(model.alias, taken)
        if name in ending:
            return pool, "waits for its former instance to end"
        choice = place(_need(model), _candidates(pool, model))
        if isinstance(choice, Refusal):
            return pool, choice.reason
        taken.add(name)
        pool = _start(pool, _new_instance(model, name, choice), now, effects)
    return pool, ""


def ever_fits(pool: Pool, model: Model) -> bool:
    """Whether all wanted replicas would fit if nothing else ran on the workers that are there. True while none is."""
    candidates = [_emptied(each) for each in _candidates(pool, model)]
    for _ in range(replicas_wanted(pool.policy, model) if candidates else 0):
        choice = place(_need(model), candidates)
        if isinstance(choice, Refusal):
            return False
        candidates = [_less(each, choice) if each.worker_id == choice.worker_id else each for each in candidates]
    return True


def _emptied(candidate: Candidate) -> Candidate:
    devices = tuple(replace(device, free_bytes=device.total_bytes) for device in candidate.devices)
    return replace(candidate, devices=devices, replicas_here=0)


def _less(candidate: Candidate, taken: Placement) -> Candidate:
    """The candidate with one replica more on it."""
    devices = tuple(
        replace(each, free_bytes=each.free_bytes - taken.bytes_each) if each.index in taken.devices else each
        for each in candidate.devices
    )
    return replace(candidate, devices=devices, replicas_here=candidate.replicas_here + 1)


def _worth(instance: Instance) -> tuple[int, int, str]:
    """Sorts what to keep before what to stop: ACTIVE, then on the way, then FAILED; low replica numbers first."""
    order = {InstanceState.ACTIVE: 0, InstanceState.FAILED: 2}
    return order.get(instance.state, 1), replica_number(instance.instance, instance.alias), instance.worker_id


def _start(pool: Pool, instance: Instance, now: float, effects: list[Effect]) -> Pool:
    effects.append(
        Start(worker_id=instance.worker_id, instance=instance.instance, alias=instance.alias, devices=instance.devices)
    )
    again = instance.starting_since if not has_failed(instance) and instance.starting_since else now
    started = replace(
        instance,
        state=InstanceState.STARTING,
        acknowledged=False,
        missing=0,
        ordered_at=now,
        starting_since=again,
        retry_at=None,
    )
    return put(pool, key_of(instance), started)


def _new_instance(model: Model, name: str, choice: Placement) -> Instance:
    return Instance(
        instance=name,
        alias=model.alias,
        key=model.key,
        worker_id=choice.worker_id,
        state=InstanceState.ABSENT,
        devices=choice.devices,
        memory_bytes=choice.bytes_each,
    )


def free_name(alias: str, taken: Iterable[str]) -> str:
    """`alias`, or `alias-r2`, `alias-r3`, … whichever is not taken."""
    names = set(taken)
    number = 1
    while (name := alias if number == 1 else f"{alias}-r{number}") in names:
        number += 1
    return name


def replica_number(instance: str, alias: str) -> int:
    """1 for `alias` itself, N for `alias-rN`."""
    suffix = instance[len(alias) + 2 :]
    return int(suffix) if suffix.isdigit() else 1


def _need(model: Model) -> Need:
    fixed = 0 if model.engine == "fake" and model.memory_fraction is None else None
    bytes_each = fixed if model.memory_bytes is None else model.memory_bytes
    return Need(devices=model.devices, bytes_each=bytes_each, fraction=model.memory_fraction)


def _candidates(pool: Pool, model: Model) -> list[Candidate]:
    promised: dict[tuple[str, int], int] = {}
    loading: dict[tuple[str, int], int] = {}
    replicas: dict[str, int] = {}
    for instance in pool.instances.values():
        if instance.alias == model.alias:
            replicas[instance.worker_id] = replicas.get(instance.worker_id, 0) + 1
        for device in instance.devices:
            place_ = (instance.worker_id, device)
            promised[place_] = promised.get(place_, 0) + instance.memory_bytes
            if instance.state is InstanceState.STARTING:
                loading[place_] = loading.get(place_, 0) + instance.memory_bytes
    return [
        Candidate(
            worker_id=worker.worker_id,
            devices=tuple(
                DeviceRoom(
                    index=device.index,
                    kind=device.kind,
                    total_bytes=device.total_bytes,
                    # Memory that is in use is seen on the device; memory promised to a start is not, yet.
                    free_bytes=min(
                        device.total_bytes - promised.get((worker.worker_id, device.index), 0),
                        device.free_bytes - loading.get((worker.worker_id, device.index), 0),
                    ),
                )
                for device in worker.devices
            ),
            replicas_here=replicas.get(worker.worker_id, 0),
            refusal=worker.engines.get(model.engine, f"does not know the engine {model.engine!r}"),
        )
        for worker in pool.workers.values()
        if worker.alive
    ]


def next_deadline(pool: Pool) -> float | None:
    """When `Tick` is due although nothing else happens; None when time alone changes nothing."""
    times: list[float] = [pool.recover_until] if pool.recovering else []
    times += [worker.last_seen + pool.policy.heartbeat_timeout_s for worker in pool.workers.values() if worker.alive]
    times += [worker.back_until for worker in pool.workers.values() if worker.back_until is not None]
    for instance in pool.instances.values():
        if not _alive(pool, instance):
            continue
        if instance.retry_at is not None:
            times.append(instance.retry_at)
        if instance.ordered_at is not None and (instance.stopping or not instance.acknowledged):
            times.append(instance.ordered_at + ORDER_RETRY_S)
        if instance.unwanted_since is not None and not instance.stopping:
            times.append(instance.unwanted_since + UNWANTED_GRACE_S)
    return min(times, default=None)


def _alive(pool: Pool, instance: Instance) -> bool:
    worker = pool.workers.get(instance.worker_id)
    return worker is not None and worker.alive


def _due(since: float | None, after: float, now: float) -> bool:
    return since is not None and now >= since + after
