"""What the manager does: the orders that bring what runs nearer to what is wanted.

Pure, like core/pool.py: the manager's loop brings the events and the time, and carries out the effects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import nlargest, nsmallest
from itertools import islice

import msgspec
from msgspec.structs import replace

from modelpool.core.eviction import SOON_S, Holder, NoPlan, Plan, Way, first_plan
from modelpool.core.learned import HELD, HELD_ON_HOST, SLEEP, WAKE, What, expected, slow, typical
from modelpool.core.ledger import Ledger, accelerated, ledger, on_device, on_host
from modelpool.core.lifecycle import InstanceState, sleep_level
from modelpool.core.outgoing import UNHURRIED_S, is_up, needed, why_outgoing
from modelpool.core.placement import GB, HOST, NAMED_MAX, Candidate, Need, Placement, Refusal, gb, place, shortfalls
from modelpool.core.pool import (
    UNWANTED_GRACE_S,
    Event,
    Instance,
    Key,
    Model,
    Policy,
    Pool,
    Worker,
    apply,
    change,
    has_failed,
    instances_of,
    instances_on,
    is_alive,
    key_of,
    put,
)
from modelpool.core.scaling import LEVEL, Replica, ScalingPolicy, Step, Wish, wish

ORDER_RETRY_S = 5.0
"""An order whose effect has not shown up in a report by then is given again."""
_STEPS_MAX = 64
_RECHECK_S = 1.0
"""While somebody waits for memory: how often it is looked whether who holds it may go now."""
_MINUTE_S = 60.0
_START_GUESS_S = 10.0
_TURN_FACTOR = 4.0
# What a round costs is counted in looks at a model, 50 µs each on a busy machine, so that it takes some 15 ms.
_COST_MAX = 300.0
_LOOK_COST = 1.0
_ORDER_COST = 10.0
_WORKER_COST = 0.03
_HOLDER_COST = 1.0
_SORTED_MAX = 500
"""So many models are considered in one round."""
_SOUGHT_AT_ONCE = 200
_SOUGHT_PER_S = 5000.0
"""When there may be more room, so many workers are asked at once for those who lack it; if more, so many a second."""
_ASKED_MAX = 25
"""Workers of which it is asked at once who may give way there."""
_HOST_GUESS_BYTES = 2 * GB
"""Of the machine's memory, beside accelerators: what an engine's processes take, before that was measured."""
_CONTEXT_GUESS_BYTES = GB
"""What a sleeper leaves on an accelerator, before that was measured."""
_AVOIDED_AFTER = 2
"""Failures in a row after which a worker comes last."""
_DRAINING = InstanceState.DRAINING
_DOWN = (InstanceState.SLEEP_1, InstanceState.SLEEP_2, InstanceState.DRAINING, InstanceState.UNLOADED)
_COMING = (InstanceState.STARTING, InstanceState.WAKING)
_ASLEEP = (InstanceState.SLEEP_1, InstanceState.SLEEP_2)


class Start(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    instance: str
    alias: str
    devices: tuple[int, ...]


class Stop(msgspec.Struct, frozen=True, kw_only=True):
    """`drain_s`: what its requests in flight have; None: what its worker gives."""

    worker_id: str
    instance: str
    reason: str
    drain_s: float | None = None


class Sleep(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    instance: str
    level: int
    reason: str


class Wake(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    instance: str
    reason: str


class Dismiss(msgspec.Struct, frozen=True, kw_only=True):
    """The worker is drained: it may end."""

    worker_id: str
    instance: str = ""


Effect = Start | Stop | Sleep | Wake | Dismiss


class _Round:
    """One reconciliation: its time, the orders so far, what was decided, and what that has cost."""

    def __init__(self, now: float, ledgers: Mapping[str, Ledger]) -> None:
        self.now = now
        self.ledgers = dict(ledgers)
        """By worker: those that were worked out, and hold."""
        self.cost = 0.0
        self.effects: list[Effect] = []
        self.wishes: dict[str, Wish] = {}
        self.shortages: dict[str, Shortage] = {}
        self.kept_for: dict[str, str] = {}
        """worker → the model for whose requests room is being made there."""
        self.refused: dict[object, Shortage] = {}
        """What was not to be had where nobody waits: no order makes room at once."""

    def give(self, effect: Effect) -> None:
        """An order. What is set aside on its worker changes with it."""
        self.effects.append(effect)
        self.cost += _ORDER_COST
        self.ledgers.pop(effect.worker_id, None)

    def ledger(self, pool: Pool, worker: Worker) -> Ledger:
        """What there is room for on a worker now."""
        books = self.ledgers.get(worker.worker_id)
        if books is None:
            books = self.ledgers[worker.worker_id] = ledger(worker, instances_on(pool, worker.worker_id))
        return books


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
    if seeks := room_changed and _sought_again_at(pool) <= now:
        looked_at = looked_at.union(pool.shortages)  # the room may be theirs now
    elif not looked_at and not pool.draining:
        return pool, ()
    looked_at, left = _in_turn(pool, looked_at, now)
    round_ = _Round(now, pool.ledgers)
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
    asked = len(pool.shortages) * min(len(pool.workers), _ASKED_MAX)
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


def _settled(pool: Pool, looked_at: frozenset[str], postponed: frozenset[str], round_: _Round) -> Pool:
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


def _dismiss_drained(pool: Pool, round_: _Round) -> Pool:
    """Tell the workers that are drained, and run nothing any more, that they may end."""
    for worker_id, told_at in pool.draining.items():
        if _is_empty(pool, worker_id) and _due(told_at, ORDER_RETRY_S, round_.now):
            round_.give(Dismiss(worker_id=worker_id))
            pool = replace(pool, draining={**pool.draining, worker_id: round_.now})
    return pool


def _is_empty(pool: Pool, worker_id: str) -> bool:
    return worker_id in pool.workers and worker_id not in pool.on_worker


class Shortage(msgspec.Struct, frozen=True):
    """What keeps a step from being taken. `hopeless`: it will not pass by itself, nor because somebody asks.

    `passing`: room is being made. `due`: when time alone may have lifted it.
    """

    reason: str
    hopeless: bool = False
    passing: bool = False
    due: float = math.inf


def _urgency(pool: Pool, model: Model, now: float) -> tuple[float, float, int, str]:
    """Whoever has waited longer than a turn comes first; then those for whom it pays most; of equals, the oldest wait.

    That is how many requests wait for each second that it takes to bring the model up: so memory that is short is not
    given to a single request while several wait for another model.
    """
    demand = pool.demand[model.alias]
    if demand.waiting_since is None:
        return math.inf, 0.0, model.created, model.alias
    start_s = typical(pool.learned.get(model.alias, {}), What.START, unknown=_START_GUESS_S)
    pays = demand.waiting / max(0.1, start_s)
    return -math.inf if _overdue(pool, model.alias, now) else -pays, demand.waiting_since, model.created, model.alias


def _overdue(pool: Pool, alias: str, now: float) -> bool:
    """Whether somebody has waited for it for more than the longest turn."""
    demand = pool.demand.get(alias)
    since = None if demand is None else demand.waiting_since
    return since is not None and now - since >= pool.policy.turn_max_s


def replicas_wanted(pool: Pool, model: Model) -> int:
    """How many there are to be now: those to be kept, one for who asks, and those that load brought up."""
    least = scaling_of(pool.policy, model).min_replicas
    asked = to_be_up(pool, model) or pool.demand[model.alias].waiting > 0 or any(map(is_up, _outgoing(pool, model)))
    up = [_replica(pool, each) for each in _usable(pool, model)]
    return max(least, 1 if asked else 0, sum(each.state not in _DOWN for each in up))


def to_be_up(pool: Pool, model: Model) -> bool:
    """Whether one replica is to be up although nobody asks."""
    return model.preload or model.alias in pool.wanted_up


def _stop_unwanted(pool: Pool, alias: str, round_: _Round) -> Pool:
    model = pool.models.get(alias)
    for instance in instances_of(pool, alias):
        key = key_of(instance)
        if not is_alive(pool, instance.worker_id):
            continue
        if instance.stopping:
            if _due(instance.ordered_at, ORDER_RETRY_S, round_.now):
                again = Stop(worker_id=key[0], instance=key[1], reason="asked again", drain_s=instance.drain_s)
                round_.give(again)
                pool = change(pool, key, ordered_at=round_.now)
        elif model is not None and instance.key not in (model.key, *model.replaces):
            pool = _stop(pool, key, "the alias was registered with another model", round_)
        elif model is None and instance.unwanted_since is None:
            pool = change(pool, key, unwanted_since=round_.now)
        elif model is None and _due(instance.unwanted_since, UNWANTED_GRACE_S, round_.now):
            pool = _stop(pool, key, "its model is not registered", round_)
        elif model is not None and instance.unwanted_since is not None:
            pool = change(pool, key, unwanted_since=None)
    return pool


def _stop(pool: Pool, key: Key, reason: str, round_: _Round, *, drain_s: float | None = None) -> Pool:
    round_.give(Stop(worker_id=key[0], instance=key[1], reason=reason, drain_s=drain_s))
    return change(pool, key, stopping=True, drain_s=drain_s, ordered_at=round_.now, starting_since=round_.now)


def _advance(pool: Pool, model: Model, round_: _Round) -> Pool:
    """Take the steps of one model that are due, and note what keeps it from another one."""
    round_.cost += _LOOK_COST
    pool = _stop_surplus(pool, model, round_)
    pool, shortage = _repeat_orders(pool, model, round_)
    for _ in range(_STEPS_MAX):
        replicas = [_replica(pool, each) for each in _usable(pool, model)]
        decided = wish(
            _with_successors(pool, model, round_.now),
            pool.demand[model.alias],
            replicas,
            changed_at=pool.stepped_at.get(model.alias, -math.inf),
            wanted_once=to_be_up(pool, model) or _is_succeeded(pool, model),
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
            due = round_.now + _RECHECK_S if decided.urgent else blocked.due
            round_.wishes[model.alias] = replace(decided, due=due)
            break
    if shortage is not None:
        round_.shortages[model.alias] = shortage
    return _let_go(pool, model, round_)


def _outgoing(pool: Pool, model: Model) -> list[Instance]:
    """Those of a model's instances that are to go once others are in their place."""
    if not pool.draining and not model.replaces:
        return []
    mine = instances_of(pool, model.alias)
    return [each for each in mine if not each.stopping and is_alive(pool, each.worker_id) and why_outgoing(pool, each)]


