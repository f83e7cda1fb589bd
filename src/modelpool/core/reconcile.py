"""What the manager does: the orders that bring what runs nearer to what is wanted.

Pure, like core/pool.py: the manager's loop brings the events and the time, and carries out the effects.
"""

from __future__ import annotations

import math
from heapq import nsmallest

from msgspec.structs import replace

from modelpool.core.changes import apply
from modelpool.core.events import Event
from modelpool.core.giving_way import ASKED_MAX, RECHECK_S, START_GUESS_S, make_room
from modelpool.core.learned import What, typical
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import (
    ORDER_RETRY_S,
    Dismiss,
    Effect,
    Round,
    Shortage,
    Stop,
    is_due,
    order,
    start,
    stop,
    within_host,
)
from modelpool.core.placement import Placement, Refusal, gb
from modelpool.core.pool import (
    UNWANTED_GRACE_S,
    Instance,
    Model,
    Pool,
    change,
    has_failed,
    instances_of,
    is_alive,
    key_of,
)
from modelpool.core.replicas import (
    as_replica,
    free_name,
    is_overdue,
    may_be_missed,
    outgoing_of,
    scaling_of,
    to_be_up,
    usable_of,
    worth,
)
from modelpool.core.room import (
    alive_workers,
    ever_fits,
    find_place,
    lacking_of,
    lacking_to_wake,
    leaves_room_to,
    need_of,
    new_instance,
)
from modelpool.core.scaling import Step, Wish, wish
from modelpool.core.succession import is_succeeded, let_go, with_successors

_STEPS_MAX = 64
# What a round costs is counted in looks at a model, 50 µs each on a busy machine, so that it takes some 10 ms.
_COST_MAX = 150.0
_LOOK_COST = 1.0
_SORTED_MAX = 500
"""So many models are considered in one round."""
_SOUGHT_AT_ONCE = 200
_SOUGHT_PER_S = 5000.0
"""When there may be more room, so many workers are asked at once for those who lack it; if more, so many a second."""
_ASLEEP = (InstanceState.SLEEP_1, InstanceState.SLEEP_2)


def step(pool: Pool, event: Event, now: float) -> tuple[Pool, tuple[Effect, ...]]:
    """The event taken in, and the orders that follow from it."""
    return reconcile(apply(pool, event, now), now)


def reconcile(pool: Pool, now: float) -> tuple[Pool, tuple[Effect, ...]]:
    """The orders that bring what runs nearer to what is wanted, and the pool as it is once they are given.

    Only models are looked at about which something changed, or whose time has come. One round does so much at most,
    for those who wait first; the others are due at once.
    """
    if pool.recovering:
        return pool, ()
    looked_at = pool.touched if now < pool.due_first else pool.touched.union(_all_due(pool, now))
    room_changed = pool.room_changed or not looked_at.isdisjoint(pool.kept_for.values())
    room_changed = room_changed and bool(pool.shortages)
    if seeks := room_changed and _sought_again_at(pool) <= now:
        looked_at = looked_at.union(pool.shortages)  # the room may be theirs now
    elif not looked_at and not pool.draining:
        return pool, ()
    looked_at, left = _in_turn(pool, looked_at, now)
    round_ = Round(now, pool.ledgers)
    round_.kept_for = {worker_id: alias for worker_id, alias in pool.kept_for.items() if alias not in looked_at}
    pool = replace(pool, touched=frozenset())
    for alias in sorted(looked_at):
        pool = _stop_unwanted(pool, alias, round_)
    models = [pool.models[alias] for alias in looked_at if alias in pool.models]
    models.sort(key=lambda each: _urgency(pool, each, now))
    done = 0
    while done < len(models) and round_.cost < _COST_MAX:
        pool = _advance(pool, models[done], round_)
        done += 1
    pool = _dismiss_drained(pool, round_)
    pool = _settled(pool, looked_at, left.union(model.alias for model in models[done:]), round_)
    # What was ordered takes room. What becomes free by it does so by the report that shows it.
    pool = replace(pool, room_changed=room_changed and not seeks, sought_at=now if seeks else pool.sought_at)
    return pool, tuple(round_.effects)


def _all_due(pool: Pool, now: float) -> list[str]:
    return [alias for alias, due in pool.due.items() if due <= now]


def _sought_again_at(pool: Pool) -> float:
    """When those who lack room may be looked at again: at once where they are few, so many a second where not.

    Those of them for whom requests wait are looked at every second anyway, and those for whom room is being made on a
    worker at once when something changes there.
    """
    asked = len(pool.shortages) * min(len(pool.workers), ASKED_MAX)
    return pool.sought_at + max(0, asked - _SOUGHT_AT_ONCE) / _SOUGHT_PER_S


