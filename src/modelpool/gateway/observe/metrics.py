"""What the gateway counts: in memory that the node's gateways share, each in its own part.

Counting is adding to numbers there. Names, labels and text come in when somebody reads (`exposition`).
"""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import NamedTuple

from modelpool.errors import PoolError
from modelpool.gateway.observe.journey import Journey
from modelpool.gateway.observe.rows import Labels, Rows
from modelpool.gateway.shared import Node

# vLLM's, so that both can be shown in one picture.
_SHORT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
PER_TOKEN_BUCKETS = (*_SHORT, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0)
FIRST_TOKEN_BUCKETS = (*_FIRST, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
LATENCY_BUCKETS = (*_LATENCY, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)


class Histogram(NamedTuple):
    """Where it lies in a model's row: a number per bucket (not cumulated), one for what is above, and the sum."""

    name: str
    help: str
    buckets: tuple[float, ...]
    at: int
    sum_at: int


class Counter(NamedTuple):
    name: str
    help: str
    at: int


def _histograms(*described: tuple[str, str, tuple[float, ...]]) -> tuple[Histogram, ...]:
    histograms: list[Histogram] = []
    for name, text, buckets in described:
        at = histograms[-1].sum_at + 1 if histograms else 0
        histograms.append(Histogram(name, text, buckets, at, at + len(buckets) + 1))
    return tuple(histograms)


HISTOGRAMS = FIRST_TOKEN, PER_TOKEN, LATENCY, QUEUE = _histograms(
    (
        "modelpool_time_to_first_token_seconds",
        "From the request to the first byte of the answer's body.",
        FIRST_TOKEN_BUCKETS,
    ),
    (
        "modelpool_time_per_output_token_seconds",
        "Of a stream: its time after the first piece, by the number of pieces. Once per request.",
        PER_TOKEN_BUCKETS,
    ),
    ("modelpool_e2e_request_latency_seconds", "From the request to the end of its answer.", LATENCY_BUCKETS),
    ("modelpool_request_queue_time_seconds", "In the gateway's waiting room.", LATENCY_BUCKETS),
)
_COUNTERS_AT = QUEUE.sum_at + 1
COUNTERS = BYTES_IN, BYTES_OUT, LEFT, BROKEN = (
    Counter("modelpool_request_bytes", "Bytes of requests' bodies.", _COUNTERS_AT),
    Counter("modelpool_response_bytes", "Bytes of answers' bodies that came from instances.", _COUNTERS_AT + 1),
    Counter("modelpool_client_disconnects", "Requests whose client left before their end.", _COUNTERS_AT + 2),
    Counter("modelpool_broken_answers", "Answers whose instance failed after their first byte.", _COUNTERS_AT + 3),
)
_MODEL_CELLS = _COUNTERS_AT + 4

_KEPT_MAX = 4096


class Gauge:
    """A number that goes up and down. It is forgotten with the process that wrote it."""

    __slots__ = ("_at", "_numbers")

    def __init__(self, numbers: memoryview[float], at: int) -> None:
        self._numbers = numbers
        self._at = at

    def add(self, change: int) -> None:
        self._numbers[self._at] += change


class Said(IntEnum):
    """What each process says of itself: the cells of its row in `processes`."""

    PID = 0
    HEARD_AT = 1
    """When it last heard the manager, on the monotonic clock; 0 if never."""
    CONNECTIONS = 2
    SINCE = 3
    """When it started, on the monotonic clock."""


class Metrics:
    """An Observer that counts. `known`: whether there is a model of this name; others become no label."""

    def __init__(self, node: Node, known: Callable[[str], bool]) -> None:
        self._known = known
        self.models = Rows(node, "models", rows=512, labels_bytes=144, cells=_MODEL_CELLS, arity=1)
        self.requests = Rows(node, "requests", rows=2048, labels_bytes=256, arity=3)
        self.retries = Rows(node, "retries", rows=512, labels_bytes=256, arity=2)
        self.inflight = Rows(node, "inflight", rows=1024, labels_bytes=320, arity=2)
        self.waiting = Rows(node, "waiting", rows=512, labels_bytes=144, arity=1)
        self.breakers = Rows(node, "breakers", rows=1024, labels_bytes=176, arity=1)
        self.processes = Rows(node, "processes", rows=2, labels_bytes=32, cells=len(Said), arity=1)
        for rows in (self.inflight, self.waiting, self.breakers, self.processes):
            node.keep_clear(rows.wipe)
        self._numbers = self.models.numbers
        self._gauges: dict[tuple[str, str], Gauge] = {}
        self._outcomes: dict[tuple[str, int, str], int] = {}
        self._breakers: set[str] = set()
        self._own = self.processes.at(("gateway",))
        self.processes.numbers[self._own + Said.PID] = os.getpid()
        self.processes.numbers[self._own + Said.SINCE] = time.monotonic()

    def say(self, *, heard_at: float | None, connections: int, breakers: Mapping[str, int]) -> None:
        """What others cannot know of this process: when it last heard the manager, its clients, its breakers' states.

        Said now and then, since the numbers change without a request.
        """
        self.processes.numbers[self._own + Said.HEARD_AT] = heard_at or 0.0
        self.processes.numbers[self._own + Said.CONNECTIONS] = connections
        for name in self._breakers - breakers.keys():
            self.breakers.numbers[self.breakers.at((name,))] = math.nan
        for name, state in breakers.items():
            self.breakers.numbers[self.breakers.at((name,))] = state
        self._breakers = set(breakers)

    def waits(self, journey: Journey) -> None:
        alias = journey.record.alias
        if self._known(alias):
            journey.waiting = Gauge(self.waiting.numbers, self.waiting.at((alias,)))
            journey.waiting.add(1)

    def waited(self, journey: Journey) -> None:
        if journey.waiting is not None:
            journey.waiting.add(-1)
            journey.waiting = None

    def serves_since(self, slot: int) -> float:
        """When the process that has this slot started; infinity while none has."""
        rows = self.processes.all()
        return min((row[Said.SINCE] for each, _, row in rows if each == slot and row[Said.PID]), default=math.inf)

    def refused(self, error: PoolError) -> None:
        """A request was answered with this before anybody looked for its model."""
        self._count_request("", error.status, error.code)

    def chosen(self, journey: Journey) -> None:
        self._inflight(journey).add(1)

    def not_taken(self, journey: Journey) -> None:
        self._inflight(journey).add(-1)

    def ended(self, journey: Journey) -> None:
        record = journey.record
        if record.instance:
            self._inflight(journey).add(-1)
            alias, reason = record.alias, record.reason
        else:
            alias, reason = record.alias if self._known(record.alias) else "", record.code
        self._count_request(alias, record.status, reason)
        for _, why in record.tries:
            _count(self.retries, (alias, why))
        if not alias:
            return
        numbers, at = self._numbers, self.models.at((alias,))
        numbers[at + BYTES_IN.at] += record.bytes_in
        numbers[at + BYTES_OUT.at] += record.bytes_out
        if record.left:
            numbers[at + LEFT.at] += 1
        if record.broken:
            numbers[at + BROKEN.at] += 1
        if record.waited:
            self._observe(at, QUEUE, record.waited)
        elif record.instance:
            numbers[at + QUEUE.at] += 1  # the usual case, without the search
        accepted, first, ended = record.accepted, record.first_byte, record.ended
        if 200 <= record.status < 400 and first:  # a WebSocket (101) lasts as long as its client likes
            self._observe(at, FIRST_TOKEN, first - accepted)
            if not record.left:
                self._observe(at, LATENCY, ended - accepted)
            if record.streamed and record.segments > 1:
                self._observe(at, PER_TOKEN, (ended - first) / (record.segments - 1))

    def _observe(self, at: int, histogram: Histogram, value: float) -> None:
        numbers, first = self._numbers, at + histogram.at
        numbers[first + bisect_left(histogram.buckets, value)] += 1
        numbers[at + histogram.sum_at] += value

    def _count_request(self, alias: str, status: int, reason: str) -> None:
        outcome = alias, status, reason
        at = self._outcomes.get(outcome)
        if at is None:
            if len(self._outcomes) >= _KEPT_MAX:
                self._outcomes.clear()
            at = self._outcomes[outcome] = self.requests.at((alias, str(status), reason))
        self.requests.numbers[at] += 1

    def _inflight(self, journey: Journey) -> Gauge:
        labels = journey.record.alias, journey.record.instance
        gauge = self._gauges.get(labels)
        if gauge is None:
            if len(self._gauges) >= _KEPT_MAX:
                self._gauges.clear()  # models come and go; the numbers themselves stay
            gauge = self._gauges[labels] = Gauge(self.inflight.numbers, self.inflight.at(labels))
        return gauge


def _count(rows: Rows, labels: Labels) -> None:
    rows.numbers[rows.at(labels)] += 1