def _with_successors(pool: Pool, model: Model, now: float) -> ScalingPolicy:
    """The policy, with as many replicas to be kept as are needed in the place of those that go."""
    scaling = scaling_of(pool.policy, model)
    outgoing = [each for each in _outgoing(pool, model) if is_up(each)]
    if not outgoing or not _is_used(pool, model, now):
        return scaling
    return replace(scaling, min_replicas=_needed(pool, model, outgoing))


def _needed(pool: Pool, model: Model, outgoing: Iterable[Instance]) -> int:
    awake = [each for each in _usable(pool, model) if each.state is InstanceState.ACTIVE]
    serving = [_replica(pool, each) for each in (*outgoing, *awake)]
    return needed(scaling_of(pool.policy, model), pool.demand[model.alias], serving)


def _is_succeeded(pool: Pool, model: Model) -> bool:
    """Whether another one is to come up, where there is room, in the place of what goes; a sleeper is moved so."""
    if not (outgoing := [each for each in _outgoing(pool, model) if not has_failed(each)]):
        return False
    return any(map(is_up, outgoing)) or not _usable(pool, model)


def _is_used(pool: Pool, model: Model, now: float) -> bool:
    """Whether somebody would miss it: then others may have to give way to what takes the place of what goes."""
    scaling, demand = scaling_of(pool.policy, model), pool.demand[model.alias]
    return scaling.min_replicas > 0 or demand.busy or now < demand.asked_at + scaling.idle_sleep_1_s


