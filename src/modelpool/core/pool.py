"""What the manager knows. How events change it is in core/changes.py.

Models are wanted until someone removes them. Instances belong to a worker: losing it loses them, never the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec.structs import replace

from modelpool.core.demand import Demand
from modelpool.core.learned import Learned
from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import Need, Room
from modelpool.core.scaling import ScalingPolicy, Step, Wish

if TYPE_CHECKING:  # it is made of what is here
    from modelpool.core.ledger import Ledger


V = TypeVar("V")
UNWANTED_GRACE_S = 30.0
"""How long an instance of a model that nobody registered is left alone."""
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
    anyone_awaited: bool = False
    """So are workers of which no more is known than that there may be some."""
    recover_until: float = 0.0

    @property
    def recovering(self) -> bool:
        return bool(self.awaited) or self.anyone_awaited


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


def has_failed(instance: Instance) -> bool:
    return instance.state is InstanceState.FAILED


def is_meant_up(instance: Instance) -> bool:
    """Awake or on its way there, and not by order on its way down."""
    up = (InstanceState.ACTIVE, InstanceState.STARTING, InstanceState.WAKING, InstanceState.FAILED)
    return instance.state in up and not instance.stopping


def at_rest(pool: Pool) -> frozenset[str]:
    """The models that were up once and went down since nobody asked, or to make room: nothing is to bring them up."""
    up = {instance.alias for instance in pool.instances.values() if is_meant_up(instance)}
    return frozenset(pool.models.keys() - up - pool.wanted_up)


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
        pool = room_changed(pool, worker_id)
    return touched(replace(pool, instances=instances, ledgers=ledgers, news=pool.news | aliases), aliases)


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


def put(pool: Pool, key: Key, instance: Instance) -> Pool:
    return with_instances(pool, {key: instance})


def change(pool: Pool, key: Key, **fields: Any) -> Pool:
    instance = pool.instances.get(key)
    return pool if instance is None else put(pool, key, replace(instance, **fields))


def touched(pool: Pool, aliases: Iterable[str]) -> Pool:
    """With these models to be looked at."""
    return replace(pool, touched=pool.touched.union(aliases))


def room_changed(pool: Pool, worker_id: str) -> Pool:
    """With a look at those who lack room, at once at the one for whom it is made there."""
    pool = replace(pool, room_changed=True)
    return touched(pool, [pool.kept_for[worker_id]]) if worker_id in pool.kept_for else pool


def without(mapping: Mapping[str, V], key: str) -> dict[str, V]:
    return {other: value for other, value in mapping.items() if other != key}
