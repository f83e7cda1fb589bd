"""Holds each key's limits over all gateway processes of this node: `core.limits` on memory that they share.

Each limited key has a file of its own among the node's. It outlives the processes, so a restart gives nobody a new
minute. A process that dies gives back what it had running; the tokens that it had reserved for that count as used.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

from modelpool.core.limits import Limit, Limits, Row, Use, Verdict
from modelpool.core.shares import first_part
from modelpool.errors import InternalError, RateLimitExceeded, UpstreamTimeout
from modelpool.gateway.keys import Caller
from modelpool.gateway.meter import NOTHING, Estimate, Meter, estimate
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Kind, Route
from modelpool.gateway.shared import SLOTS, Lock, Node
from modelpool.messages.demand import KeyDemand
from modelpool.messages.routing import Others

OPEN_MAX = 512
"""Keys whose files are kept open while nothing of theirs runs: each takes a descriptor."""
log = logging.getLogger(__name__)

_FREE: AbstractContextManager[None] = nullcontext()
_LINES = b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-reset-%b: %b\r\nx-ratelimit-remaining-%b: "
_WHILE_IT_RAN = (asyncio.CancelledError, UpstreamTimeout)
_SAY_SHORT_S = 0.1
_FILE = "limits-{}"
"""The layout of the file in its name, so that processes of two versions may run at once."""
_FIRST_LOCK = 1 << 20
_LOCKS = 1 << 20


class Limiter:
    """`clock` is one that all processes of the node read the same; `era` changes when it begins anew."""

    def __init__(self, node: Node, *, clock: Callable[[], float] = time.monotonic, era: int | None = None) -> None:
        self._node = node
        self._era = _boot() if era is None else era
        self._keys: dict[str, _Key] = {}
        self._others: Others | None = None
        self._when_short: Callable[[], None] = lambda: None
        self._said_short = -math.inf
        self.clock = clock
        self.slot = node.slot
        self.generations = memoryview(node.map("generations", 8 * (SLOTS + 1), whole=True)).cast("q")
        """Of each slot, and last the number of slots that were ever in use."""
        with node.lock(_FIRST_LOCK):
            self.generations[SLOTS] = max(self.generations[SLOTS], node.slot + 1)
        node.keep_clear(self._clear)

    def admitted(self, request: Request, route: Route) -> AbstractContextManager[None]:
        """Counts a request of a limited key from `with` to its end. Entered, raises RateLimitExceeded."""
        caller = request.caller
        if caller is None or caller.limits is None or route.kind is Kind.RESPONSE:
            return _FREE
        return _Grant(self, self._keys.get(caller.id) or self._mapped(caller.id, caller.limits), request, route)

    def when_short(self, act: Callable[[], None]) -> None:
        """Have `act` called when a request was refused since other nodes have the rest of its key's limit."""
        self._when_short = act

    def say_short(self) -> None:
        """For a grant. What is refused meanwhile is said with the next."""
        if (now := self.clock()) - self._said_short > _SAY_SHORT_S:
            self._said_short = now
            self._when_short()

    @property
    def heard(self) -> int:
        """The number of what was heard of other nodes last."""
        return self._others.number if self._others else 0

    def hear(self, others: Others) -> None:
        """What the other nodes leave to this one."""
        self._others = others
        for id, key in self._keys.items():
            self._allow(id, key)

    def _allow(self, id: str, key: _Key) -> None:
        others = self._others
        if others is not None:
            with key.lock:
                key.row.allow(others.number, others.keys.get(id) or _first_part(key.limits, others.nodes))

    def demand(self) -> dict[str, KeyDemand]:
        """What the manager is to know of the keys that are used: by their ids."""
        said = {}
        for id, key in self._keys.items():
            with key.lock:
                use = key.row.use(self.clock(), self.generations, self.generations[SLOTS])
                part = key.row.part()
            if use != Use() or key.asked_requests:
                asked = Use(requests=key.asked_requests, tokens=key.asked_tokens)
                said[id] = KeyDemand(use=use, asked=asked, part=part)
                key.asked_requests = key.asked_tokens = 0
        return said

    def forget(self, caller: Caller) -> None:
        """The key is gone. What it has running still writes to what it has mapped."""
        if caller.limits is not None:
            self._keys.pop(caller.id, None)
            self._node.remove(_FILE.format(caller.id))

    def _mapped(self, id: str, limits: Limits) -> _Key:
        """Raises InternalError where there is no room for it."""
        if len(self._keys) >= OPEN_MAX:
            self._keys = {id: key for id, key in self._keys.items() if key.running}
        number = int.from_bytes(id.encode()[-8:], "little") % _LOCKS
        lock = self._node.lock(_FIRST_LOCK + 1 + number)
        try:
            cells = memoryview(self._node.map(_FILE.format(id), Row.size(limits, SLOTS), whole=True))
        except OSError as error:
            log.error("the limits of %s: %s", id, error)
            raise InternalError(f"The limits of this key cannot be kept: {error.strerror}.") from error
        with lock:
            row = Row(cells, limits, slots=SLOTS, era=self._era)
            row.enter(self.clock(), self.slot, self.generations[self.slot])
        key = self._keys[id] = _Key(limits, row, lock)
        self._allow(id, key)
        return key

    def _clear(self, slot: int) -> None:
        self.generations[slot] += 1