def _let_go(pool: Pool, model: Model, round_: _Round) -> Pool:
    """End those that are to go and have others in their place, the least busy ones first."""
    if not (outgoing := _outgoing(pool, model)):
        return pool
    usable = _usable(pool, model)
    awake = [each for each in usable if each.state is InstanceState.ACTIVE and each.order is Step.NONE]
    up = sorted(filter(is_up, outgoing), key=lambda each: pool.demand[model.alias].inflight(each.instance))
    short, ending = model.alias in round_.shortages, any(each.stopping for each in instances_of(pool, model.alias))
    enough = len(up) + len(awake) - max(len(awake), _needed(pool, model, up))
    # Where there is no room for all that the load asks for, one goes for one that came.
    replaced = up[: max(enough, 1 if short and not ending else 0)] if awake else []
    nowhere = short or any(map(has_failed, usable))
    missed = _is_used(pool, model, round_.now)
    for each in outgoing:
        drained, asleep = each.worker_id in pool.draining, each.state in _ASLEEP and each.order is Step.NONE
        # On a worker that is drained nobody waits for what nobody would miss, and for a sleeper only while it may move.
        dropped = drained and ((nowhere and not missed) or (asleep and bool(usable or nowhere)))
        if each in replaced or has_failed(each) or (asleep and awake) or dropped:
            pool = _stop(pool, key_of(each), why_outgoing(pool, each), round_, drain_s=UNHURRIED_S)
    return pool


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


