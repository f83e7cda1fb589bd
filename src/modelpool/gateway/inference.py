"""Requests for a model: choose an instance, pass bytes, and go elsewhere when that one cannot have begun."""

from __future__ import annotations

import logging

import msgspec

from modelpool.errors import Draining, EngineError, InstanceNotFound, UpstreamFailed
from modelpool.gateway.body import model_of, model_of_form
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.instances import Instance
from modelpool.gateway.passing import PassThrough
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Kind, Route
from modelpool.gateway.table import Table
from modelpool.relay import encode_request

log = logging.getLogger(__name__)


# What an instance, or the worker in front of it, says when it did not begin: another one may.
_NOT_BEGUN = frozenset({Draining.code, InstanceNotFound.code, "instance_not_ready"})
_MAY_SAY_SO = frozenset({InstanceNotFound.status, Draining.status})


class _Error(msgspec.Struct, frozen=True):
    code: str | int | None = None


class _Envelope(msgspec.Struct, frozen=True):
    error: _Error = _Error()


class Inference:
    """Serves the inference routes by the routing table."""

    def __init__(self, table: Table) -> None:
        self._table = table

    async def serve(self, request: Request, route: Route, client: ClientConnection) -> None:
        """Raises PoolError before the first byte of an answer."""
        alias = model_of(request.body) if route.kind is Kind.INFERENCE else _model_of_form(request)
        tried: list[Instance] = []
        while True:
            instance, _ = self._table.model(alias).choose(tried)
            with instance.lease():
                try:
                    await self._send(request, route, instance, client)
                    return
                except (EngineError, Draining) as error:
                    if client.answered or (isinstance(error, EngineError) and error.may_have_run):
                        raise
                    log.info("%s did not take a request (%s), trying another instance", instance.name, error)
            tried.append(instance)

    async def _send(self, request: Request, route: Route, instance: Instance, client: ClientConnection) -> None:
        """To this instance; once more on a new connection if the pooled one turns out to have been closed."""
        upstream = encode_request(
            request.method,
            b"%b%b%b" % (instance.prefix, route.path, request.query),
            request.headers,
            fixed=instance.fixed,
            body=request.body,
        )
        if await _attempt(instance, upstream, request, client, fresh=False):
            return
        try:
            await _attempt(instance, upstream, request, client, fresh=True)
        except EngineError as error:
            # A host that closed an idle connection takes new ones. Nobody there means that it died, perhaps of this
            # very request: sent on, it would be the death of one replica after the other.
            raise UpstreamFailed(f"The instance {instance.name} died before it answered.") from error


def _model_of_form(request: Request) -> str:
    return model_of_form(request.by_name.get(b"content-type", b""), request.body)


async def _attempt(
    instance: Instance, upstream: bytes, request: Request, client: ClientConnection, *, fresh: bool
) -> bool:
    """False if the connection was stale. Raises Draining, UpstreamFailed or UpstreamTimeout."""
    sink = PassThrough(request, client, hold=_MAY_SAY_SO)
    exchange = await instance.pool.send(upstream, sink, fresh=fresh)
    client.attach(exchange)
    try:
        await exchange.ended()
    except EngineError as error:
        if not error.may_have_run and not fresh:
            return False
        sink.break_off(exchange, error)
    finally:
        client.detach()
    if (held := sink.held_body) is not None:
        if _says_not_begun(held):
            raise Draining(f"The instance {instance.name} takes no new requests.")
        sink.release()
    return True


def _says_not_begun(body: bytes) -> bool:
    try:
        return msgspec.json.decode(body, type=_Envelope).error.code in _NOT_BEGUN
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
