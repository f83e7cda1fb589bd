"""What was seen of a model on the workers: how long it takes to start, to sleep, to wake, to end, and what it holds.

Of each thing the latest observations count, every one half as much as the fourth after it. `typical` is their weighted
median and `slow` their weighted 0.9 quantile: one start that met a cold disk moves the median not at all, a change that
lasts is believed after four. A running mean does the first badly, the last value, as it was before, not at all.

They are kept by worker, and once more for all workers together, which stands in for a worker without any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

REMEMBERED = 16
"""So many observations of one thing."""
HALF_LIFE = 4
WORKERS_MAX = 32
"""So many workers' are kept of one model, those that were heard of last. Names may be made up anew at each start."""
ANYWHERE = ""
"""In the place of a worker: all of them together."""


class What(StrEnum):
    """Times in seconds, from the order until it was seen to be done; memory in bytes, on each of its devices,
    and of the machine beside accelerators.

    A start is without what only the first one needs, a sleep without the end of the requests in flight.
    """

    START = "start"
    WAKE_1 = "wake_1"
    WAKE_2 = "wake_2"
    SLEEP_1 = "sleep_1"
    SLEEP_2 = "sleep_2"
    UNLOAD = "unload"
    HELD_AWAKE = "held_awake"
    HELD_1 = "held_1"
    HELD_2 = "held_2"
    HELD_ON_HOST_AWAKE = "held_on_host_awake"
    HELD_ON_HOST_1 = "held_on_host_1"
    HELD_ON_HOST_2 = "held_on_host_2"


WAKE = {1: What.WAKE_1, 2: What.WAKE_2}
SLEEP = {1: What.SLEEP_1, 2: What.SLEEP_2}
HELD = {0: What.HELD_AWAKE, 1: What.HELD_1, 2: What.HELD_2}
HELD_ON_HOST = {0: What.HELD_ON_HOST_AWAKE, 1: What.HELD_ON_HOST_1, 2: What.HELD_ON_HOST_2}
"""By sleep level."""
_MEMORY = frozenset((*HELD.values(), *HELD_ON_HOST.values()))


class Measure(msgspec.Struct, frozen=True):
    """`recent`: the latest observations, oldest first."""

    recent: tuple[float, ...]
    typical: float
    slow: float


Learned = Mapping[tuple[str, What], Measure]
"""Of one model, by worker; those of ANYWHERE are of all workers."""


def measure(recent: Sequence[float]) -> Measure:
    """What observations, oldest first, let expect."""
    kept = tuple(recent[-REMEMBERED:])
    weighted = sorted((value, 0.5 ** (age / HALF_LIFE)) for age, value in enumerate(reversed(kept)))
    return Measure(kept, _quantile(weighted, 0.5), _quantile(weighted, 0.9))


def _quantile(weighted: Sequence[tuple[float, float]], share: float) -> float:
    """The least value that this share of all weight is not above."""
    least = share * sum(weight for _, weight in weighted)
    for value, weight in weighted:
        least -= weight
        if least <= 1e-9:
            return value
    return weighted[-1][0]


def learn(learned: Learned, worker_id: str, what: What, value: float) -> Learned:
    """With one more observation. The worker that was heard of longest ago is forgotten when there are too many."""
    grown = dict(learned)
    for where in (worker_id, ANYWHERE):
        before = grown.pop((where, what), None)  # put at the end again: the order is that of the latest news
        grown[where, what] = measure((*(before.recent if before else ()), value))
    workers = list(dict.fromkeys(where for where, _ in reversed(grown) if where != ANYWHERE))
    forgotten = set(workers[WORKERS_MAX:])
    return {key: each for key, each in grown.items() if key[0] not in forgotten} if forgotten else grown


def is_news(learned: Learned, worker_id: str, what: What, value: float) -> bool:
    """Memory is measured again and again: what is about the same as the last time says nothing more."""
    before = learned.get((worker_id, what))
    if before is None or what not in _MEMORY:
        return True
    return abs(value - before.recent[-1]) > before.recent[-1] / 20


def expected(learned: Learned, what: What, worker_id: str = ANYWHERE) -> Measure | None:
    """What to expect there; of all workers where none was seen there; None where none was seen at all."""
    return learned.get((worker_id, what)) or learned.get((ANYWHERE, what))


def typical(learned: Learned, what: What, worker_id: str = ANYWHERE, *, unknown: float) -> float:
    """The same as one number."""
    seen = expected(learned, what, worker_id)
    return unknown if seen is None else seen.typical


def slow(learned: Learned, what: What, worker_id: str = ANYWHERE, *, unknown: float) -> float:
    """What it hardly ever exceeds."""
    seen = expected(learned, what, worker_id)
    return unknown if seen is None else seen.slow


def to_record(learned: Learned) -> dict[str, dict[str, tuple[float, ...]]]:
    """The observations by worker and name, the worker that was heard of last at the end, to be kept."""
    record: dict[str, dict[str, tuple[float, ...]]] = {}
    for (worker_id, what), each in learned.items():
        record[worker_id] = {**record.pop(worker_id, {}), what.value: each.recent}
    return record


def from_record(record: Mapping[str, Mapping[str, Sequence[float]]]) -> Learned:
    """What another version called otherwise is left out."""
    names = {what.value: what for what in What}
    return {
        (worker_id, names[name]): measure(recent)
        for worker_id, named in record.items()
        for name, recent in named.items()
        if name in names and recent
    }