def _usable(pool: Pool, model: Model) -> list[Instance]:
    """Those of a model's instances that count as its replicas."""
    return [
        each
        for each in instances_of(pool, model.alias)
        if not each.stopping
        and each.key == model.key
        and is_alive(pool, each.worker_id)
        and each.worker_id not in pool.draining
    ]


def _replica(pool: Pool, instance: Instance) -> Replica:
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


def _stop_surplus(pool: Pool, model: Model, round_: _Round) -> Pool:
    most = scaling_of(pool.policy, model).max_replicas
    for surplus in sorted(_usable(pool, model), key=_worth)[most:]:
        pool = _stop(pool, key_of(surplus), f"{most} replicas are the most", round_)
    return pool


def _repeat_orders(pool: Pool, model: Model, round_: _Round) -> tuple[Pool, Shortage | None]:
    """Start failed instances again when that is due, and give orders again that nothing came of."""
    wanted = _wanted(pool, model, round_.now)
    shortage = None
    for instance in (*_usable(pool, model), *(each for each in _outgoing(pool, model) if not has_failed(each))):
        order_due = _due(instance.ordered_at, ORDER_RETRY_S, round_.now)
        if has_failed(instance) and _due(instance.retry_at, 0.0, round_.now):
            pool, shortage = _retry(pool, model, instance, round_) if wanted else (_set_by(pool, instance), shortage)
        elif has_failed(instance) and model.alias in pool.shortages:
            shortage = Shortage(pool.shortages[model.alias], hopeless=model.alias in pool.hopeless)
        elif not instance.acknowledged and order_due:
            pool = _start(pool, instance, round_)
        elif instance.order is not Step.NONE and order_due:
            pool = _order(pool, instance, instance.order, "asked again", round_)
    return pool, shortage


def _set_by(pool: Pool, instance: Instance) -> Pool:
    """Nobody would miss it: it is tried again as soon as somebody does."""
    return pool if instance.retry_at == -math.inf else change(pool, key_of(instance), retry_at=-math.inf)


def _retry(pool: Pool, model: Model, instance: Instance, round_: _Round) -> tuple[Pool, Shortage | None]:
    """Start one that failed, where there is room for it now, which may be somewhere else."""
    key = key_of(instance)
    choice = _find_place(pool, model, round_, failed=instance)
    if isinstance(choice, Refusal):
        pool = change(pool, key, retry_at=round_.now + _RECHECK_S)
        if not pool.demand[model.alias].waiting:
            return pool, Shortage(choice.reason, hopeless=not ever_fits(pool, model))
        return _make_room(pool, model, _alive_workers(pool), _lacking(pool, model, round_, instance), choice, round_)
    again = _new_instance(pool, model, instance.instance, choice)
    if choice.worker_id != instance.worker_id:
        if key_of(again) in pool.instances:
            return change(pool, key, retry_at=round_.now + _RECHECK_S), Shortage("waits for its former instance to end")
        pool = _stop(pool, key, f"it failed, and is started on {choice.worker_id}", round_)
        instance = replace(instance, failed_at=0.0)  # by the clock of the worker that it leaves
    again = replace(
        again,
        failures=instance.failures,
        failed_at=instance.failed_at,
        reason=instance.reason,
        permanent=instance.permanent,
    )
    return _start(pool, again, round_), None


