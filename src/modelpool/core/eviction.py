"""Who gives way when memory is short: whoever costs least to bring back, for each byte that this frees.

    cost of a step = (chance of a request soon × seconds to be awake again) / bytes freed

Never one that is busy, pinned, or up for less than its minimum residence. A step down the ladder that frees enough is
cheaper than an unload; of one instance only one step is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import HOST, gb
from modelpool.core.scaling import Step

SOON_S = 300.0
"""Chances are those of a request within this time."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One step that an instance could take. `frees`: bytes by device; `back_s`: until it is awake again after it."""

    step: Step
    frees: Mapping[int, int]
    back_s: float


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that holds memory. `chance`: of a request soon.

    `kept`: why it may not give way, "" when it may; `for_now`: it may later.
    """

    instance: str
    alias: str
    state: InstanceState
    holds: Mapping[int, int]
    ways: tuple[Way, ...] = ()
    chance: float = 0.0
    kept: str = ""
    for_now: bool = False


class Eviction(msgspec.Struct, frozen=True, kw_only=True):
    instance: str
    step: Step
    reason: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`cost`: expected seconds of waiting that it causes."""

    evictions: tuple[Eviction, ...]
    cost: float


class NoPlan(msgspec.Struct, frozen=True):
    """Nothing helps; `reason` says who holds how much, and why they may not go. `for_now`: later there may be a way."""

    reason: str
    for_now: bool = False


def first_plan(options: Sequence[Mapping[int, int]], holders: Sequence[Holder], wanted_by: str) -> Plan | NoPlan:
    """A plan for the first of these sets of devices that there is one for."""
    for short in options:
        if found := _cheapest(short, holders, wanted_by):
            return found
    anywhere = {index: 0 for short in options for index in short}
    return NoPlan(_who_holds(anywhere, holders), for_now=any(_in_the_end(short, holders) for short in options))


def plan(short: Mapping[int, int], holders: Sequence[Holder], wanted_by: str) -> Plan | NoPlan:
    """The cheapest steps that free at least `short` bytes on each of those devices."""
    return first_plan([short], holders, wanted_by)


def _cheapest(short: Mapping[int, int], holders: Sequence[Holder], wanted_by: str) -> Plan | None:
    options = [
        (each.chance * way.back_s / gain, each, way)
        for each in holders
        if not each.kept
        for way in each.ways
        if (gain := _gain(way, short)) > 0
    ]
    options.sort(key=lambda option: (option[0], option[1].instance, option[2].step))
    taken: dict[str, tuple[Holder, Way]] = {}
    for _, holder, way in options:
        before = taken.get(holder.instance)
        if _covered(short, taken):
            break
        if before is None or _gain(way, short) > _gain(before[1], short):
            taken[holder.instance] = (holder, way)
    if not _covered(short, taken):
        return None
    for instance, pair in sorted(taken.items(), key=lambda item: -item[1][0].chance * item[1][1].back_s):
        rest = {name: each for name, each in taken.items() if name != instance}
        if _covered(short, rest):
            taken = rest
        else:
            taken[instance] = _lightest(short, rest, pair)
    return Plan(
        evictions=tuple(
            Eviction(instance=name, step=way.step, reason=f"makes room for {wanted_by}")
            for name, (_, way) in sorted(taken.items())
        ),
        cost=sum(holder.chance * way.back_s for holder, way in taken.values()),
    )


def _in_the_end(short: Mapping[int, int], holders: Sequence[Holder]) -> bool:
    """Whether it would be enough if all gave way that may later."""
    most = {
        each.instance: (each, max(each.ways, key=lambda way: _gain(way, short)))
        for each in holders
        if each.ways and (each.for_now or not each.kept)
    }
    return _covered(short, most)


def _lightest(
    short: Mapping[int, int], rest: Mapping[str, tuple[Holder, Way]], pair: tuple[Holder, Way]
) -> tuple[Holder, Way]:
    """The quickest way back among those of one instance that are enough beside the rest."""
    holder, _ = pair
    enough = [way for way in holder.ways if _covered(short, {**rest, holder.instance: (holder, way)})]
    return holder, min(enough, key=lambda way: way.back_s)


def _gain(way: Way, short: Mapping[int, int]) -> int:
    return sum(min(way.frees.get(device, 0), lacking) for device, lacking in short.items())


def _covered(short: Mapping[int, int], taken: Mapping[str, tuple[Holder, Way]]) -> bool:
    return all(
        sum(way.frees.get(device, 0) for _, way in taken.values()) >= lacking for device, lacking in short.items()
    )


def _who_holds(short: Mapping[int, int], holders: Sequence[Holder]) -> str:
    lines = []
    for each in sorted(holders, key=lambda each: -sum(each.holds.values())):
        on_devices = sum(each.holds.get(index, 0) for index in short if index != HOST)
        on_host = each.holds.get(HOST, 0) if HOST in short else 0
        if on_devices or on_host:
            held = [gb(on_devices)] if on_devices else []
            held += [f"{gb(on_host)} of host memory"] if on_host else []
            kept = f", {each.kept}" if each.kept else ""
            lines.append(f"{each.instance} ({each.state}) holds {' and '.join(held)}{kept}")
    return "; ".join(lines) or "nothing of this pool holds memory there"
