"""The waiting room: requests wait here for a model that is on its way, for instances that have all that they take at
once, or until fewer are ongoing.

The order is that of core/admission.py; this brings it clock, clients and the routing table. A request that need not
wait passes with `enter` and is counted by `held`, and costs nothing else. One that waits is a `Stay`.

Whether instances are full is found out by who was let in (`full`). From then on who waits for the model is let in as
requests to it end, and by a look at what other processes left, every few milliseconds.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Protocol

import msgspec

from modelpool.core.admission import Admission, Bounds, Refusal, State, Ticket
from modelpool.errors import CapacityError, InvalidRequest, TooManyOngoing, WaitingRoomFull
from modelpool.gateway.answer import comment, stream_head
from modelpool.gateway.body import asks_for_stream
from modelpool.gateway.instances import Instance
from modelpool.gateway.request import Request
from modelpool.gateway.table import RETRY_S, Model, Table
from modelpool.messages.models import alias_of

_MAX_WAIT = b"x-modelpool-max-wait"
_NO_COLD_START = b"x-modelpool-no-cold-start"
_YES_OR_NO = {b"true": True, b"1": True, b"false": False, b"0": False}
# Where an answer may be an event stream: elsewhere a comment would spoil it.
_STREAMING = frozenset({b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages"})
# What is waited for until it is known which models there are. No model has this name.
_UNKNOWN = ""
_LOOK_S = 0.1
_LOOK_SHARED_S = 0.01
"""Every so often a full model is looked at: an instance may be tried again, another process may have left a place."""
_SAY_FULL_S = 0.1
"""So often at most the manager is told at once that requests wait for a full model."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds. `max_wait_s` 0: nobody waits."""

    max_ongoing: int
    max_wait_s: float = 0.0
    bounds: Bounds = Bounds(tickets=8192, bytes=256 << 20)
    heartbeat_s: float = 5.0


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What a request says of its waiting."""

    max_wait_s: float = math.inf
    cold_start: bool = True


class Client(Protocol):
    """Who waits: a ClientConnection."""

    @property
    def opened(self) -> bool:
        """Whether something was sent ahead of the answer."""

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this answer."""

    def write_ahead(self, data: bytes) -> None: ...


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
        self._watched: dict[str, Model] = {}
        """Those that were found full, by alias; requests wait for their instances."""
        self._looking: asyncio.Handle | None = None
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
        return [alias for alias in self._admission.wanted if alias != _UNKNOWN]

    def enter(self, alias: str, request: Request) -> bool:
        """Go on at once, if that may be. Raises InvalidRequest for wishes that make no sense."""
        by_name = request.by_name
        if _MAX_WAIT in by_name or _NO_COLD_START in by_name:
            wishes_of(by_name)
        return self._admission.enter(alias)

    @asynccontextmanager
    async def place(self, alias: str, request: Request, client: Client) -> AsyncIterator[None]:
        """All of it in one, for where a microsecond is nothing; with an instance to choose that is not full, as long as
        nothing is awaited before. Raises PoolError when it may not go on.
        """
        stay = None
        while True:
            if not self.enter(alias, request):
                stay = stay or Stay(self, alias, request, client)
                await stay.granted()
            with self.held:
                if stay is not None and request.caller is not None:
                    request.caller.check(alias)  # its key may be revoked by now
                model = self.table.find(alias)
                if model is None or not model.instances or model.places:
                    yield
                    return
                self.full(alias)

    @asynccontextmanager
    async def place_beside(self, alias: str, request: Request, client: Client) -> AsyncIterator[None]:
        """The same for what goes to one instance and no other, full or not."""
        waits = not self._admission.enter_full(alias)
        if waits:
            await Stay(self, alias, request, client).granted()
        with self.held:
            if waits and request.caller is not None:
                request.caller.check(alias)
            yield

    def full(self, alias: str) -> None:
        """One that was let in found all instances full. It is to wait now, and so is who comes after it."""
        self._admission.full(alias)
        self._watch(alias)

    def look_again(self) -> None:
        """What instances may be sent may have changed."""
        for alias, model in list(self._watched.items()):
            waited_for = self.waiting_for(alias)
            if model is not self.table.find(alias) or not waited_for:
                self._watch_no_more(alias)
                if waited_for:
                    self._watch(alias)
                else:
                    self._admission.freed(alias)
            if self.is_full(alias):
                self._wake(self._admission.freed(alias, self._places(alias)))
        self._arm()

    # For a Stay

    def join(self, ticket: Ticket, *, awake_only: bool) -> asyncio.Future[None] | None:
        """What to wait for; None when the ticket is granted already. The end of it is no grant: the ticket's state is.

        Raises WaitingRoomFull. `awake_only`: not once the model is not there.
        """
        was_empty, first = not self._admission.waiting, not self._admission.waiting_for(ticket.alias)
        if refusal := self._admission.join(ticket):
            raise self._full(ticket.alias, refusal)
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

    def _watch(self, alias: str) -> None:
        """Look at the model's instances whenever a request to one of them has ended, and every now and then."""
        if (model := self.table.find(alias)) is None:
            return
        self._watched[alias] = model
        for instance in model.instances:
            instance.want(self._freed)
        if self._looking is None:
            self._look_later()

    def _watch_no_more(self, alias: str) -> None:
        for instance in self._watched.pop(alias).instances:
            instance.want(None)

    def _freed(self, instance: Instance) -> None:
        if instance.places and instance.may_be_followed:
            self._wake(self._admission.freed(alias_of(instance.name)))
            self._arm()

    def _places(self, alias: str) -> int:
        model = self.table.find(alias)
        return 0 if model is None else model.places

    def _look_later(self) -> None:
        pause = _LOOK_SHARED_S if self.table.shared else _LOOK_S
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(pause * random.uniform(0.5, 1.5), self._look_at_full)

    def _look_at_full(self) -> None:
        self._looking = None
        self.look_again()
        if self._watched:
            self._look_later()

    def _done(self) -> None:
        if granted := self._admission.done():
            self._wake(granted)
            self._arm()

    def _wake(self, granted: Iterable[Ticket]) -> None:
        for ticket in granted:
            self._granted += 1
            self._tell(ticket)

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
            self._come(alias)
        for ticket in [each for each in self._awake_only if each.alias not in self._routed]:
            admission.leave(ticket)
            self._tell(ticket)
        for alias in admission.wanted:
            if table.known and (alias == _UNKNOWN or not is_on_its_way(table.find(alias))):
                for ticket in admission.evict(alias):
                    self._tell(ticket)
        for future in self._news:
            if not future.done():
                future.set_result(None)
        self.look_again()

    def _come(self, alias: str) -> None:
        """There are instances. Of those who wait for them no more go on than they take."""
        if not self.waiting_for(alias):
            self._admission.available(alias)
            return
        self._watch(alias)
        self._wake(self._admission.available(alias, self._places(alias)))

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

    def _full(self, alias: str, refusal: Refusal) -> WaitingRoomFull:
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