def _wanted(pool: Pool, model: Model, now: float) -> bool:
    """Whether somebody may miss it: else an instance that failed is not tried again."""
    demand, scaling = pool.demand[model.alias], scaling_of(pool.policy, model)
    recently = now < demand.asked_at + scaling.idle_sleep_1_s
    return to_be_up(pool, model) or scaling.min_replicas > 0 or demand.busy or recently


def _take(pool: Pool, model: Model, decided: Wish, round_: _Round) -> tuple[Pool, Shortage | None]:
    """One step, or what is in its way."""
    if decided.step is Step.START:
        return _start_another(pool, model, decided, round_)
    instance = next(each for each in _usable(pool, model) if each.instance == decided.replica)
    step = _within_host(pool, instance, decided.step, round_)
    if step is Step.UNLOAD:
        return _stop(pool, key_of(instance), decided.reason, round_), None
    if not _due(instance.ordered_at, ORDER_RETRY_S, round_.now) and instance.ordered_in is instance.state:
        due = (instance.ordered_at or 0.0) + ORDER_RETRY_S
        return pool, Shortage("its last order was refused a moment ago", due=due)
    if step is Step.WAKE:
        pool, blocked = _room_to_wake(pool, model, instance, decided, round_)
        if blocked and decided.urgent and not blocked.passing:
            return _elsewhere(pool, model, instance, decided, blocked, round_)
        if blocked:
            return pool, blocked
    return _order(pool, instance, step, decided.reason, round_), None


def _within_host(pool: Pool, instance: Instance, step: Step, round_: _Round) -> Step:
    """The step, or the next one down that the machine has room for."""
    if step not in LEVEL:
        return step
    books = round_.ledger(pool, pool.workers[instance.worker_id])
    deeper = (Step.SLEEP_1, Step.SLEEP_2)[LEVEL[step] - 1 :]
    return next((each for each in deeper if _can_sleep(instance, each, books)), Step.UNLOAD)


def _can_sleep(instance: Instance, step: Step, books: Ledger) -> bool:
    """Whether it can go down to that level, and there is room for how that is done."""
    if LEVEL[step] not in instance.levels:
        return False
    if books.host is None:
        return True
    if step is Step.SLEEP_1:
        return books.host.free_bytes >= instance.weights_bytes
    if instance.state is not InstanceState.SLEEP_1:
        return True
    # It wakes in between.
    rooms = [room for index in instance.devices if (room := books.room(index)) is not None]
    return all(room.free_bytes >= instance.memory_bytes - instance.held_bytes for room in rooms)


def _order(pool: Pool, instance: Instance, step: Step, reason: str, round_: _Round) -> Pool:
    """Have it sleep or wake. Until a report shows that it began it counts as being on its way."""
    key, state = key_of(instance), instance.state
    again = instance.order is step
    if step is Step.WAKE:
        round_.give(Wake(worker_id=key[0], instance=key[1], reason=reason))
    else:
        round_.give(Sleep(worker_id=key[0], instance=key[1], level=LEVEL[step], reason=reason))
        if state is InstanceState.ACTIVE:
            state = InstanceState.DRAINING  # no route leads there from now on
    return change(
        pool,
        key,
        state=state,
        order=step,
        ordered_in=instance.ordered_in if again else instance.state,
        ordered_at=round_.now,
        starting_since=instance.starting_since if again else round_.now,
        woken_from=sleep_level(instance.state) if step is Step.WAKE and not again else instance.woken_from,
        idle_since=pool.demand[instance.alias].asked_at if instance.alias in pool.demand else round_.now,
    )


