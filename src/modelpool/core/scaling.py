"""What should become of one model next: another replica, one less, a step down the ladder, or nothing. And why.

    load = (in flight + waiting) / capacity, over its ACTIVE instances

Above `load_high`, now and on average, one more is brought up, SLEEP_1 before SLEEP_2 before a new replica; the next one
once the load with this one has been averaged. Below `load_low` the least busy one of several goes to sleep, if the
others then stay well below `load_high`, and not within `cooldown_s` of another change. So a steady load causes none.
One that nobody asks for goes down step by step, by its idle times. Whether there is room is not asked here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from modelpool.core.demand import Demand
from modelpool.core.lifecycle import InstanceState, sleep_level

_S = InstanceState
_COMING = (_S.STARTING, _S.WAKING)
_CALM = 0.8
"""Of `load_high`: what the load may be after a replica went away."""


class ScalingPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """For a model. Times in seconds; `idle_*_s`: without a request until it is in that state, infinity for never."""

    min_replicas: int = 0
    max_replicas: int = 4
    load_high: float = 0.7
    load_low: float = 0.3
    averaged_over_s: float = 5.0
    cooldown_s: float = 30.0
    idle_sleep_1_s: float = 300.0
    idle_sleep_2_s: float = 900.0
    idle_unload_s: float = 3600.0

    def idle_s(self, state: InstanceState, levels: tuple[int, ...]) -> float:
        """How long nobody must have asked for it until an instance with these levels leaves this state downwards."""
        if state is _S.SLEEP_1 and 2 not in levels:
            return self.idle_unload_s
        return {
            _S.ACTIVE: self.idle_sleep_1_s,
            _S.SLEEP_1: self.idle_sleep_2_s,
            _S.SLEEP_2: self.idle_unload_s,
        }.get(state, math.inf)


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One instance of the model.

    `idle_since`: for an ACTIVE one when the model was last asked for, for a sleeper what that was when it fell asleep.
    `levels`: the sleep levels that its engine has; one without goes from ACTIVE to UNLOADED.
    `up_since`: since when it is ACTIVE.
    """

    name: str
    number: int
    state: InstanceState
    idle_since: float
    inflight: int = 0
    capacity: int = 1
    levels: tuple[int, ...] = (1, 2)
    up_since: float = -math.inf


class Step(StrEnum):
    NONE = "none"
    WAKE = "wake"
    START = "start"
    SLEEP_1 = "sleep_1"
    SLEEP_2 = "sleep_2"
    UNLOAD = "unload"


LEVEL = {Step.SLEEP_1: 1, Step.SLEEP_2: 2}


class Later(msgspec.Struct, frozen=True):
    """The step that is taken then, if demand stays as it is."""

    step: Step
    replica: str
    at: float


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """`replica`: whom the step is about, none for START. `urgent`: somebody waits. `due`: when NONE may become more."""

    step: Step
    reason: str
    replica: str = ""
    urgent: bool = False
    due: float = math.inf
    later: Later | None = None


def wish(
    policy: ScalingPolicy,
    demand: Demand,
    replicas: Sequence[Replica],
    *,
    changed_at: float,
    wanted_once: bool,
    now: float,
) -> Wish:
    """The next step. `changed_at`: when the last was taken; `wanted_once`: it was not up since it was registered."""
    active = [each for each in replicas if each.state is _S.ACTIVE]
    coming = [each for each in replicas if each.state in _COMING]
    there = len(active) + len(coming) + sum(each.state is _S.FAILED for each in replicas)
    least = min(max(policy.min_replicas, 1 if wanted_once else 0), policy.max_replicas)
    if demand.waiting and not active and not coming:
        return _bring(replicas, f"{_requests(demand.waiting)} for it, and it is not awake", urgent=True)
    if there < least:
        return _bring(replicas, f"{there} of at least {least} replicas are there", urgent=policy.min_replicas > there)
    if active and (scaled := _by_load(policy, demand, replicas, active, coming, least, changed_at, now)):
        return scaled
    return _by_idleness(policy, demand, replicas, active, least, now)


def load(policy: ScalingPolicy, demand: Demand, active: Sequence[Replica], now: float) -> float:
    """What is asked of these, averaged over the last seconds, per request that they run at once."""
    capacity = sum(each.capacity for each in active)
    return (demand.mean_at(now, policy.averaged_over_s) + demand.waiting) / capacity if capacity else 0.0


