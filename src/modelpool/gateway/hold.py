"""The waiting room: requests wait here for a model that is on its way, for instances that have all that they take at
once, or until fewer are ongoing.

The order is that of core/admission.py; this brings it clock and routing table. A request that need not wait passes with
`enter` and is counted by `held`, and costs nothing else. One that waits has a `Stay` (gateway/stay.py).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from types import TracebackType

import msgspec

from modelpool.core.admission import Admission, Bounds, Refusal, State, Ticket
from modelpool.errors import CapacityError, TooManyOngoing, WaitingRoomFull
from modelpool.gateway.full_models import FullModels
from modelpool.gateway.request import Request
from modelpool.gateway.table import RETRY_S, Model, Table
from modelpool.gateway.wishes import MAX_WAIT, NO_COLD_START, wishes_of

# What is waited for until it is known which models there are. No model has this name.
UNKNOWN = ""
_SAY_FULL_S = 0.1
"""So often at most the manager is told at once that requests wait for a full model."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds. `max_wait_s` 0: nobody waits."""

    max_ongoing: int
    max_wait_s: float = 0.0
    bounds: Bounds = Bounds(tickets=8192, bytes=256 << 20)
    heartbeat_s: float = 5.0


class Room:
    """The requests of one process that are ongoing or wait."""

    def __init__(self, table: Table, rules: Rules) -> None:
        self.table = table
        self.rules = rules
        self.held = _Held(self._done)
        """`with` it, a request is ongoing: one that `enter` let in, or whose stay was granted."""
        self.wanted = asyncio.Event()
        """Set when the first request waits for a model that is not there, or now and then for one that is full; whoever
        waits for it clears it."""
        self._admission = Admission(max_ongoing=rules.max_ongoing, bounds=rules.bounds)
        self._routed: frozenset[str] = frozenset()
        self._futures: dict[Ticket, asyncio.Future[None]] = {}
        self._awake_only: set[Ticket] = set()
        self._news: set[asyncio.Future[None]] = set()
        self._timer: asyncio.Handle | None = None
        self._rings_at = 0.0
        self._full = FullModels(table, self._admission, self._wake)
        self._said_full = -math.inf
        # How fast those who wait were granted, since last nobody waited.
        self._since = 0.0
        self._granted = 0
        table.watch(self._look)
        self._look()

    @property
    def ongoing(self) -> int:
        return self._admission.ongoing

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    def waiting_for(self, alias: str) -> int:
        return self._admission.waiting_for(alias)

    def is_full(self, alias: str) -> bool:
        return self._admission.is_full(alias)

    def waiting_aliases(self) -> list[str]:
        """The models that requests wait for."""
        return [alias for alias in self._admission.wanted if alias != UNKNOWN]

    def enter(self, alias: str, request: Request) -> bool:
        """Go on at once, if that may be. Raises InvalidRequest for wishes that make no sense."""
        by_name = request.by_name
        if MAX_WAIT in by_name or NO_COLD_START in by_name:
            wishes_of(by_name)
        return self._admission.enter(alias)

    def enter_full(self, alias: str) -> bool:
        """The same for one that need not find a place at an instance."""
        return self._admission.enter_full(alias)

    def full(self, alias: str) -> None:
        """One that was let in found all instances full. It is to wait now, and so is who comes after it."""
        self._full.found(alias)

    def spare(self, alias: str) -> None:
        """One that was granted goes on without a place: it is for who waits next."""
        self._wake(self._admission.freed(alias))

    def look_again(self) -> None:
        """Other nodes leave more to this one, or less."""
        self._full.look_again()

    # For a Stay

    def join(self, ticket: Ticket, *, awake_only: bool) -> asyncio.Future[None] | None:
        """What to wait for; None when the ticket is granted already. The end of it is no grant: the ticket's state is.

        Raises WaitingRoomFull. `awake_only`: not once the model is not there.
        """
        was_empty, first = not self._admission.waiting, not self._admission.waiting_for(ticket.alias)
        if refusal := self._admission.join(ticket):
            raise self._refused(ticket.alias, refusal)
        if ticket.state is State.GRANTED:
            return None
        loop = asyncio.get_running_loop()
        if first:
            self._say_wanted(ticket.alias, loop.time())
        if was_empty:
            self._since, self._granted = loop.time(), 0
        future = self._futures[ticket] = loop.create_future()
        if awake_only:
            self._awake_only.add(ticket)
        self._arm()
        return future

    def leave(self, ticket: Ticket) -> None:
        """Its client is gone. If it was granted in this very moment, somebody else is now."""
        self._forget(ticket)
        self._wake(self._admission.leave(ticket))
        self._arm()

    def news(self) -> asyncio.Future[None]:
        """Ends when the routing table has changed."""
        future = asyncio.get_running_loop().create_future()
        self._news.add(future)
        future.add_done_callback(self._news.discard)
        return future

    def too_many(self, model: Model) -> CapacityError:
        """Why a request for a model that is there may not go on."""
        if self.is_full(model.entry.alias):
            return model.busy(self._turns_s())
        return TooManyOngoing(
            f"The gateway serves {self.rules.max_ongoing} requests at once already (SERVE_MAX_ONGOING_REQUESTS).",
            retry_after=self._turns_s(),
        )

    # Inside

    def _say_wanted(self, alias: str, now: float) -> None:
        if self.is_full(alias):
            if now - self._said_full < _SAY_FULL_S:
                return
            self._said_full = now
        self.wanted.set()

    def _done(self) -> None:
        if granted := self._admission.done():
            self._wake(granted)

    def _wake(self, granted: Sequence[Ticket]) -> None:
        for ticket in granted:
            self._granted += 1
            self._tell(ticket)
        if granted:
            self._arm()

    def _tell(self, ticket: Ticket) -> None:
        """Let who waits run. Where it was cancelled in this very moment, it sees from its ticket what it missed."""
        future = self._forget(ticket)
        if future is not None and not future.done():
            future.set_result(None)

    def _forget(self, ticket: Ticket) -> asyncio.Future[None] | None:
        self._awake_only.discard(ticket)
        return self._futures.pop(ticket, None)

    def _look(self) -> None:
        """The routing table has changed: grant what can be, and send away what waits for nothing any more."""
        admission, table = self._admission, self.table
        before, self._routed = self._routed, table.routed()
        for alias in before - self._routed:
            admission.unavailable(alias)
        for alias in self._routed - before:
            self._full.come(alias)
        for ticket in [each for each in self._awake_only if each.alias not in self._routed]:
            admission.leave(ticket)
            self._tell(ticket)
        for alias in admission.wanted:
            if table.known and (alias == UNKNOWN or not is_on_its_way(table.find(alias))):
                for ticket in admission.evict(alias):
                    self._tell(ticket)
        for future in self._news:
            if not future.done():
                future.set_result(None)
        self._full.look_again()
        self._arm()

    def _arm(self) -> None:
        """One timer, for the earliest deadline, while anybody waits. It may ring too early, and is set again then."""
        due = self._admission.next_deadline
        if self._timer is not None and (due is None or due < self._rings_at):
            self._timer.cancel()
            self._timer = None
        if due is not None and self._timer is None:
            self._rings_at = due
            self._timer = asyncio.get_running_loop().call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        for ticket in self._admission.expire(asyncio.get_running_loop().time()):
            self._tell(ticket)
        self._arm()

    def _refused(self, alias: str, refusal: Refusal) -> WaitingRoomFull:
        model = self.table.find(alias)
        why = model.entry.unavailable if model is not None else None
        return WaitingRoomFull(
            f"There is no place to wait for `{alias}`: {refusal}." if alias else f"The gateway starts, and {refusal}.",
            retry_after=self._turns_s() if why is None else why.retry_after,
        )

    def _turns_s(self) -> float:
        """Seconds until all that wait now had their turn, at the pace so far; by their deadlines all are gone."""
        waiting = self._admission.waiting
        if not waiting:
            return RETRY_S
        elapsed = asyncio.get_running_loop().time() - self._since
        turns_s = elapsed * waiting / self._granted if self._granted else elapsed
        return max(RETRY_S, min(turns_s, self.rules.max_wait_s))


class _Held:
    """`with` it, one request is ongoing. There is nothing to remember, so that one object does for all."""

    __slots__ = ("_done",)

    def __init__(self, done: Callable[[], None]) -> None:
        self._done = done

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done()


def is_on_its_way(model: Model | None) -> bool:
    """Whether a request may wait for it: it is there, or is to be."""
    if model is None:
        return False
    why = model.entry.unavailable
    return bool(model.instances) or (why is not None and why.on_its_way)