def _start_another(pool: Pool, model: Model, decided: Wish, round_: _Round) -> tuple[Pool, Shortage | None]:
    mine = instances_of(pool, model.alias)
    ending = {
        each.instance for each in mine if each.stopping and each.drain_s is None and is_alive(pool, each.worker_id)
    }
    name = free_name(model.alias, {each.instance for each in mine} - ending)
    if name in ending:
        return pool, Shortage("waits for its former instance to end")
    asked_for = (model.engine, _need(pool, model), scaling_of(pool.policy, model).min_replicas)
    if not decided.urgent and asked_for in round_.refused:
        return pool, round_.refused[asked_for]
    choice = _find_place(pool, model, round_, unless_kept=not decided.urgent)
    if isinstance(choice, Placement):
        return _start(pool, _new_instance(pool, model, name, choice), round_), None
    if not decided.urgent:
        round_.refused[asked_for] = Shortage(choice.reason, hopeless=not ever_fits(pool, model))
        return pool, round_.refused[asked_for]
    return _make_room(pool, model, _alive_workers(pool), _lacking(pool, model, round_), choice, round_)


Lacking = Callable[[str], Iterable[Mapping[int, int]]]
"""worker → what is lacking there, in bytes by device, for one set of devices after the other."""


def _lacking(pool: Pool, model: Model, round_: _Round, failed: Instance | None = None) -> Lacking:
    need = _need(pool, model)
    return lambda worker_id: shortfalls(need, _candidate(pool, model, pool.workers[worker_id], round_, failed))


def _elsewhere(
    pool: Pool, model: Model, sleeper: Instance, decided: Wish, blocked: Shortage, round_: _Round
) -> tuple[Pool, Shortage | None]:
    """Somebody waits, and this sleeper cannot be woken: another one that can, or a start where there is room."""
    mine = instances_of(pool, model.alias)
    usable = _usable(pool, model)
    for other in usable:
        if other.state in _ASLEEP and other.order is Step.NONE and not _lacking_to_wake(pool, other, round_):
            return _order(pool, other, Step.WAKE, decided.reason, round_), None
    choice = _find_place(pool, model, round_)
    if isinstance(choice, Refusal) or choice.worker_id == sleeper.worker_id:
        return pool, blocked
    if len(usable) >= scaling_of(pool.policy, model).max_replicas:
        pool = _stop(pool, key_of(sleeper), f"there is room for it on {choice.worker_id}", round_)
    name = free_name(model.alias, {each.instance for each in mine})
    return _start(pool, _new_instance(pool, model, name, choice), round_), None


def _room_to_wake(
    pool: Pool, model: Model, instance: Instance, decided: Wish, round_: _Round
) -> tuple[Pool, Shortage | None]:
    """Nothing in the way, or what; others give way where somebody waits."""
    short = _lacking_to_wake(pool, instance, round_)
    if not decided.urgent and (other := round_.kept_for.get(instance.worker_id)):
        return pool, Shortage(_leaves_room_to(other))
    if not short:
        return pool, None
    numbers = ", ".join(f"{gb(bytes_)} on device {device}" for device, bytes_ in sorted(short.items()))
    refusal = Refusal(f"{instance.worker_id}: to wake {instance.instance} lacks {numbers}")
    if not decided.urgent:
        return pool, Shortage(refusal.reason)
    return _make_room(pool, model, [instance.worker_id], lambda _: [short], refusal, round_)


def _lacking_to_wake(pool: Pool, instance: Instance, round_: _Round) -> dict[int, int]:
    """Bytes by device."""
    worker = pool.workers[instance.worker_id]
    books = _left_to(instance.alias, pool, worker, round_)
    needed = on_device(replace(instance, order=Step.WAKE), accelerated=accelerated(worker)).unseen
    rooms = [room for index in instance.devices if (room := books.room(index)) is not None]
    return {room.index: needed - room.free_bytes for room in rooms if room.free_bytes < needed}


