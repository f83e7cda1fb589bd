"""What an API key may use: requests and tokens in any 60 seconds, and requests at once.

The state of a key is a row of cells that several processes see, no more of them for a higher limit; who calls holds
the row's lock, for `admit` and `leave` alike. What was used in the window is kept in a ring, summed over tenths of a
second, so that each question costs O(log n) at most.

What runs, and the tokens reserved for it, each process keeps in cells of its slot, marked with its generation. When it
dies its slot gets another generation: those cells count no more, and what was reserved in them counts as used.

Where there are several nodes the row also has the part of the limits that is for this one (core/shares.py).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from enum import StrEnum

import msgspec

WINDOW_S = 60.0
STEP_S = 0.1
"""Requests and tokens count for up to this much longer than the window, never shorter."""
RUNNING_RETRY_S = 1.0
"""When one of those that run will have ended nobody can say; nor when another node gives up what it does not need."""

_STEPS = 640  # more than there are in a window
_WORD = 8
_ERA, _VERSION, _MAY_REQUEST, _MAY_TAKE, _MAY_RUN, _SLOTS = range(6)
_WITHOUT_END = 1 << 62
_GENERATION, _RUNNING, _RESERVED, _SLOT = range(4)
_TOTAL, _ENTRIES, _TIMES = range(3)
_SUMS = _TIMES + _STEPS
_RING = _SUMS + _STEPS


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """None: no limit."""

    requests: int | None = None
    tokens: int | None = None
    concurrency: int | None = None


class Limit(StrEnum):
    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENCY = "concurrency"


class Window(msgspec.Struct, frozen=True, gc=False):
    """How much of a limit is left, and the seconds until all of it is, if nothing more comes."""

    remaining: int
    reset: float


class Verdict(msgspec.Struct, frozen=True):
    """`refused` is None for a request that was admitted, and now counts. No window where there is no limit.

    `retry_after`: seconds; None where waiting does not help, since the request alone is more than the limit.
    """

    refused: Limit | None
    retry_after: float | None
    requests: Window | None
    tokens: Window | None
    short: bool = False
    """There may be room, which is another node's as yet."""


