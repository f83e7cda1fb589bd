"""What the gateway answers: by route, to the engines, to the manager, or itself."""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qs, unquote_to_bytes

import msgspec

from modelpool import __version__
from modelpool.errors import InvalidBody, PoolError
from modelpool.gateway.auth import Access
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.control import Control
from modelpool.gateway.cors import Cors, is_preflight
from modelpool.gateway.inference import Inference
from modelpool.gateway.keys import Caller
from modelpool.gateway.observe.observers import Observers
from modelpool.gateway.realtime import Realtime
from modelpool.gateway.request import Request
from modelpool.gateway.responses import Responses
from modelpool.gateway.routes import PREFLIGHT, Kind, Route, Scope, is_websocket, match
from modelpool.gateway.snapshots import SnapshotFeed
from modelpool.gateway.table import Table
from modelpool.messages.routing import ModelEntry


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of `GET /v1/models`, as OpenAI and vLLM have it."""

    id: str
    created: int
    root: str
    object: str = "model"
    owned_by: str = "modelpool"
    parent: str | None = None
    max_model_len: int | None = None


class GatewayApp:
    """Every request of a listener ends up here."""

    def __init__(
        self,
        access: Access,
        table: Table,
        feed: SnapshotFeed,
        inference: Inference,
        responses: Responses,
        realtime: Realtime,
        control: Control,
        observers: Observers,
        *,
        cors: Cors = Cors(),
        root_path: str = "",
    ) -> None:
        self._access = access
        self._table = table
        self._feed = feed
        self._inference = inference
        self._responses = responses
        self._realtime = realtime
        self._control = control
        self._observers = observers
        self._cors = cors if cors.active else None
        self._root = root_path.encode()

    def admit(self, request: Request) -> None:
        self._observers.ids.give(request)
        if self._root:
            request.path = self._below_root(request.path)
        if self._cors is not None:
            request.added += self._cors.lines(request)
            if is_preflight(request):
                request.route = PREFLIGHT
                return
        request.route = route = match(request.method, request.path)
        open_ = route.kind is Kind.METRICS and self._observers.metrics_open
        self._access.check(request, Scope.OPEN if open_ else route.scope)

    def refused(self, request: Request | None, error: PoolError) -> bytes:
        return self._observers.refused(request, error)

    def upgrades(self, method: bytes, target: bytes) -> bool:
        return is_websocket(method, self._below_root(target.partition(b"?")[0]))

    async def serve(self, request: Request, client: ClientConnection) -> None:
        route = request.route
        assert route is not None
        if route.kind is Kind.INFERENCE or route.kind is Kind.FORM:
            await self._infer(self._inference, request, route, client)
        elif route.kind is Kind.RESPONSES or route.kind is Kind.RESPONSE:
            await self._infer(self._responses, request, route, client)
        elif route.kind is Kind.REALTIME:
            await self._infer(self._realtime, request, route, client)
        elif route.kind is Kind.CONTROL:
            await self._control.serve(request, route, client)
        elif route.kind is Kind.MODELS:
            _answer(client, {"object": "list", "data": self._cards(request.caller)})
        elif route.kind is Kind.MODEL:
            alias = _text(route.path)
            if request.caller is not None:
                request.caller.check(alias)
            _answer(client, _card(self._table.model(alias).entry))
        elif route.kind is Kind.HEALTH:
            _answer(client, self._health())
        elif route.kind is Kind.METRICS:
            accept = request.by_name.get(b"accept", b"").decode("latin-1")
            content_type, text = await self._observers.expose(accept)
            client.answer(200, text, content_type=content_type)
        elif route.kind is Kind.EXPLAIN:
            _answer(client, self._observers.explain(unquote_to_bytes(route.path)))
        elif route.kind is Kind.FINISHED:
            _answer(client, await self._observers.finished(_ended_after(request.query)))
        elif route.kind is Kind.PREFLIGHT:
            assert self._cors is not None
            client.answer(200, b"", self._cors.preflight(request), content_type="text/plain")
        else:
            _answer(client, {"name": "Model Pool", "version": __version__, "models": "/v1/models", "health": "/health"})

    def _below_root(self, path: bytes) -> bytes:
        """Also without the prefix, which a proxy in front may have taken off, and probes do not know."""
        root = self._root
        return path[len(root) :] or b"/" if root and (path == root or path.startswith(root + b"/")) else path

    def _cards(self, caller: Caller | None) -> list[ModelCard]:
        """Those that the caller may use."""
        return [_card(entry) for entry in self._table.entries() if caller is None or caller.may_use(entry.alias)]

    async def _infer(
        self, service: Inference | Responses | Realtime, request: Request, route: Route, client: ClientConnection
    ) -> None:
        """The journey ends once, whichever way this is left."""
        request.journey = journey = self._observers.begin(request)
        try:
            await service.serve(request, route, client)
        except BaseException as error:
            journey.failed(error, answered=client.answered)
            raise
        finally:
            journey.ended()

    def _health(self) -> dict[str, object]:
        """Always ok: that the gateway answers. How far it can be trusted is in the age of what it routes by."""
        heard = self._feed.heard_at
        age = None if heard is None else round(asyncio.get_running_loop().time() - heard, 3)
        return {
            "status": "ok",
            "version": __version__,
            "snapshot": {
                "epoch": self._table.epoch or None,
                "sequence": self._table.sequence,
                "age_s": age,
                "connected": self._feed.connected,
            },
        }


def _answer(client: ClientConnection, value: object) -> None:
    client.answer(200, msgspec.json.encode(value))


def _ended_after(query: bytes) -> float:
    """Raises InvalidBody."""
    values = parse_qs(query[1:].decode("latin-1")).get("ended_after", ["0"])
    try:
        return float(values[-1])
    except ValueError:
        raise InvalidBody(
            f"`ended_after`: must be a number of seconds, got {values[-1][:80]!r}.", param="ended_after"
        ) from None


def _text(path: bytes) -> str:
    return unquote_to_bytes(path).decode("utf-8", "replace")


def _card(entry: ModelEntry) -> ModelCard:
    return ModelCard(id=entry.alias, created=entry.created, root=entry.alias, max_model_len=entry.max_model_len)
