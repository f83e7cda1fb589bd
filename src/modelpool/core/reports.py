"""What a worker reports, taken in: what runs there now, and what that lets learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from msgspec.structs import replace

from modelpool.core import learned as learning
from modelpool.core.demand import Demand, unheard
from modelpool.core.events import Report, WorkerReported
from modelpool.core.learned import Learned, What
from modelpool.core.lifecycle import InstanceState, sleep_level
from modelpool.core.pool import (
    Device,
    Instance,
    Key,
    Model,
    Policy,
    Pool,
    Worker,
    has_failed,
    instances_of,
    instances_on,
    is_meant_up,
    key_of,
    room_changed,
    touched,
    with_instances,
    without,
)
from modelpool.core.scaling import Step

_LYING_DOWN = (InstanceState.DRAINING, InstanceState.SLEEP_1, InstanceState.SLEEP_2)


def reported(pool: Pool, event: WorkerReported, now: float) -> Pool:
    before = pool.workers.get(event.worker_id)
    new_process = before is None or before.incarnation != event.incarnation
    worker = Worker(
        worker_id=event.worker_id,
        incarnation=event.incarnation,
        devices=event.devices,
        host=event.host,
        files=event.files,
        engines=event.engines,
        last_seen=now,
    )
    mine = {key: pool.instances[key] for key in pool.on_worker.get(event.worker_id, ())}
    observed: list[tuple[str, What, float]] = []
    merged: dict[Key, Instance] = {}
    for report in event.reports:
        key = (event.worker_id, report.instance)
        known = mine.pop(key, None)
        report = _with_share(report, pool.models.get(report.alias), event.devices)
        merged[key] = _merge(pool.policy, None if new_process else known, known, report, event.worker_id, now)
        if known and not new_process and _is_of(pool, known):
            for what, value in _seen(known, report, now):
                observed.append((known.alias, what, value))
    lost = {
        each.alias
        for key, each in merged.items()
        if has_failed(each) and (key not in pool.instances or is_meant_up(pool.instances[key]))
    }
    for key, instance in mine.items():
        if not new_process and instance.stopping and instance.drain_s is None and _is_of(pool, instance):
            observed.append((instance.alias, What.UNLOAD, now - instance.starting_since))
        if not new_process and _may_be_on_its_way(instance):
            merged[key] = replace(instance, missing=instance.missing + (1 if instance.acknowledged else 0))
        elif is_meant_up(instance):
            lost.add(instance.alias)
    there = (InstanceState.ACTIVE, InstanceState.SLEEP_1, InstanceState.SLEEP_2)
    up = {each.alias for each in merged.values() if each.state in there and _is_of(pool, each)}
    news = {key: each for key, each in merged.items() if each != pool.instances.get(key)}
    if before is None or before != replace(worker, last_seen=before.last_seen):
        pool = replace(room_changed(pool, event.worker_id), ledgers=without(pool.ledgers, event.worker_id))
    if before is None or not before.alive:
        pool = touched(pool, (each.alias for each in merged.values()))
    instances_before = pool.instances
    pool = with_instances(pool, news, gone=mine.keys() - merged.keys())
    lost &= pool.models.keys()
    return replace(
        pool,
        workers={**pool.workers, event.worker_id: worker},
        missed=without(pool.missed, event.worker_id) if pool.missed else pool.missed,
        workers_due=min(pool.workers_due, now + pool.policy.heartbeat_timeout_s),
        demand=_without_those_served(pool, event.worker_id, instances_before),
        learned=_learned(pool, event.worker_id, observed) if observed else pool.learned,
        wanted_up=pool.wanted_up if pool.wanted_up.isdisjoint(up) and not lost else (pool.wanted_up | lost) - up,
        awaited=pool.awaited - {event.worker_id},
    )


def _without_those_served(pool: Pool, worker_id: str, before: Mapping[Key, Instance]) -> Mapping[str, Demand]:
    """Nobody is taken to wait any more for a model that has just left ACTIVE without an order of ours.

    Whoever was counted as waiting had been served, and a report of it was not due yet: it would be woken again at once.
    Who waits all the same is named in the gateways' next reports, within a second.
    """
    awake = InstanceState.ACTIVE
    left = {
        each.alias
        for each in instances_on(pool, worker_id)
        if each.state in _LYING_DOWN and (known := before.get(key_of(each))) and known.state is awake
    }
    left = {alias for alias in left if not any(each.state is awake for each in instances_of(pool, alias))}
    if not left:
        return pool.demand
    return {**pool.demand, **{alias: unheard(pool.demand[alias]) for alias in left & pool.demand.keys()}}


def _is_of(pool: Pool, instance: Instance) -> bool:
    """Whether it is an instance of the model that is registered under its alias now."""
    model = pool.models.get(instance.alias)
    return model is not None and model.key == instance.key


def _seen(known: Instance, report: Report, now: float) -> Iterator[tuple[What, float]]:
    """What the news of an instance lets learn of its model. When a change began that nobody ordered is not known."""
    took = now - known.starting_since
    if report.state is InstanceState.ACTIVE:
        if known.state is InstanceState.STARTING and known.ordered_at is not None:
            yield What.START, max(0.0, took - report.aside_s)
        elif known.woken_from:
            yield learning.WAKE[known.woken_from], took
        elif known.state is InstanceState.ACTIVE:  # measured once it takes requests; not all devices tell
            if report.held_bytes != known.held_bytes:
                yield What.HELD_AWAKE, report.held_bytes
            if report.host_bytes != known.host_bytes:
                yield What.HELD_ON_HOST_AWAKE, report.host_bytes
    elif (level := sleep_level(report.state)) in learning.SLEEP and report.state is not known.state:
        yield learning.SLEEP[level], report.slept_s
        yield learning.HELD[level], report.held_bytes
        yield learning.HELD_ON_HOST[level], report.host_bytes


def _learned(pool: Pool, worker_id: str, observed: Iterable[tuple[str, What, float]]) -> Mapping[str, Learned]:
    """All that is known, with what was observed of these models."""
    learned = dict(pool.learned)
    for alias, what, value in observed:
        before = learned.get(alias, {})
        if learning.is_news(before, worker_id, what, value):
            learned[alias] = learning.learn(before, worker_id, what, value)
    return learned


def _with_share(report: Report, model: Model | None, devices: tuple[Device, ...]) -> Report:
    """Where its worker knows of no share, since its user gave none: what is set aside for the model anyway."""
    if report.memory_bytes or model is None or model.key != report.key:
        return report
    shares = [model.need().on(device) for device in devices if device.index in report.devices]
    return replace(report, memory_bytes=max(shares)) if any(shares) else report


def _may_be_on_its_way(instance: Instance) -> bool:
    """A report may have been written before an order arrived: twice missing is gone. A refused order is not due yet.

    What was there in a report, and not only ordered, is gone at once.
    """
    if instance.stopping or instance.state not in (InstanceState.STARTING, InstanceState.FAILED):
        return False
    return not instance.acknowledged or instance.missing == 0 or instance.retry_at is not None


def _merge(
    policy: Policy, known: Instance | None, history: Instance | None, report: Report, worker_id: str, now: float
) -> Instance:
    """What is known of an instance and what its worker says of it now, as one."""
    seen = _as_told(report, history, worker_id, now)
    if known is None:
        return failed(policy, seen, report.reason, now, at=report.changed_at) if has_failed(seen) else seen
    merged = _continued(known, seen, now)
    if not has_failed(seen):
        stable = seen.state is InstanceState.ACTIVE and now - merged.active_since >= policy.backoff_max_s
        return replace(merged, failures=0) if stable else merged
    if report.changed_at <= known.failed_at:
        # The failure that was answered with a new order already: the order is on its way, or waits for its time.
        return replace(known, missing=0, ending=report.ending and has_failed(known))
    return failed(policy, merged, report.reason, now, at=report.changed_at)


def _as_told(report: Report, history: Instance | None, worker_id: str, now: float) -> Instance:
    """An instance as its worker has it, with what an earlier life of it left."""
    return Instance(
        instance=report.instance,
        alias=report.alias,
        key=report.key,
        worker_id=worker_id,
        state=report.state,
        devices=report.devices,
        memory_bytes=report.memory_bytes or (history.memory_bytes if history else 0),
        held_bytes=report.held_bytes,
        host_bytes=report.host_bytes or (history.host_bytes if history else 0),
        weights_bytes=report.weights_bytes,
        capacity=max(1, report.capacity),
        levels=report.levels,
        idle_since=now,
        reason=report.reason,
        permanent=report.permanent,
        ending=report.ending,
        starting_since=now,
        active_since=now,
        failures=history.failures if history else 0,
        failed_at=history.failed_at if history else 0.0,
    )


def _continued(known: Instance, seen: Instance, now: float) -> Instance:
    """What its worker has now, with what only the manager knows of it: since when, and by which order."""
    still = (*_LYING_DOWN, seen.state)
    merged = replace(
        seen,
        stopping=known.stopping,
        levels=tuple(level for level in seen.levels if level not in known.refuses),
        refuses=known.refuses,
        drain_s=known.drain_s,
        ordered_at=known.ordered_at,
        starting_since=known.starting_since,
        active_since=known.active_since if known.state is InstanceState.ACTIVE else now,
        unwanted_since=known.unwanted_since,
        # One that went to sleep without an order of ours was idle from then on, as far as anybody knows.
        idle_since=known.idle_since if known.order is not Step.NONE or known.state in still else now,
        woken_from=known.woken_from if seen.state is InstanceState.WAKING else 0,
    )
    if known.order is not Step.NONE and seen.state is known.ordered_in:
        # Written before the order arrived, or the order was lost: it is given again when it is due.
        merged = replace(
            merged,
            order=known.order,
            ordered_in=known.ordered_in,
            state=known.state,
            woken_from=known.woken_from,
        )
    if seen.state is InstanceState.STARTING and not seen.reason:
        # While it tries again, why it failed before.
        merged = replace(merged, reason=known.reason, permanent=known.permanent)
    return merged


def failed(policy: Policy, instance: Instance, reason: str, now: float, *, at: float | None = None) -> Instance:
    """FAILED, to be tried again after a time that doubles with each failure in a row.

    A permanent one waits the longest time at once. It is tried at all since what makes it so may still change on the
    worker's machine: a folder that appears.
    """
    failures = instance.failures + 1
    pause = policy.backoff_max_s if instance.permanent else backoff(policy, failures)
    return replace(
        instance,
        state=InstanceState.FAILED,
        reason=reason,
        acknowledged=True,
        missing=0,
        failures=failures,
        failed_at=instance.failed_at if at is None else at,
        retry_at=now + pause,
    )


def backoff(policy: Policy, failures: int) -> float:
    """Seconds until the next try after so many failures in a row."""
    return min(policy.backoff_max_s, policy.backoff_initial_s * 2.0 ** min(30, max(0, failures - 1)))
