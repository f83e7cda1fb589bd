"""The choice of an instance: the least loaded, and in turn where several are."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Generic, NamedTuple, Protocol, TypeVar


class Candidate(Protocol):
    """An instance that can take the request. `capacity` (at least 1): requests that it runs at once."""

    @property
    def inflight(self) -> int: ...

    @property
    def capacity(self) -> int: ...


class Reason(StrEnum):
    ONLY = "only"
    """There was no other."""
    LEAST_LOADED = "least_loaded"
    TURN = "turn"
    """Others had the same load; it was this one's turn."""


C = TypeVar("C", bound=Candidate)


class Choice(NamedTuple, Generic[C]):
    chosen: C
    reason: Reason


def least_loaded(candidates: Sequence[C], turn: int) -> Choice[C]:
    """The candidate with the least in-flight / capacity, then the least in-flight; among equals the `turn`-th.

    `turn` is any number that grows with each request, so that idle instances all get some. `candidates` is not empty.
    """
    count = len(candidates)
    if count == 1:
        return Choice(candidates[0], Reason.ONLY)
    # Loads are compared by cross-multiplication: exact, and no float is made per candidate.
    best = candidates[turn % count]
    inflight, capacity = best.inflight, best.capacity
    reason = Reason.LEAST_LOADED
    for step in range(1, count):
        other = candidates[(turn + step) % count]
        difference = other.inflight * capacity - inflight * other.capacity or other.inflight - inflight
        if difference < 0:
            best, reason = other, Reason.LEAST_LOADED
            inflight, capacity = other.inflight, other.capacity
        elif difference == 0:
            reason = Reason.TURN
    return Choice(best, reason)