class _Key:
    """A row that this process has mapped. `running`: requests of this process; `lines`: see `_template`.

    `asked_…`: what this process was asked for since that was last reported.
    """

    __slots__ = ("asked_requests", "asked_tokens", "limits", "lines", "lock", "row", "running")

    def __init__(self, limits: Limits, row: Row, lock: Lock) -> None:
        self.limits = limits
        self.row = row
        self.lock = lock
        self.running = 0
        self.asked_requests = self.asked_tokens = 0
        self.lines = _template(limits)


class _Grant:
    """A request from its admission to its end."""

    __slots__ = ("_estimate", "_key", "_limiter", "_request", "_route")

    def __init__(self, limiter: Limiter, key: _Key, request: Request, route: Route) -> None:
        self._limiter = limiter
        self._key = key
        self._request = request
        self._route = route
        self._estimate = NOTHING

    def __enter__(self) -> None:
        limiter, key, request = self._limiter, self._key, self._request
        tokens = 0
        if key.limits.tokens is not None:
            self._estimate = needs = estimate(self._route, request.body)
            tokens = needs.total
        key.asked_requests += 1
        key.asked_tokens += tokens
        generations = limiter.generations
        with key.lock:
            verdict = key.row.admit(limiter.clock(), limiter.slot, generations, generations[SLOTS], tokens)
        if verdict.refused is not None:
            if verdict.short:
                limiter.say_short()
            request.added += _lines(key.limits, verdict)
            raise _refusal(request, key.limits, verdict, self._estimate)
        request.added += _filled(key.lines, verdict)
        key.running += 1
        if key.limits.tokens is not None:
            request.meter = Meter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        limiter, key, meter = self._limiter, self._key, self._request.meter
        key.running -= 1
        if meter is None:
            key.row.leave(0.0, limiter.slot, 0, 0)  # only this process writes to what that changes
            return
        used = meter.used(self._estimate, abandoned=error is not None and isinstance(error, _WHILE_IT_RAN))
        with key.lock:
            key.row.leave(limiter.clock(), limiter.slot, self._estimate.total, used)


def _first_part(limits: Limits, nodes: int) -> Limits:
    """Of limits of which no node has used anything lately."""
    each = {name: getattr(limits, name) for name in Limits.__struct_fields__}
    return Limits(**{name: None if limit is None else first_part(limit, nodes) for name, limit in each.items()})


def _template(limits: Limits) -> bytes:
    """The header lines of an admitted request, as OpenAI has them, but for what is left of each limit.

    All of a limit is free a minute after the last request, which is this one.
    """
    full = ((b"requests", limits.requests), (b"tokens", limits.tokens))
    return b"".join(
        _LINES % (what, limit, what, b"1m0s", what) + b"%d\r\n" for what, limit in full if limit is not None
    )


def _filled(template: bytes, verdict: Verdict) -> bytes:
    requests, tokens = verdict.requests, verdict.tokens
    if requests is None:
        return b"" if tokens is None else template % tokens.remaining
    return template % requests.remaining if tokens is None else template % (requests.remaining, tokens.remaining)


def _lines(limits: Limits, verdict: Verdict) -> bytes:
    """The header lines of a request that was refused."""
    lines = b""
    for what, limit, window in (
        (b"requests", limits.requests, verdict.requests),
        (b"tokens", limits.tokens, verdict.tokens),
    ):
        if window is not None:
            lines += _LINES % (what, limit, what, _duration(window.reset), what)
            lines += b"%d\r\n" % max(0, window.remaining)
    return lines


def _duration(seconds: float) -> bytes:
    """`1m0s`, `59.3s`, `12ms`."""
    ms = math.ceil(seconds * 1000)
    if ms < 1000:
        return b"%dms" % ms
    minutes, ms = divmod(ms, 60_000)
    return (f"{minutes}m" if minutes else "").encode() + f"{ms / 1000:g}s".encode()


def _refusal(request: Request, limits: Limits, verdict: Verdict, needs: Estimate) -> RateLimitExceeded:
    assert request.caller is not None
    name = f"The API key `{request.caller.name}`"
    again = "" if verdict.retry_after is None else f" Try again in {max(1, math.ceil(verdict.retry_after))} s."
    if verdict.refused is Limit.TOKENS:
        room = max(0, verdict.tokens.remaining) if verdict.tokens else 0
        message = (
            f"{name} may use {limits.tokens} tokens per minute, of which {room} are left, and this request may need "
            f"{needs.total} ({needs.prompt} for what it says, {needs.completion} for the answer)."
        )
        again = again or " Waiting does not help: shorten it, or ask for fewer tokens."
    elif verdict.refused is Limit.REQUESTS:
        message = f"{name} may make {limits.requests} requests per minute."
    else:
        message = f"{name} may have {limits.concurrency} requests at once."
    return RateLimitExceeded(
        message + again,
        type="tokens" if verdict.refused is Limit.TOKENS else "requests",
        retry_after=verdict.retry_after,
    )


def _boot() -> int:
    """A number of this start of the machine, from which on its monotonic clock counts."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return int(text.replace("-", "")[:15], 16) or 1