def _make_room(
    pool: Pool,
    model: Model,
    workers: Sequence[str],
    lacking: Lacking,
    refusal: Refusal,
    round_: _Round,
) -> tuple[Pool, Shortage | None]:
    """Have others give way on that worker of these where it costs least; say what is waited for, or why nobody can.

    Who is brought up without being asked for leaves alone what becomes free there meanwhile.
    """
    plans: list[tuple[float, str, Plan]] = []
    refusals: list[tuple[str, NoPlan]] = []
    moving = len(workers) > _ASKED_MAX
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
        if soon is not None and _overdue(pool, model.alias, round_.now):
            _keep_room(pool, soon, model, round_)
        reasons = [refusal.reason, *(f"{name}: {each.reason}" for name, each in refusals[:NAMED_MAX])]
        return pool, Shortage("; ".join(reasons), hopeless=not moving)
    _, worker_id, cheapest = min(plans, key=lambda each: each[:2])
    for eviction in cheapest.evictions:
        key = (worker_id, eviction.instance)
        # Each of several sleeps may have room in the machine's memory, and all together not.
        step = _within_host(pool, pool.instances[key], eviction.step, round_)
        if step is Step.UNLOAD:
            pool = _stop(pool, key, eviction.reason, round_)
        else:
            pool = _order(pool, pool.instances[key], step, eviction.reason, round_)
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
    first = int(now / _RECHECK_S) * _ASKED_MAX % max(1, len(workers))
    in_turn = [*workers[first : first + _ASKED_MAX], *workers[:first]][:_ASKED_MAX]
    return [*begun, *(worker_id for worker_id in in_turn if worker_id not in begun)]


def _keep_room(pool: Pool, worker_id: str, model: Model, round_: _Round) -> None:
    other = round_.kept_for.get(worker_id)
    if pool.demand[model.alias].waiting and not (other and _overdue(pool, other, round_.now)):
        round_.kept_for[worker_id] = model.alias


def _left_to(alias: str, pool: Pool, worker: Worker, round_: _Round) -> Ledger:
    """What this model may take there: not what an overdue one needs, else any that needs less would be first for ever.

    On all devices, since any may become free: for as long as a turn and a swap take.
    """
    books, other = round_.ledger(pool, worker), round_.kept_for.get(worker.worker_id)
    if other is None or other == alias or other not in pool.models or not _overdue(pool, other, round_.now):
        return books
    need = _need(pool, pool.models[other])
    left = [min(each.free_bytes, max(0, each.free_bytes - need.on(each))) for each in books.devices]
    devices = zip(books.devices, left, strict=True)
    return replace(books, devices=tuple(replace(each, free_bytes=bytes_) for each, bytes_ in devices))


def _unless_kept(candidate: Candidate, round_: _Round) -> Candidate:
    other = round_.kept_for.get(candidate.worker_id)
    return replace(candidate, refusal=_leaves_room_to(other)) if other else candidate


def _leaves_room_to(alias: str) -> str:
    return f"leaves the room to {alias}, which is asked for"


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


def _holder(pool: Pool, instance: Instance, books: Ledger, wanting: Model, round_: _Round) -> Holder:
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
    start_s = typical(learned, What.START, there, unknown=_START_GUESS_S)
    ways = [Way(step=Step.UNLOAD, frees=holds, back_s=start_s)]
    for step, level in LEVEL.items():
        if level <= sleep_level(instance.state) or not _can_sleep(instance, step, books):
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


def _kept(pool: Pool, instance: Instance, wanting: Model, round_: _Round) -> tuple[str, bool]:
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
    awake = [each for each in _usable(pool, model) if each.state is InstanceState.ACTIVE]
    if len(awake) <= scaling_of(pool.policy, model).min_replicas:
        return "is one of the replicas to be kept", False
    up_s = round_.now - instance.active_since
    if up_s < (turn := turn_s(pool, instance)):
        return f"is up for only {up_s:.0f} of {turn:.0f} s", True
    inflight = demand.inflight(instance.instance)
    if inflight and not _overdue(pool, wanting.alias, round_.now):
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


def ever_fits(pool: Pool, model: Model) -> bool:
    """Whether all wanted replicas would fit if nothing else ran on the workers that are there. True while none is."""
    need, replicas = _need(pool, model), max(1, scaling_of(pool.policy, model).min_replicas)
    there = [worker for worker in pool.workers.values() if worker.alive]
    if not there:
        return True
    fitting = (each for worker in there if isinstance(place(need, [each := _emptied(pool, model, worker)]), Placement))
    candidates = list(islice(fitting, replicas))
    if len(candidates) == replicas:  # one on each
        return True
    for _ in range(replicas):
        choice = place(need, candidates)
        if isinstance(choice, Refusal):
            return False
        candidates = [_less(each, choice) if each.worker_id == choice.worker_id else each for each in candidates]
    return True


