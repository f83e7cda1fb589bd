"""Requests for the manager, passed on to the control socket."""

from __future__ import annotations

from modelpool.errors import EngineError, ManagerAway
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.passing import PassThrough
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Route
from modelpool.relay import Pool, encode_request, fixed_headers

RETRY_S = 1.0


class Control:
    """Serves the control routes. Who may was decided before."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._fixed = fixed_headers(pool.endpoint)

    async def serve(self, request: Request, route: Route, client: ClientConnection) -> None:
        """Raises ManagerAway before the first byte of an answer."""
        upstream = encode_request(
            request.method, route.path + request.query, request.headers, fixed=self._fixed, body=request.body
        )
        try:
            if not await self._attempt(upstream, request, client, fresh=False):
                await self._attempt(upstream, request, client, fresh=True)
        except EngineError as error:
            if client.answered:
                raise
            carried_out = " It may have been carried out all the same." if error.may_have_run else ""
            raise ManagerAway(
                f"The manager is away, and comes back by itself.{carried_out}", retry_after=RETRY_S
            ) from error

    async def _attempt(self, upstream: bytes, request: Request, client: ClientConnection, *, fresh: bool) -> bool:
        """False if the connection was stale."""
        sink = PassThrough(request, client)
        exchange = await self._pool.send(upstream, sink, head_only=request.head_only, fresh=fresh)
        client.attach(exchange)
        try:
            await exchange.ended()
        except EngineError as error:
            if error.may_have_run or fresh:
                raise
            return False
        finally:
            client.detach()
        return True
