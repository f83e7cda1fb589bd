"""Tells the manager what this gateway has waiting and in flight, so that it brings up what is wanted."""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress

import msgspec

from modelpool.errors import PoolError
from modelpool.gateway.hold import Room
from modelpool.gateway.instances import Instance
from modelpool.gateway.limiter import Limiter
from modelpool.gateway.table import Table
from modelpool.messages.demand import INTERVAL_S, DemandReport, ModelDemand
from modelpool.relay import Pool, encode_request, fetch, fixed_headers

log = logging.getLogger(__name__)

_DEADLINE_S = 5.0
_JSON = [(b"content-type", b"application/json")]


class DemandReporter:
    """Reports at once when the first request waits for a model, else every second while there is anything to say."""

    def __init__(self, table: Table, room: Room, control: Pool, limiter: Limiter, *, node: str) -> None:
        self.gateway = f"{node}.{secrets.token_hex(8)}"
        """This process's name in its reports."""
        self._limiter = limiter
        limiter.when_short(room.wanted.set)
        self._told_heard = 0
        self._table = table
        self._room = room
        self._control = control
        self._told: dict[Instance, int] = {}
        self._silent = True

    async def keep_reporting(self) -> None:
        """Until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await self._room.wanted.wait()
            self._room.wanted.clear()
            try:
                async with asyncio.timeout(_DEADLINE_S):
                    await self._report()
            except (PoolError, TimeoutError) as error:
                log.debug("the manager was not told of the demand: %s", error)

    async def _report(self) -> None:
        counts = {each: each.requests for model in self._table.models() for each in model.instances}
        models = {model.entry.alias: said for model in self._table.models() if (said := self._demand(model.instances))}
        for alias in self._room.waiting_aliases():
            said, waiting = models.get(alias, ModelDemand()), self._room.waiting_for(alias)
            model = self._table.find(alias)
            if model is not None and model.instances:
                models[alias] = msgspec.structs.replace(said, queued=waiting)
            else:
                models[alias] = msgspec.structs.replace(said, waiting=waiting)
        keys, heard = self._limiter.demand(), self._limiter.heard
        if not models and not keys and self._silent and heard == self._told_heard:
            return
        body = msgspec.json.encode(DemandReport(gateway=self.gateway, models=models, keys=keys, heard=heard))
        fixed = fixed_headers(self._control.endpoint)
        request = encode_request(b"POST", b"/demand", _JSON, fixed=fixed, body=body)
        async with fetch(self._control, request) as response:
            await response.read()
        if response.status != 200:
            log.warning("the manager does not take the demand: status %s", response.status)
            return
        self._told = counts
        self._told_heard = heard
        self._silent = not models

    def _demand(self, instances: tuple[Instance, ...]) -> ModelDemand | None:
        requests = sum(each.requests - self._told.get(each, 0) for each in instances)
        inflight = {each.name: each.own for each in instances if each.own}
        return ModelDemand(inflight=inflight, requests=requests) if inflight or requests else None
