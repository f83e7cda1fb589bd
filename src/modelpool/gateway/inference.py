"""Requests for a model: choose an instance, pass bytes, and go elsewhere when that one cannot have begun."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from modelpool.core.routing.choice import Reason
from modelpool.errors import (
    CapacityError,
    Draining,
    EngineError,
    InstanceNotFound,
    UpstreamFailed,
    UpstreamTimeout,
)
from modelpool.gateway.body import model_of, model_of_form
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.hold import Room
from modelpool.gateway.instances import Instance, Lease
from modelpool.gateway.limiter import Limiter
from modelpool.gateway.passing import PassThrough
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Kind, Route
from modelpool.gateway.stay import Stay, placed_beside
from modelpool.gateway.stored import LearningPassThrough, StoredResponses
from modelpool.gateway.table import Table
from modelpool.relay import Deadlines, ResponseHead, Sink, encode_request

log = logging.getLogger(__name__)


# What an instance, or the worker in front of it, says when it did not begin: another one may.
_NOT_BEGUN = frozenset({Draining.code, InstanceNotFound.code, "instance_not_ready"})
_MAY_SAY_SO = frozenset({InstanceNotFound.status, Draining.status})

# Looked up at each request: through the enumeration that takes 0.1 µs.
_FORM, _RESPONSES = Kind.FORM, Kind.RESPONSES


class _Error(msgspec.Struct, frozen=True):
    code: str | int | None = None


class _Envelope(msgspec.Struct, frozen=True):
    error: _Error = _Error()


class Inference:
    """Serves the inference routes by the routing table."""

    def __init__(
        self,
        table: Table,
        room: Room,
        stored: StoredResponses,
        limiter: Limiter,
        deadlines: Deadlines = Deadlines(),
    ) -> None:
        self._table = table
        self._room = room
        self._stored = stored
        self._limiter = limiter
        self._deadlines = deadlines

    async def serve(self, request: Request, route: Route, client: ClientConnection) -> None:
        """Raises PoolError before the first byte of an answer."""
        alias = _model_of_form(request) if route.kind is _FORM else model_of(request.body)
        if request.caller is not None:
            request.caller.check(alias)
        request.journey.asked(alias)
        with self._limiter.admitted(request, route):
            await self._serve_in_turn(alias, request, route, client)

    async def _serve_in_turn(self, alias: str, request: Request, route: Route, client: ClientConnection) -> None:
        room, stay = self._room, None
        while True:
            if not room.enter(alias, request):
                stay = stay or Stay(room, alias, request, client)
                await stay.granted()
            with room.held:
                try:
                    await self._serve_by_any(alias, request, route, client)
                    return
                except CapacityError as error:
                    stay = stay or Stay(room, alias, request, client)
                    await stay.nobody_took_it(error)

    async def _serve_by_any(self, alias: str, request: Request, route: Route, client: ClientConnection) -> None:
        """Raises CapacityError where no instance took it."""
        journey = request.journey
        tried: list[Instance] = []
        while True:
            model = self._table.model(alias)
            instance, reason = model.choose(tried)
            journey.chose(instance, reason, model.instances)
            with instance.lease() as lease:
                try:
                    lease.worked = await self._send(request, route, lease, client) < 500
                    return
                except (EngineError, Draining) as error:
                    lease.worked = False if isinstance(error, EngineError) else None
                    if client.answered or (isinstance(error, EngineError) and error.may_have_run):
                        raise
                    journey.not_taken(error.code)
                    log.info("%s did not take a request (%s), trying another instance", instance.name, error)
            tried.append(instance)

    @asynccontextmanager
    async def beside(self, alias: str, request: Request, route: Route, client: ClientConnection) -> AsyncIterator[None]:
        """Let in, for what goes to one instance and no other: the model has instances then. Raises PoolError."""
        request.journey.asked(alias)
        with self._limiter.admitted(request, route):
            async with placed_beside(self._room, alias, request, client):
                yield

    async def serve_at(self, instance: Instance, request: Request, route: Route, client: ClientConnection) -> None:
        """To this instance and no other, by one that is `beside`."""
        request.journey.chose(instance, Reason.STORED, (instance,))
        with instance.lease() as lease:
            try:
                lease.worked = await self._send(request, route, lease, client) < 500
            except EngineError:
                lease.worked = False
                raise

    async def _send(self, request: Request, route: Route, lease: Lease, client: ClientConnection) -> int:
        """To this instance; once more on a new connection if the pooled one turns out to have been closed.

        The answer's status.
        """
        instance = lease.instance
        upstream = encode_request(
            request.method,
            b"%b%b%b" % (instance.prefix, route.path, request.query),
            request.headers,
            fixed=instance.fixed,
            body=request.body,
        )
        if status := await self._attempt(lease, upstream, request, route, client, fresh=False):
            return status
        request.journey.sent_again("stale_connection")
        try:
            return await self._attempt(lease, upstream, request, route, client, fresh=True)
        except EngineError as error:
            if isinstance(error, UpstreamTimeout) and error.may_have_run:
                raise
            # A host that closed an idle connection takes new ones. Nobody there means that it died, perhaps of this
            # very request: sent on, it would be the death of one replica after the other.
            raise UpstreamFailed(f"The instance {instance.name} died before it answered.") from error

    async def _attempt(
        self,
        lease: Lease,
        upstream: bytes,
        request: Request,
        route: Route,
        client: ClientConnection,
        *,
        fresh: bool,
    ) -> int:
        """The answer's status; 0 if the connection was stale. Raises Draining, UpstreamFailed or UpstreamTimeout."""
        instance = lease.instance
        if route.kind is _RESPONSES:
            sink: PassThrough = LearningPassThrough(
                request, client, hold=_MAY_SAY_SO, route=instance.route, stored=self._stored
            )
        else:
            sink = PassThrough(request, client, hold=_MAY_SAY_SO)
        watched = sink if request.meter is None else request.meter.watching(sink)
        if not instance.breaker.closed:
            watched = _Witness(watched, lease)
        exchange = await instance.pool.send(upstream, watched, fresh=fresh)
        request.journey.sent()
        exchange.deadlines = self._deadlines
        client.attach(exchange)
        try:
            await exchange.ended()
        except EngineError as error:
            if not error.may_have_run and not fresh:
                return 0
            sink.break_off(exchange, error)
            request.journey.failed(error, answered=True)
            return error.status
        finally:
            request.journey.passed(sink)
            client.detach()
        if (held := sink.held_body) is not None:
            if _says_not_begun(held):
                raise Draining(f"The instance {instance.name} takes no new requests.")
            sink.release()
        sink.finish()
        assert exchange.head is not None
        return exchange.head.status


class _Witness:
    """A Sink that says so when an instance that failed begins to answer. Its head alone says nothing of the engine:
    vLLM sends that of a stream before there is a token.
    """

    __slots__ = ("_lease", "_sink", "_waits")

    def __init__(self, sink: Sink, lease: Lease) -> None:
        self._sink = sink
        self._lease = lease
        self._waits = False

    def head(self, head: ResponseHead, rest: bytes) -> None:
        self._waits = head.status < 500 and head.status not in _MAY_SAY_SO
        if rest:
            self._see()
        self._sink.head(head, rest)

    def data(self, data: bytes) -> None:
        self._see()
        self._sink.data(data)

    def _see(self) -> None:
        if self._waits:
            self._waits = False
            self._lease.answered()


def _model_of_form(request: Request) -> str:
    return model_of_form(request.by_name.get(b"content-type", b""), request.body)


def _says_not_begun(body: bytes) -> bool:
    try:
        return msgspec.json.decode(body, type=_Envelope).error.code in _NOT_BEGUN
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
