"""What happened to one inference request: written along its path, read at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from time import monotonic
from typing import Protocol

import msgspec

from modelpool.errors import PoolError

_ALIAS_MAX = 128
CLIENT_LEFT = "client_left"
LEFT_STATUS = 499
"""Of a request whose client left before the answer began; nobody is told, so the number is by custom only."""


class Record(msgspec.Struct, array_like=True, gc=False):
    """One request, as it is kept. Times are seconds on the system's monotonic clock, 0 where it did not come to that.

    `alias` is what the client named, which need not exist. `reason` is that of the choice, `code` that of an error.
    `names`, `capacities` and `loads` are those of all instances when `instance` was chosen, in the same order.
    `avoided`: those of them that were left alone since they kept failing. `tries`: the instances that did not take it
    before, and why. `segments`: pieces that the answer's body came in.
    """

    id: bytes
    path: bytes
    accepted: float
    bytes_in: int
    caller: str = ""
    alias: str = ""
    status: int = 0
    code: str = ""
    reason: str = ""
    instance: str = ""
    names: tuple[str, ...] = ()
    capacities: tuple[int, ...] = ()
    loads: list[int] = []
    avoided: tuple[str, ...] = ()
    tries: tuple[tuple[str, str], ...] = ()
    waited: float = 0.0
    sent: float = 0.0
    first_byte: float = 0.0
    ended: float = 0.0
    segments: int = 0
    bytes_out: int = 0
    streamed: bool = False
    left: bool = False
    broken: bool = False


class Candidate(Protocol):
    """An instance, as the choice saw it."""

    @property
    def name(self) -> str: ...
    @property
    def inflight(self) -> int: ...
    @property
    def capacity(self) -> int: ...


class Passed(Protocol):
    """What passed of an answer."""

    @property
    def status(self) -> int: ...
    @property
    def streamed(self) -> bool: ...
    @property
    def first_byte(self) -> float: ...
    @property
    def segments(self) -> int: ...
    @property
    def size(self) -> int: ...


class Observer(Protocol):
    """Told of every journey. Must not block or raise."""

    def waits(self, journey: Journey) -> None:
        """It waits for an instance of `record.alias`."""

    def waited(self, journey: Journey) -> None:
        """It waits no more."""

    def chosen(self, journey: Journey) -> None:
        """It goes to `record.instance` now."""

    def not_taken(self, journey: Journey) -> None:
        """That instance did not take it."""

    def ended(self, journey: Journey) -> None:
        """Once, whatever came of it. The record is complete."""


class Gauge(Protocol):
    """A number that goes up and down."""

    def add(self, change: int) -> None: ...


class Journey:
    """The path writes here. Between `begin` and `ended` of Journeys, which gave it."""

    __slots__ = ("_journeys", "place", "record", "waiting")

    def __init__(self, journeys: Journeys, record: Record) -> None:
        self._journeys = journeys
        self.record = record
        self.place = -1
        """Where Recent keeps the record."""
        self.waiting: Gauge | None = None
        """Where Metrics counts that it waits."""

    def asked(self, alias: str) -> None:
        """The body names this model."""
        self.record.alias = alias if len(alias) <= _ALIAS_MAX else alias[: _ALIAS_MAX - 1] + "…"

    def waits(self) -> None:
        """It is in the waiting room from now on."""
        for observer in self._journeys.observers:
            observer.waits(self)

    def waited(self, seconds: float) -> None:
        """It was in the waiting room for so long."""
        self.record.waited += seconds
        for observer in self._journeys.observers:
            observer.waited(self)

    def chose(self, instance: Candidate, reason: str, among: tuple[Candidate, ...]) -> None:
        """It goes to `instance`. `among` are all of the model, with their loads before it."""
        record = self.record
        record.instance = instance.name
        record.reason = reason
        record.loads = [each.inflight for each in among]
        record.names, record.capacities = self._journeys.described(record.alias, among)
        if suspects := self._journeys.suspects:
            record.avoided = tuple(each.name for each in among if each in suspects)
        for observer in self._journeys.observers:
            observer.chosen(self)

    def sent(self) -> None:
        """It was written to the instance."""
        self.record.sent = monotonic()

    def not_taken(self, why: str) -> None:
        """The instance did not take it, so that another one may."""
        for observer in self._journeys.observers:
            observer.not_taken(self)
        self.sent_again(why)
        self.record.instance = self.record.reason = ""

    def sent_again(self, why: str) -> None:
        """What came of sending it does not count."""
        record = self.record
        record.tries = (*record.tries, (record.instance, why))
        record.sent = record.first_byte = 0.0
        record.segments = record.bytes_out = 0

    def passed(self, answer: Passed) -> None:
        """So much of an answer went to the client."""
        record = self.record
        record.status = answer.status
        record.streamed = answer.streamed
        record.first_byte = answer.first_byte
        record.segments = answer.segments
        record.bytes_out = answer.size

    def failed(self, error: BaseException, *, answered: bool) -> None:
        """It ends with this. `answered`: after an answer had begun, whose status stands."""
        record = self.record
        record.left = isinstance(error, asyncio.CancelledError)
        record.broken = answered and not record.left
        if record.left:
            status, record.code = LEFT_STATUS, CLIENT_LEFT
        elif isinstance(error, PoolError):
            status, record.code = error.status, error.code
        else:
            status, record.code = 500, "internal_error"
        if not answered:
            record.status = status

    def ended(self) -> None:
        self.record.ended = monotonic()
        for observer in self._journeys.observers:
            observer.ended(self)


_DESCRIBED_MAX = 1024
Described = tuple[tuple[str, ...], tuple[int, ...]]


class Journeys:
    """Those of one gateway process. `suspects`: the instances that keep failing, as they are at any time."""

    def __init__(self, observers: Sequence[Observer] = (), suspects: Collection[Candidate] = ()) -> None:
        self.observers = tuple(observers)
        self.suspects = suspects
        self._described: dict[str, tuple[tuple[Candidate, ...], Described]] = {}

    def begin(self, id_: bytes, path: bytes, bytes_in: int, caller: str) -> Journey:
        return Journey(self, Record(id_, path, monotonic(), bytes_in, caller))

    def described(self, alias: str, among: tuple[Candidate, ...]) -> Described:
        """Names and capacities, made once as long as the instances are the same."""
        known = self._described.get(alias)
        if known is None or known[0] is not among:
            if len(self._described) >= _DESCRIBED_MAX:
                self._described.clear()  # models come and go
            described = tuple(each.name for each in among), tuple(each.capacity for each in among)
            known = self._described[alias] = among, described
        return known[1]
