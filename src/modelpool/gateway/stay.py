"""A request that waits in the room (gateway/hold.py): how long, what its client hears, why it may not go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from modelpool.core.admission import State, Ticket
from modelpool.errors import CapacityError, ModelBusy
from modelpool.gateway.answer import comment, stream_head
from modelpool.gateway.body import asks_for_stream
from modelpool.gateway.hold import UNKNOWN, Room, is_on_its_way
from modelpool.gateway.request import Request
from modelpool.gateway.table import RETRY_S
from modelpool.gateway.wishes import wishes_of

# Where an answer may be an event stream: elsewhere a comment would spoil it.
_STREAMING = frozenset({b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages"})


class Client(Protocol):
    """Who waits: a ClientConnection."""

    @property
    def opened(self) -> bool:
        """Whether something was sent ahead of the answer."""

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this answer."""

    def write_ahead(self, data: bytes) -> None: ...


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
        self._ticket: Ticket | None = None
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
            ticket = self._ticket = self._to_join()
            future = room.join(ticket, awake_only=not self._wishes.cold_start)
            try:
                if future is not None:
                    await self._hear(future)
                self._check()
            except BaseException:
                room.leave(ticket)
                raise
            if ticket.state is State.GRANTED:
                return

    async def nobody_took_it(self, error: CapacityError) -> None:
        """No instance took it: wait for other ones, and not for long. Raises `error` once it is too late for that.

        Where all are full, or there is none any more, it is to wait for its grant again, which it does not do here.
        """
        if isinstance(error, ModelBusy):
            self._room.full(self._alias)
            return
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
        self._check()

    def _check(self) -> None:
        """Its key may be revoked by now."""
        if self._request.caller is not None:
            self._request.caller.check(self._alias)

    def _to_join(self) -> Ticket:
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
        alias = self._alias if table.known else UNKNOWN
        if self._ticket is not None and self._ticket.alias == alias:
            return self._ticket
        caller = self._request.caller
        return Ticket(
            alias,
            caller="" if caller is None else caller.id,
            priority=0 if caller is None else caller.priority,
            size=len(self._request.body),
            deadline=self._deadline,
        )

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


@asynccontextmanager
async def placed_beside(room: Room, alias: str, request: Request, client: Client) -> AsyncIterator[None]:
    """Let in by the room, after its stay if it must, for what goes to one instance and no other, full or not. Raises
    PoolError when it may not go on.
    """
    if not room.enter_full(alias):
        await Stay(room, alias, request, client).granted()
        room.spare(alias)
    with room.held:
        yield
