"""What the manager knows, and how events change it. What it does about it is in core/reconcile.py.

Models are wanted until someone removes them. Instances belong to a worker: losing it loses them, never the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec.structs import replace

from modelpool.core import learned as learning
from modelpool.core.demand import Demand, Seen, forgotten, heard, unheard
from modelpool.core.learned import Learned, What
from modelpool.core.lifecycle import InstanceState, sleep_level
from modelpool.core.placement import Need, Room
from modelpool.core.scaling import LEVEL, ScalingPolicy, Step, Wish

if TYPE_CHECKING:  # it is made of what is here
    from modelpool.core.ledger import Ledger

UNWANTED_GRACE_S = 30.0
"""How long an instance of a model that nobody registered is left alone."""
WORKER_BACK_S = 30.0
"""A worker whose process has ended is started again by what keeps it, and imports its engines: within this."""

_NOTHING = Seen()
_LYING_DOWN = (InstanceState.DRAINING, InstanceState.SLEEP_1, InstanceState.SLEEP_2)

Key = tuple[str, str]
"""(worker_id, instance)"""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    min_replicas: int = 0
    max_replicas: int = 4
    heartbeat_timeout_s: float = 60.0
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 60.0
    scaling: ScalingPolicy = ScalingPolicy()
    """For models that do not say; its replicas are those above."""
    min_residence_s: float = 10.0
    """What was brought up is not made to give way before this."""
    turn_max_s: float = 30.0
    """A request waits no longer than this for a busy model that is in its way; then that one is drained."""
    swaps_per_minute: int = 12
    """On one worker, to make room for others."""


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What of a model matters for where it runs. `key` tells two specs apart; `engine` is "vllm" or "fake"."""

    alias: str
    key: str
    engine: str
    created: int
    source: str = ""
    """Its hub name, or the path of its folder."""
    devices: int = 1
    memory_bytes: int | None = None
    memory_fraction: float | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    pinned: bool = False
    """Never goes down the ladder, whoever needs its memory."""
    preload: bool = False
    """Is brought up whenever there is room, though nobody asks, and gives way to whoever is asked for."""
    capacity: int | None = None
    load_high: float | None = None
    load_low: float | None = None
    cooldown_s: float | None = None
    idle_sleep_1_s: float | None = None
    idle_sleep_2_s: float | None = None
    idle_unload_s: float | None = None
    replaces: tuple[str, ...] = ()
    """Keys that it had before it was registered anew: their instances serve until those of `key` do."""

    def need(self) -> Need:
        """What one replica wants to have before it starts."""
        fixed = 0 if self.engine == "fake" and self.memory_fraction is None else None
        bytes_each = fixed if self.memory_bytes is None else self.memory_bytes
        return Need(devices=self.devices, bytes_each=bytes_each, fraction=self.memory_fraction)


