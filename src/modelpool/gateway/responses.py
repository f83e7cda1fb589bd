"""Responses that an instance keeps: `/v1/responses/{id}`, its cancel, and `previous_response_id`.

They go to the instance that made the response. Which one that is, this process remembers; for an id that it did not see
made (by another gateway, or before it was started again) the instances are asked, which needs no memory that gateways
share and is right on any number of machines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Annotated
from urllib.parse import quote

import msgspec

from modelpool.errors import EngineError, InvalidRequest, ModelNotReady, ResponseNotFound
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.inference import Inference
from modelpool.gateway.instances import Instance
from modelpool.gateway.request import Request
from modelpool.gateway.routes import RESPONSE_ID, Kind, Route
from modelpool.gateway.stored import StoredResponses
from modelpool.gateway.table import Table
from modelpool.messages.models import alias_of
from modelpool.relay import encode_request, fetch

ASK_S = 3.0
ASKED_AT_ONCE = 16
RETRY_S = 1.0


class _Asked(msgspec.Struct, frozen=True):
    model: str = ""
    previous_response_id: Annotated[str, msgspec.Meta(pattern=rf"^{RESPONSE_ID.decode()}\Z")] | None = None
    store: bool | None = None


_DECODER = msgspec.json.Decoder(_Asked)


class Responses:
    """Serves `/v1/responses` and what is below it."""

    def __init__(self, table: Table, inference: Inference, stored: StoredResponses) -> None:
        self._table = table
        self._inference = inference
        self._stored = stored

    async def serve(self, request: Request, route: Route, client: ClientConnection) -> None:
        """Raises PoolError before the first byte of an answer."""
        if route.kind is Kind.RESPONSE:
            response_id = route.path.split(b"/")[3].decode()
            instances = self._table.instances(request.caller.models if request.caller else ())
            holder = await self._holder(response_id, instances, "response_id")
            async with self._inference.beside(alias_of(holder.name), request, route, client):
                await self._inference.serve_at(holder, request, route, client)
        else:
            await self._create(request, route, client)

    async def _create(self, request: Request, route: Route, client: ClientConnection) -> None:
        asked = _asked(request.body)
        if asked.store is False:
            route = route._replace(kind=Kind.INFERENCE)  # it leaves nothing that could be asked for
        if asked.previous_response_id is None:
            await self._inference.serve(request, route, client)
            return
        if request.caller is not None:
            request.caller.check(asked.model)
        async with self._inference.beside(asked.model, request, route, client):
            instances = self._table.model(asked.model).awake()
            holder = await self._holder(asked.previous_response_id, instances, "previous_response_id")
            await self._inference.serve_at(holder, request, route, client)

    async def _holder(self, response_id: str, instances: Collection[Instance], param: str) -> Instance:
        """The one of these that made a response. Raises ResponseNotFound, or ModelNotReady if one did not say."""
        shown = response_id if len(response_id) <= 100 else response_id[:99] + "…"
        if route := self._stored.route(response_id):
            place = route.place
            for instance in instances:
                if instance.place == place:
                    return instance
            raise ResponseNotFound(
                f"The response `{shown}` was made by the instance {route.instance}, which is gone, or does not serve "
                "this model.",
                param=param,
            )
        holder, silent = await _ask_all(response_id, instances)
        if holder is not None:
            self._stored.keep(response_id, holder.route)
            return holder
        if silent:
            raise ModelNotReady(
                f"The instance {silent[0].name} does not say whether it has the response `{shown}`.",
                retry_after=RETRY_S,
            )
        raise ResponseNotFound(
            f"No instance has the response `{shown}`: it was not stored, or the one that made it is gone.", param=param
        )


def _asked(body: bytes) -> _Asked:
    try:
        return _DECODER.decode(body)
    except msgspec.ValidationError as error:
        for name in ("previous_response_id", "store"):
            if f"$.{name}" in str(error):
                raise InvalidRequest(f"`{name}` cannot be this: {error}.", param=name) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return _Asked()  # what is wrong with `model`, or with all of it, is said where models are looked for


async def _ask_all(response_id: str, instances: Collection[Instance]) -> tuple[Instance | None, list[Instance]]:
    """The first one that has it; and those that did not say."""
    turns = asyncio.Semaphore(ASKED_AT_ONCE)
    silent: list[Instance] = []

    async def ask(instance: Instance) -> Instance | None:
        async with turns:
            has = await _ask(response_id, instance)
        if has is None:
            silent.append(instance)
        return instance if has else None

    asking = [asyncio.ensure_future(ask(instance)) for instance in instances]
    try:
        for answer in asyncio.as_completed(asking):
            if holder := await answer:
                return holder, silent
        return None, silent
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def _ask(response_id: str, instance: Instance) -> bool | None:
    """Whether it has the response; None if it does not say."""
    target = b"%b/v1/responses/%b" % (instance.prefix, quote(response_id, safe="").encode())
    request = encode_request(b"GET", target, (), fixed=instance.fixed)
    try:
        async with asyncio.timeout(ASK_S), fetch(instance.pool, request) as response:
            if response.status == 200:
                return True
            await response.read()  # so that the connection can be used again
            return False if response.status < 500 or response.status == 501 else None
    except (EngineError, TimeoutError):
        return None