class Stay:
    """A request that waits, once or several times, until one deadline.

    A client that asked for a stream is sent comments from `heartbeat_s` on, so that nothing on the way to it takes
    the connection for dead. They commit status 200: what fails afterwards is said in the stream.
    """

    def __init__(self, room: Room, alias: str, request: Request, client: Client) -> None:
        self._room = room
        self._alias = alias
        self._request = request
        self._client = client
        self._wishes = wishes_of(request.by_name)
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._deadline = self._since + min(self._wishes.max_wait_s, room.rules.max_wait_s)
        self._last_ticket: Ticket | None = None
        streaming = request.route is not None and request.route.path in _STREAMING
        self._next_beat = self._since + room.rules.heartbeat_s if streaming and asks_for_stream(request.body) else None

    async def granted(self) -> None:
        """Wait for the grant; `held` must follow at once. Raises PoolError with the reason when there will be none."""
        begun = self._loop.time()
        self._request.journey.waits()
        try:
            await self._granted()
        finally:
            self._request.journey.waited(self._loop.time() - begun)

    async def _granted(self) -> None:
        room = self._room
        while not room.enter(self._alias, self._request):
            ticket = self._ticket()
            future = room.join(ticket, awake_only=not self._wishes.cold_start)
            if future is not None:
                try:
                    await self._hear(future)
                except BaseException:
                    room.leave(ticket)
                    raise
            if ticket.state is State.GRANTED:
                return

    async def nobody_took_it(self, error: CapacityError) -> None:
        """No instance took it: wait for other ones, and not for long. Raises `error` once it is too late for that.

        Where there is no instance any more it is to wait for its grant again, which it does not do here.
        """
        left_s = self._deadline - self._loop.time()
        if left_s <= 0:
            raise error
        if (model := self._room.table.find(self._alias)) is None or not model.instances:
            return
        try:
            async with asyncio.timeout(min(RETRY_S, left_s)):
                await self._hear(self._room.news())
        except TimeoutError:
            pass

    def _ticket(self) -> Ticket:
        """Raises PoolError where there is nothing to wait for, or not any more."""
        table, now = self._room.table, self._loop.time()
        expired = now >= self._deadline
        if table.known or expired or not self._wishes.cold_start:
            model = table.model(self._alias)
            if model.instances:
                if expired:
                    raise self._room.too_many(model)
            elif expired or not self._wishes.cold_start or not is_on_its_way(model):
                waited_s = round(now - self._since, 1)
                raise model.unavailable(f" This request waited for it for {waited_s:g} s." if waited_s else "")
        caller = self._request.caller
        alias = self._alias if table.known else _UNKNOWN
        last = self._last_ticket
        ticket = self._last_ticket = Ticket(
            alias,
            caller="" if caller is None else caller.id,
            priority=0 if caller is None else caller.priority,
            size=len(self._request.body),
            deadline=self._deadline,
            number=last.number if last is not None and last.alias == alias else 0,
        )
        return ticket

    async def _hear(self, waiting: asyncio.Future[None]) -> None:
        """Wait, and say so to the client every now and then."""
        if self._next_beat is None:
            await waiting
            return
        self._timer = self._loop.call_at(self._next_beat, self._beat)
        try:
            await waiting
        finally:
            self._timer.cancel()

    def _beat(self) -> None:
        client, request = self._client, self._request
        chunked = not request.http10
        head = b"" if client.opened else stream_head(request.added, chunked=chunked, close=client.closes)
        client.write_ahead(head + comment(b"waiting", chunked=chunked))
        self._next_beat = self._loop.time() + self._room.rules.heartbeat_s
        self._timer = self._loop.call_at(self._next_beat, self._beat)