class Device(Room, frozen=True, kw_only=True):
    """As its worker reports it: `free_bytes` is what it shows as free."""


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """`engines`: engine kind → why it cannot be started there, "" when it can.

    `host`: the memory of the machine, beside that of its accelerators. `files`: models whose files are there.
    """

    worker_id: str
    incarnation: str
    devices: tuple[Device, ...] = ()
    host: Device | None = None
    files: frozenset[str] = frozenset()
    engines: Mapping[str, str] = {}
    alive: bool = True
    reason: str = ""
    last_seen: float = 0.0


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One replica on one worker. `ordered_at`: when the last order about it was given; None before the first."""

    instance: str
    alias: str
    key: str
    worker_id: str
    state: InstanceState
    devices: tuple[int, ...] = ()
    memory_bytes: int = 0
    stopping: bool = False
    drain_s: float | None = None
    """What its requests in flight have while it is stopping; None: what its worker gives."""
    acknowledged: bool = True
    missing: int = 0
    ordered_at: float | None = None
    order: Step = Step.NONE
    """A sleep or wake that was ordered, for as long as no report shows that it began."""
    ordered_in: InstanceState = InstanceState.ABSENT
    """The state it was in then."""
    woken_from: int = 0
    """The sleep level that it is being woken from, by an order."""
    capacity: int = 1
    levels: tuple[int, ...] = ()
    """The sleep levels that its engine has, without those that it `refuses`."""
    refuses: Mapping[int, str] = {}
    """Sleep levels that are not asked of it again until its next start, since it said that it never will; and why."""
    held_bytes: int = 0
    """On each of its devices, as it was measured last; awake it may take up to `memory_bytes`."""
    host_bytes: int = 0
    """Beside accelerators: its processes' own memory, as it was measured last; what it may take, while it starts."""
    weights_bytes: int = 0
    """What its weights take, all in all."""
    idle_since: float = 0.0
    """Of a sleeper: when its model had been asked for last as it fell asleep."""
    starting_since: float = 0.0
    """When the change that it is in, or was in last, was ordered or first seen."""
    active_since: float = 0.0
    unwanted_since: float | None = None
    failures: int = 0
    failed_at: float = 0.0
    retry_at: float | None = None
    reason: str = ""
    permanent: bool = False
    """Its last start failed for a reason that lies in the model as it is registered."""
    ending: bool = False
    """It has failed, and what is left of it may still hold its memory."""


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    policy: Policy = Policy()
    models: Mapping[str, Model] = {}
    workers: Mapping[str, Worker] = {}
    missed: Mapping[str, float] = {}
    """Workers whose process has ended, and until when each may well be back."""
    instances: Mapping[Key, Instance] = {}
    """Changed by `with_instances` only, which keeps the next two."""
    of_model: Mapping[str, tuple[Key, ...]] = {}
    """alias → its instances; no entry where there are none."""
    on_worker: Mapping[str, tuple[Key, ...]] = {}
    """worker → its instances; no entry where there are none."""
    touched: frozenset[str] = frozenset()
    """Models, registered or not, about which something has changed since it was last decided what becomes of them."""
    news: frozenset[str] = frozenset()
    """Models, registered or not, of which others may have to be told something new. Whoever does so empties it."""
    room_changed: bool = False
    """What a worker holds or may be asked is not as it was when those who lack room were looked at."""
    sought_at: float = -math.inf
    """When that was."""
    ledgers: Mapping[str, Ledger] = {}
    """worker → what there is room for on it, where that was worked out and nothing has changed since."""
    kept_for: Mapping[str, str] = {}
    """worker → the model for whose requests room is being made there."""
    due: Mapping[str, float] = {}
    """alias → when time alone may change what is decided."""
    due_first: float = math.inf
    """The first of these; a model that was removed may have been due then."""
    workers_due: float = math.inf
    """When time alone may change what holds of a worker; not before, maybe later."""
    shortages: Mapping[str, str] = {}
    """alias → why a wanted replica of it runs nowhere."""
    hopeless: frozenset[str] = frozenset()
    """Those of them that waiting does not help: nobody may give way."""
    learned: Mapping[str, Learned] = {}
    """alias → what was seen of it so far; nothing of a model that was never up."""
    demand: Mapping[str, Demand] = {}
    """By alias, of every registered model."""
    heard_of: Mapping[str, frozenset[str]] = {}
    """gateway → the models that have something there; no entry where there are none."""
    wanted_up: frozenset[str] = frozenset()
    """Models to bring up although nobody asks: registered and never seen up since, or lost while they were up."""
    stepped_at: Mapping[str, float] = {}
    """alias → when the last step about it was taken."""
    wishes: Mapping[str, Wish] = {}
    """alias → what was decided last, and why."""
    swaps: Mapping[str, tuple[float, ...]] = {}
    """worker → when its instances gave way to others, in the last minute."""
    draining: Mapping[str, float] = {}
    """Workers that are to go, once they run nothing any more → when they were last told to end."""
    awaited: frozenset[str] = frozenset()
    """Workers known from before this manager; until they have reported or `recover_until`, no orders are given."""
    recover_until: float = 0.0

    @property
    def recovering(self) -> bool:
        return bool(self.awaited)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as its worker reports it; `changed_at` orders the reports of one instance."""

    instance: str
    alias: str
    key: str
    state: InstanceState
    reason: str = ""
    permanent: bool = False
    ending: bool = False
    """It has failed, and not all of its processes have ended."""
    devices: tuple[int, ...] = ()
    memory_bytes: int = 0
    held_bytes: int = 0
    host_bytes: int = 0
    weights_bytes: int = 0
    capacity: int = 1
    levels: tuple[int, ...] = ()
    changed_at: float = 0.0
    aside_s: float = 0.0
    """Of the time of its start: what the next one will not need, such as a download."""
    slept_s: float = 0.0
    """How long it took to fall asleep, once its requests had ended."""


class ModelRegistered(msgspec.Struct, frozen=True):
    """A new model; or one that the manager before knew, with what it had `learned`.

    `resting`: it was up once, and went down because nobody asked: it is not brought up until somebody does.
    """

    model: Model
    learned: Learned = {}
    resting: bool = False


class ModelChanged(msgspec.Struct, frozen=True):
    """Its settings are others now; its key is the same, so what runs is as good as before."""

    model: Model


class ModelReplaced(msgspec.Struct, frozen=True):
    """It was registered anew, with another key; what runs of the one before serves until it is there."""

    model: Model


class ModelRemoved(msgspec.Struct, frozen=True):
    alias: str


class WorkerReported(msgspec.Struct, frozen=True, kw_only=True):
    """A registration or a heartbeat: all that the worker runs."""

    worker_id: str
    incarnation: str
    devices: tuple[Device, ...]
    engines: Mapping[str, str]
    reports: tuple[Report, ...]
    host: Device | None = None
    files: frozenset[str] = frozenset()


class WorkerGone(msgspec.Struct, frozen=True):
    """The worker's process has ended, and its instances with it."""

    worker_id: str
    incarnation: str
    reason: str