def _in_turn(pool: Pool, aliases: frozenset[str], now: float) -> tuple[frozenset[str], frozenset[str]]:
    """Of these so many as one round can sort, and the rest: who waits, and who is due for longest."""
    if len(aliases) <= _SORTED_MAX:
        return aliases, frozenset()
    ranked = ((_idle(pool, alias), min(now, pool.due.get(alias, now)), alias) for alias in aliases)
    first = frozenset(alias for _, _, alias in nsmallest(_SORTED_MAX, ranked))
    return first, aliases - first


def _idle(pool: Pool, alias: str) -> bool:
    demand = pool.demand.get(alias)
    return demand is None or demand.waiting_since is None


def _settled(pool: Pool, looked_at: frozenset[str], postponed: frozenset[str], round_: Round) -> Pool:
    """With what was decided, and when it is to be decided anew."""
    done, short = looked_at - postponed, round_.shortages
    shortages = {alias: reason for alias, reason in pool.shortages.items() if alias not in done}
    shortages |= {alias: each.reason for alias, each in short.items()}
    hopeless = (pool.hopeless - done).union(alias for alias, each in short.items() if each.hopeless)
    told = {alias for alias in done if pool.shortages.get(alias) != shortages.get(alias)}
    told |= pool.hopeless ^ hopeless
    pool = replace(
        pool,
        wishes={**pool.wishes, **round_.wishes},
        shortages=shortages,
        hopeless=hopeless,
        kept_for=round_.kept_for,
        ledgers=round_.ledgers,
        news=pool.news | told,
    )
    due = dict(pool.due)
    for alias in done | pool.touched:
        if (at := _due_at(pool, alias, round_.now)) < math.inf:
            due[alias] = at
        else:
            due.pop(alias, None)
    for alias in postponed:
        due[alias] = min(round_.now, due.get(alias, math.inf))
    return replace(pool, due=due, due_first=min(due.values(), default=math.inf))


def _dismiss_drained(pool: Pool, round_: Round) -> Pool:
    """Tell the workers that are drained, and run nothing any more, that they may end."""
    for worker_id, told_at in pool.draining.items():
        if _is_empty(pool, worker_id) and is_due(told_at, ORDER_RETRY_S, round_.now):
            round_.give(Dismiss(worker_id=worker_id))
            pool = replace(pool, draining={**pool.draining, worker_id: round_.now})
    return pool


def _is_empty(pool: Pool, worker_id: str) -> bool:
    """Of one that is drained: it runs nothing. Whose process has ended though nobody told it to may be back."""
    may_be_back = worker_id in pool.missed and pool.draining[worker_id] == -math.inf
    return worker_id in pool.workers and worker_id not in pool.on_worker and not may_be_back


def _urgency(pool: Pool, model: Model, now: float) -> tuple[float, float, int, str]:
    """Whoever has waited longer than a turn comes first; then those for whom it pays most; of equals, the oldest wait.

    That is how many requests wait for each second that it takes to bring the model up: so memory that is short is not
    given to a single request while several wait for another model.
    """
    demand = pool.demand[model.alias]
    if demand.waiting_since is None:
        return math.inf, 0.0, model.created, model.alias
    start_s = typical(pool.learned.get(model.alias, {}), What.START, unknown=START_GUESS_S)
    pays = demand.waiting / max(0.1, start_s)
    return -math.inf if is_overdue(pool, model.alias, now) else -pays, demand.waiting_since, model.created, model.alias


def _stop_unwanted(pool: Pool, alias: str, round_: Round) -> Pool:
    model = pool.models.get(alias)
    for instance in instances_of(pool, alias):
        key = key_of(instance)
        if not is_alive(pool, instance.worker_id):
            continue
        if instance.stopping:
            if is_due(instance.ordered_at, ORDER_RETRY_S, round_.now):
                again = Stop(worker_id=key[0], instance=key[1], reason="asked again", drain_s=instance.drain_s)
                round_.give(again)
                pool = change(pool, key, ordered_at=round_.now)
        elif model is not None and instance.key not in (model.key, *model.replaces):
            pool = stop(pool, key, "the alias was registered with another model", round_)
        elif model is None and instance.unwanted_since is None:
            pool = change(pool, key, unwanted_since=round_.now)
        elif model is None and is_due(instance.unwanted_since, UNWANTED_GRACE_S, round_.now):
            pool = stop(pool, key, "its model is not registered", round_)
        elif model is not None and instance.unwanted_since is not None:
            pool = change(pool, key, unwanted_since=None)
    return pool


