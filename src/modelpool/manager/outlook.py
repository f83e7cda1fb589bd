"""What the controller would do next about a model, when, and why, in sentences for people. Pure functions of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelpool.core.giving_way import turn_s
from modelpool.core.learned import ANYWHERE, WAKE, Learned, What, expected
from modelpool.core.lifecycle import InstanceState, sleep_level
from modelpool.core.outgoing import why_outgoing
from modelpool.core.pool import Instance, Model, Pool
from modelpool.core.replicas import scaling_of
from modelpool.core.scaling import Later, Step, Wish

_S = InstanceState
_DOES = {
    Step.WAKE: "is woken",
    Step.START: "is started",
    Step.SLEEP_1: "goes to sleep at level 1",
    Step.SLEEP_2: "goes to sleep at level 2",
    Step.UNLOAD: "is unloaded",
}
_ASLEEP = (_S.SLEEP_1, _S.SLEEP_2)
_IN_BETWEEN = (_S.STARTING, _S.WAKING, _S.DRAINING, _S.FAILED)


def outlook(pool: Pool, model: Model, instances: Sequence[Instance], now: float) -> tuple[str, ...]:
    """What is to become of it by itself; what a request would do; who may take its memory."""
    decided = pool.wishes.get(model.alias)
    if decided is None:
        return ("Nothing is decided yet: the manager has just started.",)
    going = [each for each in instances if each.stopping or why_outgoing(pool, each)]
    usable = [each for each in instances if each not in going]
    return (
        *(leaves(pool, each) for each in going if why_outgoing(pool, each)),
        *_next(pool, model, usable, decided, now),
        *_on_request(pool, model, usable),
        *_yields(pool, model, usable, now),
    )


def leaves(pool: Pool, instance: Instance) -> str:
    """What is to become of an instance that goes."""
    who = f"{instance.instance} ({instance.state}) on {instance.worker_id}"
    if instance.stopping:
        inflight = pool.demand[instance.alias].inflight(instance.instance) if instance.alias in pool.demand else 0
        left = f", {inflight} in flight" if inflight else ""
        return f"{who} ends once its requests have{left}."
    if instance.alias not in pool.models:
        return f"{who} is of a model that is not registered, and ends."
    if shortage := pool.shortages.get(instance.alias):
        return f"{who} stays until another is in its place, and that is not possible now: {shortage}."
    return f"{who} ends once another is in its place."


def _next(pool: Pool, model: Model, usable: Sequence[Instance], decided: Wish, now: float) -> Iterator[str]:
    if decided.step is not Step.NONE:
        what = f"{_who(model, usable, decided.replica)} {_DOES[decided.step]}"
        shortage = pool.shortages.get(model.alias)
        in_the_way = f" In the way: {shortage}." if shortage else ""
        yield f"Next{', when it can be' if shortage else ''}: {what}; {decided.reason}.{in_the_way}"
    elif decided.later is not None:
        yield f"Next: {_later(model, usable, decided.later, now)}."
    elif said := [_on_the_way(pool, each, now) for each in usable if each.state in _IN_BETWEEN]:
        yield from said
    else:
        yield f"Next: nothing by itself; {_why_nothing(pool, model, decided)}."


def _who(model: Model, usable: Sequence[Instance], replica: str) -> str:
    return replica or (f"another replica of {model.alias}" if usable else model.alias)


def _later(model: Model, usable: Sequence[Instance], later: Later, now: float) -> str:
    unless = "if its load stays as it is" if later.step in (Step.WAKE, Step.START) else "unless it is asked for"
    when = in_words(max(0.0, later.at - now))
    return f"{_who(model, usable, later.replica)} {_DOES[later.step]} in {when}, {unless}"


def _on_the_way(pool: Pool, instance: Instance, now: float) -> str:
    if instance.state is _S.DRAINING:
        return f"Next: {instance.instance} falls asleep once its requests have ended."
    if instance.state is _S.FAILED:
        left = (instance.retry_at or 0.0) - now
        when = f"in {in_words(left)}" if left > 0 else "when it is asked for"
        return f"Next: {instance.instance} is tried again {when}."
    what = WAKE.get(instance.woken_from, What.START)
    seen = expected(pool.learned.get(instance.alias, {}), what, instance.worker_id)
    left = instance.starting_since + seen.typical - now if seen else 0.0
    return f"Next: {instance.instance} is ready{f', in {in_words(left)} as a rule' if left > 0 else ' soon'}."


def _why_nothing(pool: Pool, model: Model, decided: Wish) -> str:
    if model.pinned:
        return f"it is pinned, {decided.reason}"
    if least := scaling_of(pool.policy, model).min_replicas:
        return f"min_replicas keeps {least} of it awake, {decided.reason}"
    if model.preload:
        return f"it stays while there is room (preload), {decided.reason}"
    return decided.reason


def _on_request(pool: Pool, model: Model, usable: Sequence[Instance]) -> Iterator[str]:
    """How long a request would wait for it, where it would."""
    if any(each.state is _S.ACTIVE for each in usable):
        return
    learned = pool.learned.get(model.alias, {})
    asleep = min((each for each in usable if each.state in _ASLEEP), key=lambda each: each.state, default=None)
    if asleep is not None:
        what = WAKE[sleep_level(asleep.state)]
        yield f"A request wakes it{_takes(learned, what, asleep.worker_id)}."
    elif not usable and model.alias not in pool.hopeless:
        yield f"A request starts it{_takes(learned, What.START, ANYWHERE)}."


def _takes(learned: Learned, what: What, worker_id: str) -> str:
    seen = expected(learned, what, worker_id)
    if seen is None:
        return "; how long that takes was not seen yet"
    slow = "" if seen.slow == seen.typical else f", {in_words(seen.slow)} at worst"
    return f", which takes {in_words(seen.typical)}{slow}"


def _yields(pool: Pool, model: Model, usable: Sequence[Instance], now: float) -> Iterator[str]:
    """Whether its memory may go to a model that is asked for."""
    if not usable or all(each.state in _IN_BETWEEN for each in usable):
        return
    if model.pinned:
        yield "It gives way to nobody: it is pinned."
        return
    awake = [each for each in usable if each.state is _S.ACTIVE]
    least = scaling_of(pool.policy, model).min_replicas
    if awake and len(awake) <= least:
        yield f"It gives way to nobody: min_replicas is {least}."
        return
    waits = [left for each in awake if (left := each.active_since + turn_s(pool, each) - now) > 0]
    when = ""
    if awake and len(waits) == len(awake):
        when = f", but not in the next {in_words(min(waits))}"
    elif awake:
        when = f"; while it is busy, once that one has waited for {in_words(pool.policy.turn_max_s)}"
    yield f"It gives way to a model that is asked for and needs its memory{when}."


def in_words(seconds: float) -> str:
    """`0.05 s`, `1.9 s`, `40 s`, `4 min 12 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 and whole < 600 else "")
    return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 // 60 else "")