class WorkerLeft(msgspec.Struct, frozen=True):
    """The worker was shut down and said goodbye: it is not missed."""

    worker_id: str
    incarnation: str


class DrainBegun(msgspec.Struct, frozen=True):
    """The worker is to go: nothing new comes to it, and what it runs leaves."""

    worker_id: str


class DrainCancelled(msgspec.Struct, frozen=True):
    """It stays after all; what has not been ended yet stays too."""

    worker_id: str


class OrderAnswered(msgspec.Struct, frozen=True):
    """The worker took an order; its next report shows what came of it."""

    key: Key


class OrderRefused(msgspec.Struct, frozen=True):
    """`permanent`: the same order will be refused again."""

    key: Key
    reason: str
    permanent: bool = False


class OrderPostponed(msgspec.Struct, frozen=True):
    """An order was not given, since another one about the instance was under way: it is due again."""

    key: Key


class DemandHeard(msgspec.Struct, frozen=True):
    """What one gateway sees, by alias: all models that it has anything to say of."""

    gateway: str
    seen: Mapping[str, Seen]


class GatewayGone(msgspec.Struct, frozen=True):
    gateway: str


class Tick(msgspec.Struct, frozen=True):
    """Nothing happened but time."""


Event = (
    ModelRegistered
    | ModelChanged
    | ModelReplaced
    | ModelRemoved
    | WorkerReported
    | WorkerGone
    | WorkerLeft
    | DrainBegun
    | DrainCancelled
    | OrderAnswered
    | OrderRefused
    | OrderPostponed
    | DemandHeard
    | GatewayGone
    | Tick
)


