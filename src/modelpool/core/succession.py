"""Others come up in the place of instances that are to go; then these are let go."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import Round, stop
from modelpool.core.outgoing import UNHURRIED_S, is_up, needed, why_outgoing
from modelpool.core.pool import Instance, Model, Pool, has_failed, instances_of, key_of
from modelpool.core.replicas import as_replica, is_used, outgoing_of, scaling_of, usable_of
from modelpool.core.scaling import ScalingPolicy, Step

_ASLEEP = (InstanceState.SLEEP_1, InstanceState.SLEEP_2)


def with_successors(pool: Pool, model: Model, now: float) -> ScalingPolicy:
    """The policy, with as many replicas to be kept as are needed in the place of those that go."""
    scaling = scaling_of(pool.policy, model)
    outgoing = [each for each in outgoing_of(pool, model) if is_up(each)]
    if not outgoing or not is_used(pool, model, now):
        return scaling
    return replace(scaling, min_replicas=_needed(pool, model, outgoing))


def _needed(pool: Pool, model: Model, outgoing: Iterable[Instance]) -> int:
    awake = [each for each in usable_of(pool, model) if each.state is InstanceState.ACTIVE]
    serving = [as_replica(pool, each) for each in (*outgoing, *awake)]
    return needed(scaling_of(pool.policy, model), pool.demand[model.alias], serving)


def is_succeeded(pool: Pool, model: Model) -> bool:
    """Whether another one is to come up, where there is room, in the place of what goes; a sleeper is moved so."""
    if not (outgoing := [each for each in outgoing_of(pool, model) if not has_failed(each)]):
        return False
    return any(map(is_up, outgoing)) or not usable_of(pool, model)


def let_go(pool: Pool, model: Model, round_: Round) -> Pool:
    """End those that are to go and have others in their place, the least busy ones first."""
    if not (outgoing := outgoing_of(pool, model)):
        return pool
    usable = usable_of(pool, model)
    awake = [each for each in usable if each.state is InstanceState.ACTIVE and each.order is Step.NONE]
    up = sorted(filter(is_up, outgoing), key=lambda each: pool.demand[model.alias].inflight(each.instance))
    short, ending = model.alias in round_.shortages, any(each.stopping for each in instances_of(pool, model.alias))
    enough = len(up) + len(awake) - max(len(awake), _needed(pool, model, up))
    # Where there is no room for all that the load asks for, one goes for one that came.
    replaced = up[: max(enough, 1 if short and not ending else 0)] if awake else []
    nowhere = short or any(map(has_failed, usable))
    missed = is_used(pool, model, round_.now)
    for each in outgoing:
        drained, asleep = each.worker_id in pool.draining, each.state in _ASLEEP and each.order is Step.NONE
        # On a worker that is drained nobody waits for what nobody would miss, and for a sleeper only while it may move.
        dropped = drained and ((nowhere and not missed) or (asleep and bool(usable or nowhere)))
        if each in replaced or has_failed(each) or (asleep and awake) or dropped:
            pool = stop(pool, key_of(each), why_outgoing(pool, each), round_, drain_s=UNHURRIED_S)
    return pool