class Use(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Of each limit; `tokens` with those that are reserved."""

    requests: int = 0
    tokens: int = 0
    running: int = 0


class _Ring:
    """What was used of a limit, and when. An entry is a step: its latest time, and the sum of all that came before."""

    __slots__ = ("_cells", "_sums", "_times", "limit")

    def __init__(self, cells: memoryview, limit: int) -> None:
        self._cells = cells.cast("q")
        self._times = cells[_WORD * _TIMES : _WORD * _SUMS].cast("d")
        self._sums = cells[_WORD * _SUMS : _WORD * _RING].cast("q")
        self.limit = limit

    def used(self, since: float) -> int:
        """After `since`."""
        cells = self._cells
        entries = cells[_ENTRIES]
        first = _first_after(self._times, entries, since)
        return 0 if first == entries else cells[_TOTAL] - self._sums[first % _STEPS]

    def use(self, now: float, amount: int) -> None:
        cells, times = self._cells, self._times
        entries = cells[_ENTRIES]
        last = (entries - 1) % _STEPS
        if not entries or now // STEP_S != times[last] // STEP_S:
            last = entries % _STEPS
            self._sums[last] = cells[_TOTAL]
            cells[_ENTRIES] = entries + 1
        times[last] = now
        cells[_TOTAL] += amount

    def reset(self, now: float) -> float:
        """Seconds until the latest entry is out of the window."""
        entries = self._cells[_ENTRIES]
        return max(0.0, self._times[(entries - 1) % _STEPS] + WINDOW_S - now) if entries else 0.0

    def wait(self, now: float, room: int) -> float:
        """Seconds until no more than `room` was used within the window, which is less than now."""
        cells = self._cells
        # The entries before the first one whose sum is large enough must be out of the window.
        first = _first_at_least(self._sums, cells[_ENTRIES], cells[_TOTAL] - room)
        return max(0.0, self._times[(first - 1) % _STEPS] + WINDOW_S - now)


class Row:
    """One key's cells, `size` bytes. `era` names the clock of `now`: what another one left is wiped."""

    __slots__ = ("_cells", "_limits", "_requests", "_tokens")

    def __init__(self, cells: memoryview, limits: Limits, *, slots: int, era: int) -> None:
        self._limits = limits
        self._cells = cells.cast("q")
        if self._cells[_ERA] != era:
            cells[:] = bytes(len(cells))
            self._cells[_ERA] = era
        at = _WORD * (_SLOTS + _SLOT * slots)
        end = at + _WORD * _RING
        self._requests = None if limits.requests is None else _Ring(cells[at:end], limits.requests)
        self._tokens = None if limits.tokens is None else _Ring(cells[-_WORD * _RING :], limits.tokens)

    @staticmethod
    def size(limits: Limits, slots: int) -> int:
        rings = (limits.requests is not None) + (limits.tokens is not None)
        return _WORD * (_SLOTS + _SLOT * slots + rings * _RING)

    def allow(self, version: int, part: Limits) -> None:
        """So much of the limits is for this node; of several versions the latest counts."""
        cells = self._cells
        if version > cells[_VERSION]:
            for at, most in (
                (_MAY_REQUEST, part.requests),
                (_MAY_TAKE, part.tokens),
                (_MAY_RUN, part.concurrency),
            ):
                cells[at] = _WITHOUT_END if most is None else most
            cells[_VERSION] = version

    def part(self) -> Limits | None:
        """What was allowed last; None: all."""
        cells = self._cells
        if not cells[_VERSION]:
            return None
        parts = (None if cells[at] == _WITHOUT_END else cells[at] for at in (_MAY_REQUEST, _MAY_TAKE, _MAY_RUN))
        requests, tokens, concurrency = parts
        return Limits(requests=requests, tokens=tokens, concurrency=concurrency)

    def use(self, now: float, generations: memoryview[int], slots: int) -> Use:
        """What this node uses now."""
        running, reserved = self._held(now, generations, slots)
        since = now - WINDOW_S
        return Use(
            requests=self._requests.used(since) if self._requests else 0,
            tokens=reserved + self._tokens.used(since) if self._tokens else 0,
            running=running,
        )

    def enter(self, now: float, slot: int, generation: int) -> None:
        """A process begins to use the row, with nothing running."""
        at = _SLOTS + _SLOT * slot
        self._settle(now, at)
        self._cells[at + _RUNNING] = 0
        self._cells[at + _GENERATION] = generation

    def admit(self, now: float, slot: int, generations: memoryview[int], slots: int, tokens: int) -> Verdict:
        """Admit a request for which `tokens` are reserved, or refuse it and change nothing.

        `generations`: those of the slots, of which the first `slots` may be in use.
        """
        limits = self._limits
        running, reserved = self._held(now, generations, slots)
        since = now - WINDOW_S
        free_requests = free_tokens = 0
        full = limits.concurrency is not None and running >= limits.concurrency
        if (requests_used := self._requests) is not None:
            free_requests = requests_used.limit - requests_used.used(since)
            full = full or free_requests < 1
        if (tokens_used := self._tokens) is not None:
            free_tokens = tokens_used.limit - reserved - tokens_used.used(since)
            full = full or free_tokens < tokens
        if full:
            return self._refuse(now, running, reserved, tokens, free_requests, free_tokens)
        if self._cells[_VERSION]:
            requests, taken = limits.requests or 0, (limits.tokens or 0) + tokens
            over = self._over_part(running, requests - free_requests, taken - free_tokens)
            if over is not None:
                return self._refuse_over_part(now, over, reserved, free_requests, free_tokens)
        at = _SLOTS + _SLOT * slot
        self._cells[at + _RUNNING] += 1
        requests_window = tokens_window = None
        if requests_used is not None:
            requests_used.use(now, 1)
            requests_window = Window(free_requests - 1, WINDOW_S)
        if tokens_used is not None:
            self._cells[at + _RESERVED] += tokens
            tokens_window = Window(free_tokens - tokens, WINDOW_S)
        return Verdict(None, None, requests_window, tokens_window)

    def leave(self, now: float, slot: int, reserved: int, used: int) -> None:
        """A request has ended that used so many of the tokens that were reserved for it, or more."""
        cells = self._cells
        at = _SLOTS + _SLOT * slot
        cells[at + _RUNNING] -= 1
        if self._tokens is not None:
            cells[at + _RESERVED] -= reserved
            if used:
                self._tokens.use(now, used)

    def _held(self, now: float, generations: memoryview[int], slots: int) -> tuple[int, int]:
        """What runs, and what is reserved for it, in all processes that live."""
        cells = self._cells
        running = reserved = 0
        at = _SLOTS
        for slot in range(slots):
            if cells[at] == generations[slot]:
                running += cells[at + _RUNNING]
                reserved += cells[at + _RESERVED]
            elif cells[at + _RESERVED]:
                self._settle(now, at)
            at += _SLOT
        return running, reserved

    def _settle(self, now: float, at: int) -> None:
        """Of a slot whose process died: how much its requests used of what was reserved, nobody knows any more."""
        if self._tokens is not None and self._cells[at + _RESERVED]:
            self._tokens.use(now, self._cells[at + _RESERVED])
        self._cells[at + _RESERVED] = 0

    def _over_part(self, running: int, requests: int, tokens: int) -> Limit | None:
        """The limit of which this node has no part left, with so many running and used, and these tokens besides."""
        cells, limits = self._cells, self._limits
        if limits.concurrency is not None and running >= cells[_MAY_RUN]:
            return Limit.CONCURRENCY
        if limits.requests is not None and requests >= cells[_MAY_REQUEST]:
            return Limit.REQUESTS
        return Limit.TOKENS if limits.tokens is not None and tokens > cells[_MAY_TAKE] else None

    def _refuse_over_part(
        self, now: float, over: Limit, reserved: int, free_requests: int, free_tokens: int
    ) -> Verdict:
        requests, tokens = self._requests, self._tokens
        return Verdict(
            over,
            RUNNING_RETRY_S,
            None if requests is None else Window(free_requests, requests.reset(now)),
            None if tokens is None else Window(free_tokens, WINDOW_S if reserved else tokens.reset(now)),
            short=True,
        )

    def _refuse(
        self, now: float, running: int, reserved: int, tokens: int, free_requests: int, free_tokens: int
    ) -> Verdict:
        """Named is the limit that has no room for the longest."""
        limits = self._limits
        waits: list[tuple[float, Limit]] = []
        requests_window = tokens_window = None
        if limits.concurrency is not None and running >= limits.concurrency:
            waits.append((RUNNING_RETRY_S, Limit.CONCURRENCY))
        if (ring := self._requests) is not None:
            requests_window = Window(free_requests, ring.reset(now))
            if free_requests < 1:
                waits.append((ring.wait(now, ring.limit - 1), Limit.REQUESTS))
        if (ring := self._tokens) is not None:
            tokens_window = Window(free_tokens, WINDOW_S if reserved else ring.reset(now))
            if tokens > ring.limit:
                return Verdict(Limit.TOKENS, None, requests_window, tokens_window)
            if free_tokens < tokens:
                room = ring.limit - reserved - tokens
                waits.append((RUNNING_RETRY_S if room < 0 else ring.wait(now, room), Limit.TOKENS))
        wait, limit = max(waits)
        return Verdict(limit, wait, requests_window, tokens_window)


def _first_after(times: memoryview[float], count: int, cutoff: float) -> int:
    """The number of the first entry later than `cutoff`, of those that a ring still holds; `count` if there is none."""
    size = len(times)
    if count <= size:
        return bisect_right(times, cutoff, 0, count)
    oldest = count % size
    if times[size - 1] > cutoff:
        return count - size + bisect_right(times, cutoff, oldest, size) - oldest
    return count - oldest + bisect_right(times, cutoff, 0, oldest)


def _first_at_least(sums: memoryview[int], count: int, least: int) -> int:
    """The number of the first entry of at least `least`, of those that a ring still holds; `count` if there is none."""
    size = len(sums)
    if count <= size:
        return bisect_left(sums, least, 0, count)
    oldest = count % size
    if sums[size - 1] >= least:
        return count - size + bisect_left(sums, least, oldest, size) - oldest
    return count - oldest + bisect_left(sums, least, 0, oldest)