def is_on_its_way(model: Model | None) -> bool:
    """Whether a request may wait for it: it is there, or is to be."""
    if model is None:
        return False
    why = model.entry.unavailable
    return bool(model.instances) or (why is not None and why.on_its_way)


def wishes_of(by_name: Mapping[bytes, bytes]) -> Wishes:
    """What the headers say. Raises InvalidRequest, naming the header."""
    max_wait_s, cold_start = math.inf, True
    if (text := by_name.get(_MAX_WAIT)) is not None:
        max_wait_s = _seconds(text)
    if (text := by_name.get(_NO_COLD_START)) is not None:
        no_cold_start = _YES_OR_NO.get(text.lower())
        if no_cold_start is None:
            raise _bad_header("X-ModelPool-No-Cold-Start", "true or false", text)
        cold_start = not no_cold_start
    return Wishes(max_wait_s=max_wait_s, cold_start=cold_start)


def _seconds(text: bytes) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise _bad_header("X-ModelPool-Max-Wait", "a number of seconds, 0 or more", text)
    return seconds


def _bad_header(name: str, allowed: str, text: bytes) -> InvalidRequest:
    shown = text[:100].decode("latin-1")
    return InvalidRequest(f"The header {name} must be {allowed}, got {shown!r}.", param=name, code="invalid_header")