def _by_load(
    policy: ScalingPolicy,
    demand: Demand,
    replicas: Sequence[Replica],
    active: list[Replica],
    coming: list[Replica],
    least: int,
    changed_at: float,
    now: float,
) -> Wish | None:
    now_load = load(policy, demand, active, now)
    present = (demand.total + demand.waiting) / sum(each.capacity for each in active)
    if min(now_load, present) > policy.load_high and len(active) + len(coming) < policy.max_replicas:
        if coming:
            return Wish(step=Step.NONE, reason=f"load {now_load:.2f}; {coming[0].name} is on its way")
        seen = max(changed_at, *(each.up_since for each in active)) + policy.averaged_over_s
        if now < seen:
            return _cooling(_bring(replicas, ""), now_load, seen)
        why = f"load {now_load:.2f} is above {policy.load_high:g}"
        return _bring(replicas, why, urgent=demand.waiting > 0)
    if max(now_load, present) < policy.load_low and len(active) > max(1, least):
        cooled = changed_at + policy.cooldown_s
        leaving = min(active, key=lambda each: (each.inflight / each.capacity, -each.number))
        others = [each for each in active if each is not leaving]
        if load(policy, demand, others, now) < policy.load_high * _CALM:
            if now < cooled:
                return _cooling(_down(leaving, ""), now_load, cooled)
            return _down(leaving, f"load {now_load:.2f} is below {policy.load_low:g}")
    return None


def _cooling(then: Wish, now_load: float, cooled: float) -> Wish:
    """What is to be done, but not so soon after the last change."""
    later = None if then.step is Step.NONE else Later(then.step, then.replica, cooled)
    return Wish(step=Step.NONE, reason=f"load {now_load:.2f}; the last change is young", due=cooled, later=later)


def _by_idleness(
    policy: ScalingPolicy,
    demand: Demand,
    replicas: Sequence[Replica],
    active: list[Replica],
    least: int,
    now: float,
) -> Wish:
    """One step down for one that has been idle for longer than its state allows, sleepers and late replicas first."""
    later: Later | None = None
    may_sleep = len(active) > least and not demand.busy
    for each in sorted(replicas, key=lambda each: (each.state is _S.ACTIVE, -each.number)):
        if each.state is _S.ACTIVE and not may_sleep:
            continue
        idle_s = policy.idle_s(each.state, each.levels)
        if now >= each.idle_since + idle_s:
            return _down(each, f"nobody asked for it in {idle_s:g} s")
        if each.idle_since + idle_s < (later.at if later else math.inf):
            later = Later(_down(each, "").step, each.name, each.idle_since + idle_s)
    due = later.at if later else math.inf
    if len(active) > max(1, least):
        due = min(due, now + policy.averaged_over_s)  # the average may have sunk by then
    return Wish(step=Step.NONE, reason=_standing(policy, demand, active, replicas, now), due=due, later=later)


def _standing(
    policy: ScalingPolicy, demand: Demand, active: Sequence[Replica], replicas: Sequence[Replica], now: float
) -> str:
    if not replicas:
        return "nobody asks for it"
    if not demand.busy:
        return f"idle for {max(0.0, now - demand.asked_at):.0f} s"
    return f"load {load(policy, demand, active, now):.2f}" if active else "it is on its way"


def _bring(replicas: Sequence[Replica], reason: str, *, urgent: bool = False) -> Wish:
    """Wake the one that sleeps lightest, else start another; not beside one that falls asleep or is tried again."""
    for state in (_S.SLEEP_1, _S.SLEEP_2):
        for each in sorted(replicas, key=lambda each: each.number):
            if each.state is state:
                return Wish(step=Step.WAKE, replica=each.name, reason=reason, urgent=urgent)
    for state, what in ((_S.DRAINING, "falls asleep, and is woken then"), (_S.FAILED, "failed, and is tried again")):
        for each in replicas:
            if each.state is state:
                return Wish(step=Step.NONE, reason=f"{reason}; {each.name} {what}")
    return Wish(step=Step.START, reason=reason, urgent=urgent)


def _down(replica: Replica, reason: str) -> Wish:
    deeper = [step for step, level in LEVEL.items() if level > sleep_level(replica.state) and level in replica.levels]
    step = deeper[0] if deeper else Step.UNLOAD
    return Wish(step=step, replica=replica.name, reason=reason)


def _requests(count: int) -> str:
    return "1 request waits" if count == 1 else f"{count} requests wait"
