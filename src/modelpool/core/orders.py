"""The orders that one round gives, and what it knows meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
from msgspec.structs import replace

from modelpool.core.ledger import Ledger, ledger
from modelpool.core.lifecycle import InstanceState, sleep_level
from modelpool.core.pool import Instance, Key, Pool, Worker, change, has_failed, instances_on, key_of, put
from modelpool.core.scaling import LEVEL, Step, Wish

ORDER_RETRY_S = 5.0
"""An order whose effect has not shown up in a report by then is given again."""
_ORDER_COST = 10.0


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


class Shortage(msgspec.Struct, frozen=True):
    """What keeps a step from being taken. `hopeless`: it will not pass by itself, nor because somebody asks.

    `passing`: room is being made. `due`: when time alone may have lifted it.
    """

    reason: str
    hopeless: bool = False
    passing: bool = False
    due: float = math.inf


class Round:
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


def start(pool: Pool, instance: Instance, round_: Round) -> Pool:
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


def stop(pool: Pool, key: Key, reason: str, round_: Round, *, drain_s: float | None = None) -> Pool:
    round_.give(Stop(worker_id=key[0], instance=key[1], reason=reason, drain_s=drain_s))
    return change(pool, key, stopping=True, drain_s=drain_s, ordered_at=round_.now, starting_since=round_.now)


def order(pool: Pool, instance: Instance, step: Step, reason: str, round_: Round) -> Pool:
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


def within_host(pool: Pool, instance: Instance, step: Step, round_: Round) -> Step:
    """The step, or the next one down that the machine has room for."""
    if step not in LEVEL:
        return step
    books = round_.ledger(pool, pool.workers[instance.worker_id])
    deeper = (Step.SLEEP_1, Step.SLEEP_2)[LEVEL[step] - 1 :]
    return next((each for each in deeper if can_sleep(instance, each, books)), Step.UNLOAD)


def can_sleep(instance: Instance, step: Step, books: Ledger) -> bool:
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


def is_due(since: float | None, after: float, now: float) -> bool:
    return since is not None and now >= since + after
