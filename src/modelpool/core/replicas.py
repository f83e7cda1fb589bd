"""Which instances of a model count as its replicas, how many there are to be, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Iterable

from modelpool.core.lifecycle import InstanceState
from modelpool.core.outgoing import is_up, why_outgoing
from modelpool.core.pool import Instance, Model, Policy, Pool, instances_of, is_alive
from modelpool.core.scaling import Replica, ScalingPolicy, Step

_DOWN = (InstanceState.SLEEP_1, InstanceState.SLEEP_2, InstanceState.DRAINING, InstanceState.UNLOADED)


def scaling_of(policy: Policy, model: Model) -> ScalingPolicy:
    """The policy for one model: what it says itself, else what holds for all."""
    general, never = policy.scaling, math.inf
    most = policy.max_replicas if model.max_replicas is None else model.max_replicas
    least = min(policy.min_replicas, most) if model.min_replicas is None else model.min_replicas
    if model.pinned:
        least = max(1, least)
    return ScalingPolicy(
        min_replicas=least,
        max_replicas=max(1, least, most),
        load_high=_first(model.load_high, general.load_high),
        load_low=_first(model.load_low, general.load_low),
        averaged_over_s=general.averaged_over_s,
        cooldown_s=_first(model.cooldown_s, general.cooldown_s),
        idle_sleep_1_s=never if model.pinned else _first(model.idle_sleep_1_s, general.idle_sleep_1_s),
        idle_sleep_2_s=never if model.pinned else _first(model.idle_sleep_2_s, general.idle_sleep_2_s),
        idle_unload_s=never if model.pinned else _first(model.idle_unload_s, general.idle_unload_s),
    )


def _first(own: float | None, general: float) -> float:
    return general if own is None else own


def replicas_wanted(pool: Pool, model: Model) -> int:
    """How many there are to be now: those to be kept, one for who asks, and those that load brought up."""
    least = scaling_of(pool.policy, model).min_replicas
    asked = to_be_up(pool, model) or pool.demand[model.alias].waiting > 0 or any(map(is_up, outgoing_of(pool, model)))
    up = [as_replica(pool, each) for each in usable_of(pool, model)]
    return max(least, 1 if asked else 0, sum(each.state not in _DOWN for each in up))


def to_be_up(pool: Pool, model: Model) -> bool:
    """Whether one replica is to be up although nobody asks."""
    return model.preload or model.alias in pool.wanted_up


def may_be_missed(pool: Pool, model: Model, now: float) -> bool:
    """Whether somebody may miss it: else an instance that failed is not tried again."""
    demand, scaling = pool.demand[model.alias], scaling_of(pool.policy, model)
    recently = now < demand.asked_at + scaling.idle_sleep_1_s
    return to_be_up(pool, model) or scaling.min_replicas > 0 or demand.busy or recently


def is_used(pool: Pool, model: Model, now: float) -> bool:
    """Whether somebody would miss it: then others may have to give way to what takes the place of what goes."""
    scaling, demand = scaling_of(pool.policy, model), pool.demand[model.alias]
    return scaling.min_replicas > 0 or demand.busy or now < demand.asked_at + scaling.idle_sleep_1_s


def is_overdue(pool: Pool, alias: str, now: float) -> bool:
    """Whether somebody has waited for it for more than the longest turn."""
    demand = pool.demand.get(alias)
    since = None if demand is None else demand.waiting_since
    return since is not None and now - since >= pool.policy.turn_max_s


def usable_of(pool: Pool, model: Model) -> list[Instance]:
    """Those of a model's instances that count as its replicas."""
    return [
        each
        for each in instances_of(pool, model.alias)
        if not each.stopping
        and each.key == model.key
        and is_alive(pool, each.worker_id)
        and each.worker_id not in pool.draining
    ]


def outgoing_of(pool: Pool, model: Model) -> list[Instance]:
    """Those of a model's instances that are to go once others are in their place."""
    if not pool.draining and not model.replaces:
        return []
    mine = instances_of(pool, model.alias)
    return [each for each in mine if not each.stopping and is_alive(pool, each.worker_id) and why_outgoing(pool, each)]


def as_replica(pool: Pool, instance: Instance) -> Replica:
    """As scaling sees it: on its way where that was ordered."""
    state = instance.state
    if instance.order is Step.WAKE:
        state = InstanceState.WAKING
    elif instance.order is not Step.NONE:
        state = InstanceState.DRAINING
    demand, model = pool.demand[instance.alias], pool.models[instance.alias]
    awake_since = max(demand.asked_at, instance.active_since)
    return Replica(
        name=instance.instance,
        number=replica_number(instance.instance, instance.alias),
        state=state,
        inflight=demand.inflight(instance.instance),
        capacity=model.capacity or instance.capacity,
        idle_since=awake_since if state is InstanceState.ACTIVE else instance.idle_since,
        levels=instance.levels,
        up_since=instance.active_since,
    )


def worth(instance: Instance) -> tuple[int, int, str]:
    """Sorts what to keep before what to stop: ACTIVE, then on the way, then FAILED; low replica numbers first."""
    order = {InstanceState.ACTIVE: 0, InstanceState.FAILED: 2}
    return order.get(instance.state, 1), replica_number(instance.instance, instance.alias), instance.worker_id


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
