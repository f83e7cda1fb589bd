"""Room is made for a model for which requests wait: who gives way, on which worker, and who may stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from modelpool.core.eviction import SOON_S, Holder, NoPlan, Plan, Way, first_plan
from modelpool.core.learned import HELD, HELD_ON_HOST, SLEEP, WAKE, What, expected, slow, typical
from modelpool.core.ledger import Ledger, on_device, on_host
from modelpool.core.lifecycle import InstanceState, sleep_level
from modelpool.core.orders import Round, Shortage, can_sleep, order, stop, within_host
from modelpool.core.placement import GB, HOST, NAMED_MAX, Refusal
from modelpool.core.pool import Instance, Model, Pool, instances_on
from modelpool.core.replicas import is_overdue, scaling_of, usable_of
from modelpool.core.room import Lacking
from modelpool.core.scaling import LEVEL, Step

RECHECK_S = 1.0
"""While somebody waits for memory: how often it is looked whether who holds it may go now."""
ASKED_MAX = 25
"""Workers of which it is asked at once who may give way there."""
START_GUESS_S = 10.0
_MINUTE_S = 60.0
_TURN_FACTOR = 4.0
_HOLDER_COST = 1.0
_CONTEXT_GUESS_BYTES = GB
"""What a sleeper leaves on an accelerator, before that was measured."""
_DRAINING = InstanceState.DRAINING
_COMING = (InstanceState.STARTING, InstanceState.WAKING)
_ASLEEP = (InstanceState.SLEEP_1, InstanceState.SLEEP_2)


def make_room(
    pool: Pool,
    model: Model,
    workers: Sequence[str],
    lacking: Lacking,
    refusal: Refusal,
    round_: Round,
) -> tuple[Pool, Shortage | None]:
    """Have others give way on that worker of these where it costs least; say what is waited for, or why nobody can.

    Who is brought up without being asked for leaves alone what becomes free there meanwhile.
    """
    plans: list[tuple[float, str, Plan]] = []
    refusals: list[tuple[str, NoPlan]] = []
    moving = len(workers) > ASKED_MAX
    for worker_id in _asked(pool, model, workers, round_.now):
        options, here = lacking(worker_id), instances_on(pool, worker_id)
        round_.cost += _HOLDER_COST * len(here)
        rests = []
        for short in options:
            coming = {index: sum(_returning(each, index) for each in here) for index in short}
            rests.append({index: bytes_ - coming[index] for index, bytes_ in short.items() if bytes_ > coming[index]})
            if not rests[-1]:
                _keep_room(pool, worker_id, model, round_)
                return pool, Shortage(f"waits for memory that is being given back on {worker_id}", passing=True)
        if not rests:
            continue
        books = round_.ledger(pool, pool.workers[worker_id])
        holders = [_holder(pool, each, books, model, round_) for each in here if not _leaving(each)]
        result = first_plan(rests, holders, model.alias)
        if isinstance(result, NoPlan):
            refusals.append((worker_id, result))
            moving = moving or result.for_now or any(_is_moving(each) for each in here)
        else:
            plans.append((result.cost, worker_id, result))
    if not plans:
        soon = next((worker_id for worker_id, each in refusals if each.for_now), None)
        if soon is not None and is_overdue(pool, model.alias, round_.now):
            _keep_room(pool, soon, model, round_)
        reasons = [refusal.reason, *(f"{name}: {each.reason}" for name, each in refusals[:NAMED_MAX])]
        return pool, Shortage("; ".join(reasons), hopeless=not moving)
    _, worker_id, cheapest = min(plans, key=lambda each: each[:2])
    for eviction in cheapest.evictions:
        key = (worker_id, eviction.instance)
        # Each of several sleeps may have room in the machine's memory, and all together not.
        step = within_host(pool, pool.instances[key], eviction.step, round_)
        if step is Step.UNLOAD:
            pool = stop(pool, key, eviction.reason, round_)
        else:
            pool = order(pool, pool.instances[key], step, eviction.reason, round_)
    recent = tuple(at for at in pool.swaps.get(worker_id, ()) if round_.now - at < _MINUTE_S)
    pool = replace(pool, swaps={**pool.swaps, worker_id: (*recent, *(round_.now for _ in cheapest.evictions))})
    names = ", ".join(each.instance for each in cheapest.evictions)
    _keep_room(pool, worker_id, model, round_)
    return pool, Shortage(f"waits for {names} to give way on {worker_id}", passing=True)


def _asked(pool: Pool, model: Model, workers: Sequence[str], now: float) -> list[str]:
    """The workers where it is asked who may give way: all; of very many others each time.

    First where room is being made for it already: else others would give way elsewhere meanwhile.
    """
    begun = [worker_id for worker_id, alias in pool.kept_for.items() if alias == model.alias and worker_id in workers]
    first = int(now / RECHECK_S) * ASKED_MAX % max(1, len(workers))
    in_turn = [*workers[first : first + ASKED_MAX], *workers[:first]][:ASKED_MAX]
    return [*begun, *(worker_id for worker_id in in_turn if worker_id not in begun)]


def _keep_room(pool: Pool, worker_id: str, model: Model, round_: Round) -> None:
    other = round_.kept_for.get(worker_id)
    if pool.demand[model.alias].waiting and not (other and is_overdue(pool, other, round_.now)):
        round_.kept_for[worker_id] = model.alias


def _is_moving(instance: Instance) -> bool:
    """Its memory is being taken or given back: what is free now says little."""
    return _leaving(instance) or instance.order is Step.WAKE or instance.state in _COMING


def _leaving(instance: Instance) -> bool:
    asleep_soon = instance.order in (Step.SLEEP_1, Step.SLEEP_2) or instance.state is _DRAINING
    return instance.stopping or instance.ending or asleep_soon


def _returning(instance: Instance, index: int) -> int:
    """What it is about to give back of a device, or of the machine."""
    if not _leaving(instance):
        return 0
    if index == HOST:
        if instance.ending:
            return instance.host_bytes
        return on_host(instance).bytes if instance.stopping or instance.order is Step.SLEEP_2 else 0
    return instance.memory_bytes if index in instance.devices else 0


def _holder(pool: Pool, instance: Instance, books: Ledger, wanting: Model, round_: Round) -> Holder:
    demand = pool.demand.get(instance.alias)
    kept, for_now = _kept(pool, instance, wanting, round_)
    fast = books.host is not None
    each = on_device(instance, accelerated=fast).bytes
    holds = dict.fromkeys(instance.devices, each) | ({HOST: on_host(instance).bytes} if fast else {})
    return Holder(
        instance=instance.instance,
        alias=instance.alias,
        state=instance.state,
        holds=holds,
        ways=_ways(pool, instance, holds, books),
        chance=demand.chance(SOON_S, round_.now) if demand else 0.0,
        kept=kept,
        for_now=for_now,
    )


def _ways(pool: Pool, instance: Instance, holds: Mapping[int, int], books: Ledger) -> tuple[Way, ...]:
    """The steps down from where it is."""
    learned, there = pool.learned.get(instance.alias, {}), instance.worker_id
    start_s = typical(learned, What.START, there, unknown=START_GUESS_S)
    ways = [Way(step=Step.UNLOAD, frees=holds, back_s=start_s)]
    for step, level in LEVEL.items():
        if level <= sleep_level(instance.state) or not can_sleep(instance, step, books):
            continue
        # What a level leaves is known once it was there. On a CPU nobody can guess it; on an accelerator: the context.
        guess = math.inf if books.host is None else _CONTEXT_GUESS_BYTES
        left = slow(learned, HELD[level], there, unknown=guess)
        frees = {index: held - int(min(held, left)) for index, held in holds.items()}
        if HOST in frees:
            kept = holds[HOST] + (instance.weights_bytes if level == 1 else 0)
            frees[HOST] = holds[HOST] - int(slow(learned, HELD_ON_HOST[level], there, unknown=kept))
        if any(gain > 0 for gain in frees.values()):
            back_s = typical(learned, WAKE[level], there, unknown=start_s / 2)
            ways.append(Way(step=step, frees=frees, back_s=back_s))
    return tuple(ways)


def _kept(pool: Pool, instance: Instance, wanting: Model, round_: Round) -> tuple[str, bool]:
    """Why it may not give way to that model now, and whether it may later; ("", False) when it may."""
    model, demand = pool.models.get(instance.alias), pool.demand.get(instance.alias)
    if instance.alias == wanting.alias and not (instance.key in wanting.replaces and instance.state in _ASLEEP):
        return "is the same model", False
    if model is not None and model.pinned:
        return "is pinned", False
    if instance.state in _COMING or instance.order is Step.WAKE:
        return "is on its way up", True
    if model is None or demand is None or instance.state in _ASLEEP:
        return "", False
    recent = [at for at in pool.swaps.get(instance.worker_id, ()) if round_.now - at < _MINUTE_S]
    if len(recent) >= pool.policy.swaps_per_minute:
        return f"stays, since {len(recent)} gave way there within a minute", True
    awake = [each for each in usable_of(pool, model) if each.state is InstanceState.ACTIVE]
    if len(awake) <= scaling_of(pool.policy, model).min_replicas:
        return "is one of the replicas to be kept", False
    up_s = round_.now - instance.active_since
    if up_s < (turn := turn_s(pool, instance)):
        return f"is up for only {up_s:.0f} of {turn:.0f} s", True
    inflight = demand.inflight(instance.instance)
    if inflight and not is_overdue(pool, wanting.alias, round_.now):
        return f"has {inflight} in flight", True
    return "", False


def turn_s(pool: Pool, instance: Instance) -> float:
    """How long it is left up once it came: some times what it takes to swap it, so that swapping pays."""
    swap_s = _swap_s(pool, instance)
    return min(pool.policy.turn_max_s, max(pool.policy.min_residence_s, _TURN_FACTOR * swap_s))


def _swap_s(pool: Pool, instance: Instance) -> float:
    """What it takes to have it make room and to bring it back, in the quickest way that was seen; 0 if none was."""
    learned = pool.learned.get(instance.alias, {})
    ways = [(What.UNLOAD, What.START), *((SLEEP[level], WAKE[level]) for level in WAKE if level in instance.levels)]
    return min(
        (
            typical(learned, down, instance.worker_id, unknown=0.0) + back.typical
            for down, up in ways
            if (back := expected(learned, up, instance.worker_id)) is not None
        ),
        default=0.0,
    )