def _advance(pool: Pool, model: Model, round_: Round) -> Pool:
    """Take the steps of one model that are due, and note what keeps it from another one."""
    round_.cost += _LOOK_COST
    pool = _stop_surplus(pool, model, round_)
    pool, shortage = _repeat_orders(pool, model, round_)
    for _ in range(_STEPS_MAX):
        replicas = [as_replica(pool, each) for each in usable_of(pool, model)]
        decided = wish(
            with_successors(pool, model, round_.now),
            pool.demand[model.alias],
            replicas,
            changed_at=pool.stepped_at.get(model.alias, -math.inf),
            wanted_once=to_be_up(pool, model) or is_succeeded(pool, model),
            now=round_.now,
        )
        round_.wishes[model.alias] = decided
        if decided.step is Step.NONE:
            break
        before = len(round_.effects)
        pool, blocked = _take(pool, model, decided, round_)
        if len(round_.effects) > before:
            pool = replace(pool, stepped_at={**pool.stepped_at, model.alias: round_.now})
        if blocked:
            shortage = blocked
            due = round_.now + RECHECK_S if decided.urgent else blocked.due
            round_.wishes[model.alias] = replace(decided, due=due)
            break
    if shortage is not None:
        round_.shortages[model.alias] = shortage
    return let_go(pool, model, round_)


def _stop_surplus(pool: Pool, model: Model, round_: Round) -> Pool:
    most = scaling_of(pool.policy, model).max_replicas
    for surplus in sorted(usable_of(pool, model), key=worth)[most:]:
        pool = stop(pool, key_of(surplus), f"{most} replicas are the most", round_)
    return pool


def _repeat_orders(pool: Pool, model: Model, round_: Round) -> tuple[Pool, Shortage | None]:
    """Start failed instances again when that is due, and give orders again that nothing came of."""
    wanted = may_be_missed(pool, model, round_.now)
    shortage = None
    for instance in (*usable_of(pool, model), *(each for each in outgoing_of(pool, model) if not has_failed(each))):
        order_due = is_due(instance.ordered_at, ORDER_RETRY_S, round_.now)
        if has_failed(instance) and is_due(instance.retry_at, 0.0, round_.now):
            pool, shortage = _retry(pool, model, instance, round_) if wanted else (_set_by(pool, instance), shortage)
        elif has_failed(instance) and model.alias in pool.shortages:
            shortage = Shortage(pool.shortages[model.alias], hopeless=model.alias in pool.hopeless)
        elif not instance.acknowledged and order_due:
            pool = start(pool, instance, round_)
        elif instance.order is not Step.NONE and order_due:
            pool = order(pool, instance, instance.order, "asked again", round_)
    return pool, shortage


def _set_by(pool: Pool, instance: Instance) -> Pool:
    """Nobody would miss it: it is tried again as soon as somebody does."""
    return pool if instance.retry_at == -math.inf else change(pool, key_of(instance), retry_at=-math.inf)


def _retry(pool: Pool, model: Model, instance: Instance, round_: Round) -> tuple[Pool, Shortage | None]:
    """Start one that failed, where there is room for it now, which may be somewhere else."""
    key = key_of(instance)
    choice = find_place(pool, model, round_, failed=instance)
    if isinstance(choice, Refusal):
        pool = change(pool, key, retry_at=round_.now + RECHECK_S)
        if not pool.demand[model.alias].waiting:
            return pool, Shortage(choice.reason, hopeless=not ever_fits(pool, model))
        return make_room(pool, model, alive_workers(pool), lacking_of(pool, model, round_, instance), choice, round_)
    again = new_instance(pool, model, instance.instance, choice)
    if choice.worker_id != instance.worker_id:
        if key_of(again) in pool.instances:
            return change(pool, key, retry_at=round_.now + RECHECK_S), Shortage("waits for its former instance to end")
        pool = stop(pool, key, f"it failed, and is started on {choice.worker_id}", round_)
        instance = replace(instance, failed_at=0.0)  # by the clock of the worker that it leaves
    again = replace(
        again,
        failures=instance.failures,
        failed_at=instance.failed_at,
        reason=instance.reason,
        permanent=instance.permanent,
    )
    return start(pool, again, round_), None


def _take(pool: Pool, model: Model, decided: Wish, round_: Round) -> tuple[Pool, Shortage | None]:
    """One step, or what is in its way."""
    if decided.step is Step.START:
        return _start_another(pool, model, decided, round_)
    instance = next(each for each in usable_of(pool, model) if each.instance == decided.replica)
    step = within_host(pool, instance, decided.step, round_)
    if step is Step.UNLOAD:
        return stop(pool, key_of(instance), decided.reason, round_), None
    if not is_due(instance.ordered_at, ORDER_RETRY_S, round_.now) and instance.ordered_in is instance.state:
        due = (instance.ordered_at or 0.0) + ORDER_RETRY_S
        return pool, Shortage("its last order was refused a moment ago", due=due)
    if step is Step.WAKE:
        pool, blocked = _room_to_wake(pool, model, instance, decided, round_)
        if blocked and decided.urgent and not blocked.passing:
            return _elsewhere(pool, model, instance, decided, blocked, round_)
        if blocked:
            return pool, blocked
    return order(pool, instance, step, decided.reason, round_), None