def apply(pool: Pool, event: Event, now: float) -> Pool:
    match event:
        case ModelRegistered(model, learned, resting):
            return replace(
                pool,
                models={**pool.models, model.alias: model},
                learned={**pool.learned, model.alias: learned},
                demand={**pool.demand, model.alias: Demand(asked_at=now)},
                wanted_up=pool.wanted_up if resting else pool.wanted_up | {model.alias},
                touched=pool.touched | {model.alias},
                news=pool.news | {model.alias},
            )
        case ModelChanged(model):
            changed = replace(pool, models={**pool.models, model.alias: model}, news=pool.news | {model.alias})
            return _touched(changed, [model.alias])
        case ModelReplaced(model):
            return replace(
                _touched(pool, [model.alias]),
                models={**pool.models, model.alias: model},
                learned={**pool.learned, model.alias: {}},
                wanted_up=pool.wanted_up | {model.alias},
                news=pool.news | {model.alias},
            )
        case ModelRemoved(alias):
            unwanted = {
                key_of(each): replace(each, unwanted_since=now - UNWANTED_GRACE_S) for each in instances_of(pool, alias)
            }
            return replace(
                _touched(with_instances(pool, unwanted), [alias]),
                models=_without(pool.models, alias),
                news=pool.news | {alias},
                hopeless=pool.hopeless - {alias},
                due=_without(pool.due, alias),
                shortages=_without(pool.shortages, alias),
                learned=_without(pool.learned, alias),
                demand=_without(pool.demand, alias),
                heard_of={gateway: models - {alias} for gateway, models in pool.heard_of.items()},
                wanted_up=pool.wanted_up - {alias},
                stepped_at=_without(pool.stepped_at, alias),
                wishes=_without(pool.wishes, alias),
            )
        case WorkerReported():
            return _reported(pool, event, now)
        case WorkerGone():
            return _gone(pool, event, now)
        case WorkerLeft(worker_id, incarnation):
            worker = pool.workers.get(worker_id)
            if worker is None or worker.incarnation != incarnation:
                return pool
            return replace(
                _without_instances(pool, worker_id),
                workers=_without(pool.workers, worker_id),
                missed=_without(pool.missed, worker_id),
                draining=_without(pool.draining, worker_id),
            )
        case DrainBegun(worker_id):
            return replace(_worker_changed(pool, worker_id), draining={**pool.draining, worker_id: -math.inf})
        case DrainCancelled(worker_id):
            return replace(_worker_changed(pool, worker_id), draining=_without(pool.draining, worker_id))
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
                _touched(pool, left), demand={**pool.demand, **left}, heard_of=_without(pool.heard_of, gateway)
            )
        case Tick():
            return _time_passed(pool, now)


def _demanded(pool: Pool, gateway: str, seen: Mapping[str, Seen], now: float) -> Pool:
    """A model that a gateway says nothing of has nothing there."""
    over_s = pool.policy.scaling.averaged_over_s
    told = pool.heard_of.get(gateway, frozenset()).union(alias for alias in seen if alias in pool.demand)
    changed = {
        alias: heard(pool.demand[alias], gateway, seen.get(alias, _NOTHING), now, over_s=over_s) for alias in told
    }
    there = frozenset(alias for alias, each in changed.items() if gateway in each.gateways)
    return replace(
        _touched(pool, told),
        demand={**pool.demand, **changed},
        heard_of={**pool.heard_of, gateway: there} if there else _without(pool.heard_of, gateway),
    )