def _emptied(pool: Pool, model: Model, worker: Worker) -> Candidate:
    """The worker, as if nothing ran there."""
    return Candidate(
        worker_id=worker.worker_id,
        devices=tuple(replace(device, free_bytes=device.total_bytes) for device in worker.devices),
        host=replace(worker.host, free_bytes=worker.host.total_bytes) if worker.host and accelerated(worker) else None,
        refusal=_refusal(pool, worker, model),
    )


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


def _start(pool: Pool, instance: Instance, round_: _Round) -> Pool:
    round_.give(
        Start(worker_id=instance.worker_id, instance=instance.instance, alias=instance.alias, devices=instance.devices)
    )
    again = instance.starting_since if not has_failed(instance) and instance.starting_since else round_.now
    started = replace(
        instance,
        state=InstanceState.STARTING,
        acknowledged=False,
        missing=0,
        ordered_at=round_.now,
        starting_since=again,
        retry_at=None,
    )
    return put(pool, key_of(instance), started)


def _new_instance(pool: Pool, model: Model, name: str, choice: Placement) -> Instance:
    return Instance(
        instance=name,
        alias=model.alias,
        key=model.key,
        worker_id=choice.worker_id,
        state=InstanceState.ABSENT,
        devices=choice.devices,
        memory_bytes=choice.bytes_each,
        host_bytes=_need(pool, model).host_bytes,
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


def _need(pool: Pool, model: Model) -> Need:
    guess = 0 if model.engine == "fake" else _HOST_GUESS_BYTES
    learned = pool.learned.get(model.alias, {})
    return replace(model.need(), host_bytes=int(slow(learned, What.HELD_ON_HOST_AWAKE, unknown=guess)))


def _find_place(
    pool: Pool, model: Model, round_: _Round, *, failed: Instance | None = None, unless_kept: bool = False
) -> Placement | Refusal:
    """Where a replica is to be started: looked for where there may be room for it, on the workers that are alive.

    `failed` is to be started again: it holds nothing where it was. `unless_kept`: not where room is kept for others.
    """
    round_.cost += _WORKER_COST * len(pool.workers)
    need = _need(pool, model)
    there = [worker for worker in pool.workers.values() if worker.alive]
    roomy = [worker for worker in there if round_.ledger(pool, worker).may_take(need)]
    if not roomy:  # that it is refused is clear: why, by the workers that a refusal names
        roomy = nlargest(NAMED_MAX, there, key=lambda worker: round_.ledger(pool, worker).most)
    candidates = [_candidate(pool, model, worker, round_, failed) for worker in roomy]
    if unless_kept:
        candidates = [_unless_kept(each, round_) for each in candidates]
    return place(need, candidates, others=len(there) - len(roomy))


def _candidate(pool: Pool, model: Model, worker: Worker, round_: _Round, failed: Instance | None = None) -> Candidate:
    books = _left_to(model.alias, pool, worker, round_)
    mine = (each for each in instances_of(pool, model.alias) if each is not failed)
    avoided = failed is not None and failed.worker_id == worker.worker_id
    return Candidate(
        worker_id=worker.worker_id,
        devices=books.devices,
        host=books.host,
        replicas_here=sum(each.worker_id == worker.worker_id for each in mine),
        refusal=_refusal(pool, worker, model),
        avoid=failed is not None and avoided and (failed.permanent or failed.failures >= _AVOIDED_AFTER),
        has_files=model.source in worker.files,
    )


def _alive_workers(pool: Pool) -> list[str]:
    return [worker.worker_id for worker in pool.workers.values() if worker.alive]


def _refusal(pool: Pool, worker: Worker, model: Model) -> str:
    if worker.worker_id in pool.draining:
        return "it is being drained"
    return worker.engines.get(model.engine, f"does not know the engine {model.engine!r}")


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
    wanted = model is not None and _wanted(pool, model, now)
    times = [math.inf if decided is None else decided.due]
    if model is not None and _outgoing(pool, model):
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


def _due(since: float | None, after: float, now: float) -> bool:
    return since is not None and now >= since + after
