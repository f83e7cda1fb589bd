"""`/v1/realtime`: a WebSocket, taken to an instance of the model that the query or the first events name.

Who names the model in the query is connected through at once. Else the handshake is answered here, and so is what
clients wait for before they say anything (`session.created`); what they said up to `session.update`, which names the
model, is then given to the instance as it came. From there on bytes pass, whatever frames they are.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import parse_qs

import msgspec
from websockets.datastructures import Headers
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request as HandshakeRequest
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from modelpool.errors import (
    CallerError,
    CapacityError,
    Draining,
    EngineError,
    InvalidRequest,
    PoolError,
    RequestTimeout,
    UpgradeRequired,
)
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.hold import Room
from modelpool.gateway.instances import Instance
from modelpool.gateway.limiter import Limiter
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Route
from modelpool.gateway.stay import Stay
from modelpool.gateway.table import Table
from modelpool.relay.websocket import UpstreamSocket, open_websocket

FIRST_EVENTS_BYTES_MAX = 1 << 20
FIRST_EVENTS_S = 60.0
_SUBPROTOCOL = Subprotocol("realtime")


class _Event(msgspec.Struct, frozen=True):
    type: str = ""
    model: str | None = None


_EVENT = msgspec.json.Decoder(_Event)


class Realtime:
    """Serves WebSockets by the routing table."""

    def __init__(
        self,
        table: Table,
        room: Room,
        limiter: Limiter,
        *,
        connect_timeout_s: float,
        first_events_s: float = FIRST_EVENTS_S,
    ) -> None:
        self._table = table
        self._room = room
        self._limiter = limiter
        self._connect_timeout_s = connect_timeout_s
        self._first_events_s = first_events_s

    async def serve(self, request: Request, route: Route, client: ClientConnection) -> None:
        """Until either side ends. Raises PoolError before the handshake is answered."""
        handshake = _Handshake(request)
        if alias := _model_in(request.query):
            async with self._upstream(alias, request, route, client) as upstream:
                client.switch(handshake.answer)
                await _pass(client, upstream)
            return
        client.switch(handshake.answer)
        try:
            async with asyncio.timeout(self._first_events_s):
                named = await handshake.first_events(client)
            if named is not None:
                async with self._upstream(named, request, route, client) as upstream:
                    upstream.write(handshake.received)
                    await _pass(client, upstream, drop_first=b'"session.created"')
        except TimeoutError:
            self._fail(request, client, handshake, RequestTimeout("No event named a model in time."))
        except PoolError as error:
            self._fail(request, client, handshake, error)

    def _fail(self, request: Request, client: ClientConnection, handshake: _Handshake, error: PoolError) -> None:
        request.journey.failed(error, answered=False)
        handshake.fail(client, error)

    @asynccontextmanager
    async def _upstream(
        self, alias: str, request: Request, route: Route, client: ClientConnection
    ) -> AsyncIterator[UpstreamSocket]:
        """A WebSocket of an instance of the model, with its lease; waited for as any answer is. Raises PoolError."""
        if request.caller is not None:
            request.caller.check(alias)
        request.journey.asked(alias)
        room, stay = self._room, None
        with self._limiter.admitted(request, route):
            while True:
                if not room.enter(alias, request):
                    stay = stay or Stay(room, alias, request, client)
                    await stay.granted()
                async with AsyncExitStack() as held:
                    held.enter_context(room.held)
                    try:
                        upstream = await held.enter_async_context(self._open_any(alias, request, route))
                    except CapacityError as error:
                        stay = stay or Stay(room, alias, request, client)
                        await stay.nobody_took_it(error)
                    else:
                        yield upstream
                        return

    @asynccontextmanager
    async def _open_any(self, alias: str, request: Request, route: Route) -> AsyncIterator[UpstreamSocket]:
        """Raises CapacityError where no instance took it."""
        journey = request.journey
        tried: list[Instance] = []
        while True:
            model = self._table.model(alias)
            instance, reason = model.choose(tried)
            journey.chose(instance, reason, model.instances)
            with instance.lease() as lease:
                try:
                    upstream = await self._open(instance, request, route)
                except (EngineError, Draining) as error:
                    # Nothing was said yet, so nothing can have run.
                    lease.worked = False if isinstance(error, EngineError) else None
                    if isinstance(error, EngineError) and error.may_have_run:
                        raise
                    journey.not_taken(error.code)
                else:
                    lease.answered()
                    lease.worked = True
                    journey.sent()
                    try:
                        yield upstream
                    finally:
                        upstream.close()
                        journey.passed(upstream)
                    return
            tried.append(instance)

    async def _open(self, instance: Instance, request: Request, route: Route) -> UpstreamSocket:
        return await open_websocket(
            instance.pool.endpoint,
            b"%b%b%b" % (instance.prefix, route.path, request.query),
            request.headers,
            fixed=instance.fixed,
            instance=instance.name,
            timeout_s=self._connect_timeout_s,
        )


class _Handshake:
    """The client's side until it can be connected through. `received` is all that it sent after the handshake."""

    def __init__(self, request: Request) -> None:
        """Raises UpgradeRequired or InvalidRequest."""
        if not request.upgrade or request.http10:
            raise UpgradeRequired("This is a WebSocket: connect to it with `Upgrade: websocket`.")
        accepting = ServerProtocol(select_subprotocol=_select_subprotocol)
        headers = Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers])
        answer = accepting.accept(HandshakeRequest(request.path.decode("latin-1"), headers))
        if accepting.handshake_exc is not None:
            raise InvalidRequest(f"The WebSocket's handshake is wrong: {accepting.handshake_exc}.", code="invalid_http")
        self.answer = b"%b%b\r\n" % (answer.serialize()[:-2], request.added)
        self._protocol = ServerProtocol(state=State.OPEN, max_size=FIRST_EVENTS_BYTES_MAX)
        self.received = b""
        self._message = b""

    async def first_events(self, client: ClientConnection) -> str | None:
        """Say hello, and read until an event names the model; None when the client left. Raises InvalidRequest."""
        session = {"type": "session.created", "id": f"sess-{uuid.uuid4().hex}", "created": int(time.time())}
        self._protocol.send_text(msgspec.json.encode(session))
        while True:
            for data in self._protocol.data_to_send():
                client.write(data)
            data = await client.received()
            self.received += data
            if len(self.received) > FIRST_EVENTS_BYTES_MAX:
                raise InvalidRequest("No event named a model in the first MiB.", param="model")
            self._protocol.receive_data(data)
            for event in self._protocol.events_received():
                if isinstance(event, Frame) and (alias := self._model(event)):
                    return alias
            if self._protocol.state is not State.OPEN:
                self._finish(client)
                return None

    def _model(self, frame: Frame) -> str | None:
        """The model that the message names which ends with this frame. Raises InvalidRequest."""
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return None
        self._message += bytes(frame.data)
        if not frame.fin:
            return None
        message, self._message = self._message, b""
        try:
            event = _EVENT.decode(message)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"This event makes no sense: {error}.", code="invalid_json") from error
        if event.type == "session.update" and not event.model:
            raise InvalidRequest(
                "`model` is missing in session.update: name one of those that GET /v1/models lists.", param="model"
            )
        return event.model

    def fail(self, client: ClientConnection, error: PoolError) -> None:
        """Say why in an event, as vLLM does, and close."""
        if self._protocol.state is State.OPEN:
            event = {"type": "error", "error": error.message, "code": error.code}
            self._protocol.send_text(msgspec.json.encode(event))
            self._protocol.send_close(_close_code(error), error.code)
        self._finish(client)

    def _finish(self, client: ClientConnection) -> None:
        for data in self._protocol.data_to_send():
            client.write(data)


def _select_subprotocol(_: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Browsers want one of those that they offer, and offer their key among them."""
    return _SUBPROTOCOL if _SUBPROTOCOL in offered else None


def _model_in(query: bytes) -> str:
    return parse_qs(query[1:].decode("latin-1")).get("model", [""])[-1]


def _close_code(error: PoolError) -> CloseCode:
    if isinstance(error, CallerError):
        return CloseCode.POLICY_VIOLATION
    return CloseCode.TRY_AGAIN_LATER if isinstance(error, CapacityError) else CloseCode.INTERNAL_ERROR


async def _pass(client: ClientConnection, upstream: UpstreamSocket, *, drop_first: bytes = b"") -> None:
    """Bytes both ways until the upstream ends. A client that leaves cancels this."""
    client.attach(upstream)
    try:
        upstream.join(client, drop_first=drop_first)
        client.tunnel(upstream.write)
        await upstream.ended()
    finally:
        client.detach()