def _reported(pool: Pool, event: WorkerReported, now: float) -> Pool:
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
        if has_failed(each) and (key not in pool.instances or _is_up(pool.instances[key]))
    }
    for key, instance in mine.items():
        if not new_process and instance.stopping and instance.drain_s is None and _is_of(pool, instance):
            observed.append((instance.alias, What.UNLOAD, now - instance.starting_since))
        if not new_process and _may_be_on_its_way(instance):
            merged[key] = replace(instance, missing=instance.missing + (1 if instance.acknowledged else 0))
        elif _is_up(instance):
            lost.add(instance.alias)
    there = (InstanceState.ACTIVE, InstanceState.SLEEP_1, InstanceState.SLEEP_2)
    up = {each.alias for each in merged.values() if each.state in there and _is_of(pool, each)}
    news = {key: each for key, each in merged.items() if each != pool.instances.get(key)}
    if before is None or before != replace(worker, last_seen=before.last_seen):
        pool = replace(_room_changed(pool, event.worker_id), ledgers=_without(pool.ledgers, event.worker_id))
    if before is None or not before.alive:
        pool = _touched(pool, (each.alias for each in merged.values()))
    instances_before = pool.instances
    pool = with_instances(pool, news, gone=mine.keys() - merged.keys())
    lost &= pool.models.keys()
    return replace(
        pool,
        workers={**pool.workers, event.worker_id: worker},
        missed=_without(pool.missed, event.worker_id) if pool.missed else pool.missed,
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


def at_rest(pool: Pool) -> frozenset[str]:
    """The models that were up once and went down since nobody asked, or to make room: nothing is to bring them up."""
    up = {instance.alias for instance in pool.instances.values() if _is_up(instance)}
    return frozenset(pool.models.keys() - up - pool.wanted_up)


def _with_share(report: Report, model: Model | None, devices: tuple[Device, ...]) -> Report:
    """Where its worker knows of no share, since its user gave none: what is set aside for the model anyway."""
    if report.memory_bytes or model is None or model.key != report.key:
        return report
    shares = [model.need().on(device) for device in devices if device.index in report.devices]
    return replace(report, memory_bytes=max(shares)) if any(shares) else report


def _is_up(instance: Instance) -> bool:
    """Awake or on its way there, and not by order on its way down."""
    up = (InstanceState.ACTIVE, InstanceState.STARTING, InstanceState.WAKING, InstanceState.FAILED)
    return instance.state in up and not instance.stopping


def _may_be_on_its_way(instance: Instance) -> bool:
    """A report may have been written before an order arrived: twice missing is gone. A refused order is not due yet."""
    if instance.stopping:
        return False
    return not instance.acknowledged or instance.missing == 0 or instance.retry_at is not None


def _merge(
    policy: Policy, known: Instance | None, history: Instance | None, report: Report, worker_id: str, now: float
) -> Instance:
    """What is known of an instance and what its worker says of it now, as one."""
    seen = Instance(
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
    if known is None:
        return _failed(policy, seen, report.reason, now, at=report.changed_at) if has_failed(seen) else seen
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
    if not has_failed(seen):
        stable = seen.state is InstanceState.ACTIVE and now - merged.active_since >= policy.backoff_max_s
        return replace(merged, failures=0) if stable else merged
    if report.changed_at <= known.failed_at:
        # The failure that was answered with a new order already: the order is on its way, or waits for its time.
        return replace(known, missing=0, ending=report.ending and has_failed(known))
    return _failed(policy, merged, report.reason, now, at=report.changed_at)


def has_failed(instance: Instance) -> bool:
    return instance.state is InstanceState.FAILED


def _failed(policy: Policy, instance: Instance, reason: str, now: float, *, at: float | None = None) -> Instance:
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
    lost = {each.alias for key in gone if _is_up(each := pool.instances[key])}
    return replace(
        _room_changed(with_instances(pool, {}, gone=gone), worker_id),
        ledgers=_without(pool.ledgers, worker_id),
        wanted_up=pool.wanted_up | (lost & pool.models.keys()),
    )


def _refused(pool: Pool, event: OrderRefused, now: float) -> Pool:
    instance = pool.instances.get(event.key)
    if instance is None or instance.stopping:
        return pool
    if instance.order is not Step.NONE:
        as_it_was = replace(instance, order=Step.NONE, state=instance.ordered_in)
        level = LEVEL.get(instance.order) if event.permanent else None
        return put(pool, event.key, as_it_was if level is None else _without_level(as_it_was, level, event.reason))
    refused = replace(instance, permanent=event.permanent)
    return put(pool, event.key, _failed(pool.policy, refused, event.reason, now))


def _without_level(instance: Instance, level: int, reason: str) -> Instance:
    levels = tuple(each for each in instance.levels if each != level)
    return replace(instance, levels=levels, refuses={**instance.refuses, level: reason})


def _time_passed(pool: Pool, now: float) -> Pool:
    if now >= pool.recover_until and pool.awaited:
        pool = replace(pool, awaited=frozenset())
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
    wanted_up = pool.wanted_up | ({each.alias for each in there if _is_up(each)} & pool.models.keys())
    for worker_id in lost:
        pool = _room_changed(pool, worker_id)
    return replace(_touched(pool, aliases), wanted_up=wanted_up, news=pool.news | aliases)


def key_of(instance: Instance) -> Key:
    return (instance.worker_id, instance.instance)


def instances_of(pool: Pool, alias: str) -> list[Instance]:
    """All instances of a model, in the order in which they came."""
    return [pool.instances[key] for key in pool.of_model.get(alias, ())]


def instances_on(pool: Pool, worker_id: str) -> list[Instance]:
    return [pool.instances[key] for key in pool.on_worker.get(worker_id, ())]


def is_alive(pool: Pool, worker_id: str) -> bool:
    """Whether it may be given orders."""
    worker = pool.workers.get(worker_id)
    return worker is not None and worker.alive


def with_instances(pool: Pool, changed: Mapping[Key, Instance], *, gone: Collection[Key] = ()) -> Pool:
    """The pool with these, new or in the place of what they were, and without those."""
    if not changed and not gone:
        return pool
    before, instances = pool.instances, {**pool.instances, **changed}
    for key in gone:
        del instances[key]
    left = {*gone, *(key for key, each in changed.items() if key in before and before[key].alias != each.alias)}
    joined = [key for key in changed if key in left or key not in before]
    if left or joined:
        pool = replace(
            pool,
            of_model=_regrouped(
                pool.of_model, {key: before[key].alias for key in left}, {key: changed[key].alias for key in joined}
            ),
            on_worker=_regrouped(pool.on_worker, {key: key[0] for key in left}, {key: key[0] for key in joined}),
        )
    aliases = {each.alias for each in changed.values()} | {before[key].alias for key in left}
    workers = {key[0] for key in (*changed, *left)}
    ledgers = dict(pool.ledgers)
    for worker_id in workers:
        ledgers.pop(worker_id, None)
        pool = _room_changed(pool, worker_id)
    return _touched(replace(pool, instances=instances, ledgers=ledgers, news=pool.news | aliases), aliases)


def _regrouped(
    groups: Mapping[str, tuple[Key, ...]], left: Mapping[Key, str], joined: Mapping[Key, str]
) -> Mapping[str, tuple[Key, ...]]:
    """Without those that left a group, and with those that joined one."""
    changed = dict(groups)
    for key, group in left.items():
        changed[group] = tuple(each for each in changed[group] if each != key)
    for key, group in joined.items():
        changed[group] = (*changed.get(group, ()), key)
    for group in set(left.values()):
        if not changed[group]:
            del changed[group]
    return changed


def _touched(pool: Pool, aliases: Iterable[str]) -> Pool:
    """With these models to be looked at."""
    return replace(pool, touched=pool.touched.union(aliases))


def _room_changed(pool: Pool, worker_id: str) -> Pool:
    """With a look at those who lack room, at once at the one for whom it is made there."""
    pool = replace(pool, room_changed=True)
    return _touched(pool, [pool.kept_for[worker_id]]) if worker_id in pool.kept_for else pool


def _worker_changed(pool: Pool, worker_id: str) -> Pool:
    """With a look at those who are on this worker, or lack room."""
    return _touched(_room_changed(pool, worker_id), (each.alias for each in instances_on(pool, worker_id)))


def put(pool: Pool, key: Key, instance: Instance) -> Pool:
    return with_instances(pool, {key: instance})


def change(pool: Pool, key: Key, **fields: Any) -> Pool:
    instance = pool.instances.get(key)
    return pool if instance is None else put(pool, key, replace(instance, **fields))


V = TypeVar("V")


def _without(mapping: Mapping[str, V], key: str) -> dict[str, V]:
    return {other: value for other, value in mapping.items() if other != key}
