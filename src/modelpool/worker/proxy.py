"""`/proxy/{instance}/{path}`: inference requests and WebSockets to an engine host that callers cannot reach themselves.

A plain ASGI application: a response's pieces go on as they come, and a caller that leaves closes the connection to the
host at once, which is what makes the engine abort. The caller was checked before; the host gets the cluster token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote

from starlette.types import Receive, Scope, Send

from modelpool.control_http import error_response
from modelpool.errors import BodyTooLarge, InstanceNotFound, MethodNotAllowed, PoolError, RouteNotFound
from modelpool.relay import Endpoint, Pools, encode_request, fetch, fixed_headers
from modelpool.relay.inference import WEBSOCKET_PATHS, inference_methods
from modelpool.worker.supervisor import Supervisor
from modelpool.worker.waiting import cancelled, first_of
from modelpool.worker.websocket import pass_websocket

log = logging.getLogger(__name__)

_CONNECT_S = 5.0
_MOUNT = "/proxy"


class ClientGone(Exception):
    """There is nobody to answer any more."""


class Proxy:
    """Use `running_proxy`."""

    def __init__(self, supervisor: Supervisor, pools: Pools, *, token: str, max_body_bytes: int) -> None:
        self._supervisor = supervisor
        self._pools = pools
        self._token = token
        self._max_body_bytes = max_body_bytes
        self._endpoints: frozenset[Endpoint] = frozenset()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._pass_websocket(scope, receive, send)
            return
        answer = _Answer(send)
        try:
            await self._pass(scope, receive, answer)
        except ClientGone:
            return
        except PoolError as error:
            if answer.begun:
                # Left incomplete, the connection is closed, which is how the caller sees that something is missing.
                log.warning("%s: %s", scope["path"], error)
            else:
                await error_response(error)(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        raw_path = scope["raw_path"].decode("latin-1")
        instance, path = self._split(raw_path.partition(f"{_MOUNT}/")[2])
        _check_route(scope["method"], unquote(path))
        address = self._supervisor.upstream(instance)
        body = await self._body(receive)
        endpoint = Endpoint(address.host, address.port)
        if endpoint not in self._endpoints:
            self._forget_old()
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        method = scope["method"].encode()
        fixed = fixed_headers(endpoint, self._token)
        request = encode_request(method, path.encode() + query, scope["headers"], fixed=fixed, body=body)
        exchange = asyncio.create_task(self._exchange(endpoint, request, method == b"HEAD", answer), name="proxy")
        leaving = asyncio.create_task(_disconnected(receive), name="proxy client")
        try:
            await first_of(exchange, leaving)
            if not exchange.done():
                raise ClientGone
            exchange.result()
        finally:
            await cancelled(exchange, leaving)

    async def _pass_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            instance, path = self._split(scope["raw_path"].decode("latin-1").partition(f"{_MOUNT}/")[2])
            if unquote(path) not in WEBSOCKET_PATHS:
                raise RouteNotFound(f"{unquote(path)} is not a WebSocket for inference.")
            address = self._supervisor.upstream(instance)
            query = "?" + scope["query_string"].decode("latin-1") if scope["query_string"] else ""
            endpoint = Endpoint(address.host, address.port)
            await pass_websocket(scope, receive, send, endpoint, path + query, token=self._token)
        except PoolError as error:
            await error_response(error)(scope, receive, send)

    def _forget_old(self) -> None:
        """A host that is new to us: a good moment to let go of those that are no more."""
        self._endpoints = frozenset(Endpoint(each.host, each.port) for each in self._supervisor.upstreams())
        self._pools.keep_only(self._endpoints)

    def _split(self, rest: str) -> tuple[str, str]:
        """Instance and path. Names may contain `/`: the longest name of an instance wins. Raises InstanceNotFound."""
        parts = rest.split("/")
        for end in range(len(parts) - 1, 0, -1):
            name = unquote("/".join(parts[:end]))
            if self._supervisor.has(name):
                return name, "/" + "/".join(parts[end:])
        name = unquote(rest.partition("/v1/")[0])
        raise InstanceNotFound(f"There is no instance `{name}` on this worker.", param="instance")

    async def _body(self, receive: Receive) -> bytes:
        """Raises BodyTooLarge, ClientGone."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise BodyTooLarge(f"The body is larger than {self._max_body_bytes} bytes.")
            if not message.get("more_body", False):
                return bytes(body)

    async def _exchange(self, endpoint: Endpoint, request: bytes, head_only: bool, answer: _Answer) -> None:
        async with fetch(self._pools.pool(endpoint), request, head_only=head_only) as response:
            await answer.begin(response.status, response.headers)
            async for piece in response:
                await answer.add(piece)
            await answer.end()


class _Answer:
    """The answer to the caller; `begun` once it cannot be replaced by an error any more."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def add(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _check_route(method: str, path: str) -> None:
    """Raises RouteNotFound, MethodNotAllowed."""
    allowed = inference_methods(path)
    if not allowed:
        raise RouteNotFound(f"{path} is not a route for inference.")
    if method not in allowed:
        raise MethodNotAllowed(method, path, sorted(allowed))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def running_proxy(supervisor: Supervisor, *, token: str, max_body_bytes: int) -> AsyncIterator[Proxy]:
    """The proxy of all instances; its connections to hosts are closed on the way out."""
    pools = Pools(connect_timeout_s=_CONNECT_S)
    try:
        yield Proxy(supervisor, pools, token=token, max_body_bytes=max_body_bytes)
    finally:
        pools.close()