def _start_another(pool: Pool, model: Model, decided: Wish, round_: Round) -> tuple[Pool, Shortage | None]:
    mine = instances_of(pool, model.alias)
    ending = {
        each.instance for each in mine if each.stopping and each.drain_s is None and is_alive(pool, each.worker_id)
    }
    name = free_name(model.alias, {each.instance for each in mine} - ending)
    if name in ending:
        return pool, Shortage("waits for its former instance to end")
    asked_for = (model.engine, need_of(pool, model), scaling_of(pool.policy, model).min_replicas)
    if not decided.urgent and asked_for in round_.refused:
        return pool, round_.refused[asked_for]
    choice = find_place(pool, model, round_, unless_kept=not decided.urgent)
    if isinstance(choice, Placement):
        return start(pool, new_instance(pool, model, name, choice), round_), None
    if not decided.urgent:
        round_.refused[asked_for] = Shortage(choice.reason, hopeless=not ever_fits(pool, model))
        return pool, round_.refused[asked_for]
    return make_room(pool, model, alive_workers(pool), lacking_of(pool, model, round_), choice, round_)


def _elsewhere(
    pool: Pool, model: Model, sleeper: Instance, decided: Wish, blocked: Shortage, round_: Round
) -> tuple[Pool, Shortage | None]:
    """Somebody waits, and this sleeper cannot be woken: another one that can, or a start where there is room."""
    mine = instances_of(pool, model.alias)
    usable = usable_of(pool, model)
    for other in usable:
        if other.state in _ASLEEP and other.order is Step.NONE and not lacking_to_wake(pool, other, round_):
            return order(pool, other, Step.WAKE, decided.reason, round_), None
    choice = find_place(pool, model, round_)
    if isinstance(choice, Refusal) or choice.worker_id == sleeper.worker_id:
        return pool, blocked
    if len(usable) >= scaling_of(pool.policy, model).max_replicas:
        pool = stop(pool, key_of(sleeper), f"there is room for it on {choice.worker_id}", round_)
    name = free_name(model.alias, {each.instance for each in mine})
    return start(pool, new_instance(pool, model, name, choice), round_), None


def _room_to_wake(
    pool: Pool, model: Model, instance: Instance, decided: Wish, round_: Round
) -> tuple[Pool, Shortage | None]:
    """Nothing in the way, or what; others give way where somebody waits."""
    short = lacking_to_wake(pool, instance, round_)
    if not decided.urgent and (other := round_.kept_for.get(instance.worker_id)):
        return pool, Shortage(leaves_room_to(other))
    if not short:
        return pool, None
    numbers = ", ".join(f"{gb(bytes_)} on device {device}" for device, bytes_ in sorted(short.items()))
    refusal = Refusal(f"{instance.worker_id}: to wake {instance.instance} lacks {numbers}")
    if not decided.urgent:
        return pool, Shortage(refusal.reason)
    return make_room(pool, model, [instance.worker_id], lambda _: [short], refusal, round_)


def next_deadline(pool: Pool) -> float | None:
    """When `Tick` is due although nothing else happens; None when time alone changes nothing."""
    due = min(pool.due_first, pool.workers_due, pool.recover_until if pool.recovering else math.inf)
    if pool.room_changed and pool.shortages:
        due = min(due, _sought_again_at(pool))
    told = [at + ORDER_RETRY_S for worker_id, at in pool.draining.items() if _is_empty(pool, worker_id)]
    due = min([due, *told])
    return None if due == math.inf else due


def _due_at(pool: Pool, alias: str, now: float) -> float:
    """When to look at this model and its instances although nothing happens; infinity: not at all."""
    model, decided = pool.models.get(alias), pool.wishes.get(alias)
    wanted = model is not None and may_be_missed(pool, model, now)
    times = [math.inf if decided is None else decided.due]
    if model is not None and outgoing_of(pool, model):
        unused = pool.demand[alias].asked_at + scaling_of(pool.policy, model).idle_sleep_1_s
        times += [unused] if unused > now else []
    for instance in instances_of(pool, alias):
        if not is_alive(pool, instance.worker_id):
            continue
        open_ = instance.stopping or not instance.acknowledged or instance.order is not Step.NONE
        if instance.ordered_at is not None and open_:
            times.append(instance.ordered_at + ORDER_RETRY_S)
        if instance.stopping:
            continue
        if instance.unwanted_since is not None:
            times.append(instance.unwanted_since + UNWANTED_GRACE_S)
        if instance.retry_at is not None and wanted:
            times.append(instance.retry_at)
    return min(times)
