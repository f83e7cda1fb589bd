"""What an API key may use: requests and tokens in any 60 seconds, and requests at once.

The state of a key is a row of cells that several processes see; who calls holds the row's lock, for `admit` and `leave`
alike. Two sliding windows are kept as rings of times in order, so that each question costs O(log n) at most:

- the time of each admitted request, in a ring as long as the limit: the oldest time in it must be out of the window.
- used tokens, summed over tenths of a second: an entry holds the sum of all that was used before it.

What runs, and the tokens reserved for it, each process keeps in cells of its slot, marked with its generation. When it
dies its slot gets another generation, and those cells count no more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from enum import StrEnum

import msgspec

WINDOW_S = 60.0
TOKEN_STEP_S = 0.1
"""Tokens count for up to this much longer than the window, never shorter."""
RUNNING_RETRY_S = 1.0
"""When one of those that run will have ended nobody can say."""

_TOKEN_ENTRIES = 1024  # more than there are steps in a window
_WORD = 8
_ERA, _ADMITTED, _TOKENS, _ENTRIES, _SLOTS = range(5)
_GENERATION, _RUNNING, _RESERVED, _SLOT = range(4)


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


class Row:
    """One key's cells, `size` bytes. `era` names the clock of `now`: what another one left is wiped."""

    __slots__ = ("_cells", "_limits", "_times", "_token_sums", "_token_times")

    def __init__(self, cells: memoryview, limits: Limits, *, slots: int, era: int) -> None:
        self._limits = limits
        self._cells = cells.cast("q")
        if self._cells[_ERA] != era:
            cells[:] = bytes(len(cells))
            self._cells[_ERA] = era
        at = _WORD * (_SLOTS + _SLOT * slots)
        end = at + _WORD * (limits.requests or 0)
        self._times = cells[at:end].cast("d")
        entries = _WORD * (0 if limits.tokens is None else _TOKEN_ENTRIES)
        self._token_times = cells[end : end + entries].cast("d")
        self._token_sums = cells[end + entries : end + 2 * entries].cast("q")

    @staticmethod
    def size(limits: Limits, slots: int) -> int:
        rings = (limits.requests or 0) + (0 if limits.tokens is None else 2 * _TOKEN_ENTRIES)
        return _WORD * (_SLOTS + _SLOT * slots + rings)

    def enter(self, slot: int, generation: int) -> None:
        """A process begins to use the row, with nothing running."""
        at = _SLOTS + _SLOT * slot
        self._cells[at + _RUNNING] = self._cells[at + _RESERVED] = 0
        self._cells[at + _GENERATION] = generation

    def admit(self, now: float, slot: int, generations: memoryview[int], slots: int, tokens: int) -> Verdict:
        """Admit a request for which `tokens` are reserved, or refuse it and change nothing.

        `generations`: those of the slots, of which the first `slots` may be in use.
        """
        limits, cells = self._limits, self._cells
        running, reserved = self._held(generations, slots)
        since = now - WINDOW_S
        free_requests = free_tokens = 0
        full = limits.concurrency is not None and running >= limits.concurrency
        if limits.requests is not None:
            admitted = cells[_ADMITTED]
            free_requests = limits.requests - admitted + _first_after(self._times, admitted, since)
            full = full or free_requests < 1
        if limits.tokens is not None:
            free_tokens = limits.tokens - reserved - self._used(since)
            full = full or free_tokens < tokens
        if full:
            return self._refuse(now, running, reserved, tokens, free_requests, free_tokens)
        at = _SLOTS + _SLOT * slot
        cells[at + _RUNNING] += 1
        requests_window = tokens_window = None
        if limits.requests is not None:
            self._times[admitted % limits.requests] = now
            cells[_ADMITTED] = admitted + 1
            requests_window = Window(free_requests - 1, WINDOW_S)
        if limits.tokens is not None:
            cells[at + _RESERVED] += tokens
            tokens_window = Window(free_tokens - tokens, WINDOW_S)
        return Verdict(None, None, requests_window, tokens_window)

    def leave(self, now: float, slot: int, reserved: int, used: int) -> None:
        """A request has ended that used so many of the tokens that were reserved for it, or more."""
        cells = self._cells
        at = _SLOTS + _SLOT * slot
        cells[at + _RUNNING] -= 1
        if self._limits.tokens is not None:
            cells[at + _RESERVED] -= reserved
            if used:
                self._use(now, used)

    def _held(self, generations: memoryview[int], slots: int) -> tuple[int, int]:
        """What runs, and what is reserved for it, in all processes that live."""
        cells = self._cells
        running = reserved = 0
        at = _SLOTS
        for slot in range(slots):
            if cells[at] == generations[slot]:
                running += cells[at + _RUNNING]
                reserved += cells[at + _RESERVED]
            at += _SLOT
        return running, reserved

    def _used(self, since: float) -> int:
        """Tokens used after `since`."""
        cells = self._cells
        entries = cells[_ENTRIES]
        first = _first_after(self._token_times, entries, since)
        return 0 if first == entries else cells[_TOKENS] - self._token_sums[first % _TOKEN_ENTRIES]

    def _refuse(
        self, now: float, running: int, reserved: int, tokens: int, free_requests: int, free_tokens: int
    ) -> Verdict:
        """Named is the limit that has no room for the longest."""
        limits, cells = self._limits, self._cells
        waits: list[tuple[float, Limit]] = []
        requests_window = tokens_window = None
        if limits.concurrency is not None and running >= limits.concurrency:
            waits.append((RUNNING_RETRY_S, Limit.CONCURRENCY))
        if limits.requests is not None:
            requests_window = Window(free_requests, self._reset(self._times, cells[_ADMITTED], now))
            if free_requests < 1:
                waits.append((self._times[cells[_ADMITTED] % limits.requests] + WINDOW_S - now, Limit.REQUESTS))
        if limits.tokens is not None:
            reset = WINDOW_S if reserved else self._reset(self._token_times, cells[_ENTRIES], now)
            tokens_window = Window(free_tokens, reset)
            if free_tokens < tokens:
                waits.append((self._token_wait(now, limits.tokens - reserved - tokens), Limit.TOKENS))
                if tokens > limits.tokens:
                    return Verdict(Limit.TOKENS, None, requests_window, tokens_window)
        wait, limit = max(waits)
        return Verdict(limit, wait, requests_window, tokens_window)

    def _reset(self, times: memoryview[float], count: int, now: float) -> float:
        """Seconds until the latest entry of a ring is out of the window."""
        return max(0.0, times[(count - 1) % len(times)] + WINDOW_S - now) if count else 0.0

    def _token_wait(self, now: float, room: int) -> float:
        """Seconds until no more than `room` tokens were used within the window."""
        if room < 0:
            return RUNNING_RETRY_S
        entries = self._cells[_ENTRIES]
        # The entries before the first one whose sum is large enough must be out of the window.
        first = _first_at_least(self._token_sums, entries, self._cells[_TOKENS] - room)
        return self._token_times[(first - 1) % _TOKEN_ENTRIES] + WINDOW_S - now

    def _use(self, now: float, used: int) -> None:
        cells, times = self._cells, self._token_times
        entries = cells[_ENTRIES]
        last = (entries - 1) % _TOKEN_ENTRIES
        if not entries or now // TOKEN_STEP_S != times[last] // TOKEN_STEP_S:
            last = entries % _TOKEN_ENTRIES
            self._token_sums[last] = cells[_TOKENS]
            cells[_ENTRIES] = entries + 1
        times[last] = now
        cells[_TOKENS] += used


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
