"""The choice of an instance: the least loaded, and in turn where several are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol, TypeVar


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
    STORED = "stored"
    """It keeps the response that the request goes on from."""


C = TypeVar("C", bound=Candidate)


def least_loaded(candidates: Sequence[C], turn: int) -> tuple[C, Reason]:
    """The candidate with the least in-flight / capacity, then the least in-flight; among equals the `turn`-th.

    `turn` is any number that grows with each request, so that idle instances all get some. `candidates` is not empty.
    """
    if len(candidates) == 1:
        return candidates[0], Reason.ONLY
    start = turn % len(candidates)
    best, least, reason = candidates[start], math.inf, Reason.LEAST_LOADED
    for each in (*candidates[start:], *candidates[:start]):
        load = each.inflight / each.capacity
        if load < least or (load == least and each.inflight < best.inflight):
            best, least, reason = each, load, Reason.LEAST_LOADED
        elif load == least and each.inflight == best.inflight:
            reason = Reason.TURN
    return best, reason
