"""The control API: one FastAPI app over a ManagerPort, served on the control socket and, where asked for, on TCP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelpool.control_http import answer, body_schema, error_response, render_errors
from modelpool.errors import BodyTooLarge, ManagerAway
from modelpool.manager.openapi import change_schema, document
from modelpool.manager.port import ManagerPort
from modelpool.messages.admin import Registered
from modelpool.messages.demand import DemandReport
from modelpool.messages.dump import Dump
from modelpool.messages.keys import KeySpec
from modelpool.messages.models import ModelSpec, decode_body
from modelpool.messages.workers import Heartbeat, RegisterWorker

MAX_SPEC_BYTES = 256 << 10
"""It travels with every order and every heartbeat."""


class _ToldAtTheEnd:
    """ASGI middleware: a request that is cut off because this process ends is answered so, not with a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = False

        async def passing(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, receive, passing)
        except asyncio.CancelledError:
            if answered:
                raise
            error = ManagerAway("The manager is ending. It may have been carried out all the same.", retry_after=1.0)
            await error_response(error)(scope, receive, send)


def control_app(manager: ManagerPort) -> FastAPI:
    """Every route of the control plane. Who may call is decided by whoever serves it."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_middleware(_ToldAtTheEnd)
    render_errors(app)
    _add_model_routes(app, manager)
    _add_worker_routes(app, manager)
    _add_key_routes(app, manager)

    @app.get("/health")
    async def health() -> Response:
        return answer({"status": "ok"})

    @app.get("/admin/status")
    async def status() -> Response:
        return answer(await manager.status())

    @app.get("/admin/dump")
    async def dump() -> Response:
        return answer(await manager.dump())

    @app.post("/admin/load", openapi_extra=body_schema(Dump))
    async def load(request: Request, restore: bool = False) -> Response:
        return answer(await manager.load(decode_body(await request.body(), Dump), restore=restore))

    @app.post("/demand", include_in_schema=False)
    async def demand(request: Request) -> Response:
        await manager.demand(decode_body(await request.body(), DemandReport))
        return answer({"status": "ok"})

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return answer(document(app))

    @app.get("/snapshots", include_in_schema=False)
    async def snapshots(gateway: str = "", epoch: str = "") -> Response:
        async def lines() -> AsyncIterator[bytes]:
            async for update in manager.snapshots(gateway, epoch):
                yield b"\n" if update is None else msgspec.json.encode(update) + b"\n"

        return StreamingResponse(await _begun(lines()), media_type="application/x-ndjson")

    return app


def _add_model_routes(app: FastAPI, manager: ManagerPort) -> None:
    @app.post("/admin/models/register", openapi_extra=body_schema(ModelSpec))
    async def register(request: Request, replace: bool = False) -> Response:
        body = await request.body()
        if len(body) > MAX_SPEC_BYTES:
            raise BodyTooLarge(f"A model's body may have {MAX_SPEC_BYTES} bytes, this one has {len(body)}.")
        spec = decode_body(body, ModelSpec)
        return answer(Registered(status="success", routing=await manager.register_model(spec, replace)))

    @app.get("/admin/models")
    async def models() -> Response:
        return answer({"models": await manager.models()})

    @app.get("/admin/models/{alias:path}/logs")
    async def logs(alias: str, tail: Annotated[int, Query(ge=0, le=1_000_000)] = 200, follow: bool = False) -> Response:
        chunks = manager.logs(alias, tail=tail, follow=follow)
        return StreamingResponse(await _begun(chunks), media_type="text/plain; charset=utf-8")

    @app.get("/admin/models/{alias:path}")
    async def model(alias: str) -> Response:
        return answer(await manager.model(alias))

    @app.patch("/admin/models/{alias:path}", openapi_extra=change_schema())
    async def change(alias: str, request: Request) -> Response:
        wanted = decode_body(await request.body(), dict[str, Any])
        return answer(Registered(status="success", routing=await manager.change_model(alias, wanted)))

    @app.delete("/admin/models/{alias:path}")
    async def remove(alias: str) -> Response:
        await manager.remove_model(alias)
        return answer({"status": "success"})


def _add_worker_routes(app: FastAPI, manager: ManagerPort) -> None:
    @app.get("/admin/workers")
    @app.get("/workers")
    async def workers() -> Response:
        return answer({"workers": await manager.workers()})

    @app.post("/admin/workers/{worker_id}/drain")
    async def drain(worker_id: str) -> Response:
        return answer(await manager.drain_worker(worker_id))

    @app.delete("/admin/workers/{worker_id}/drain")
    async def keep(worker_id: str) -> Response:
        return answer(await manager.keep_worker(worker_id))

    @app.post("/workers/register", openapi_extra=body_schema(RegisterWorker))
    async def register_worker(request: Request) -> Response:
        return answer(await manager.register_worker(decode_body(await request.body(), RegisterWorker)))

    @app.post("/workers/{worker_id}/heartbeat", openapi_extra=body_schema(Heartbeat))
    async def heartbeat(worker_id: str, request: Request) -> Response:
        return answer(await manager.heartbeat(worker_id, decode_body(await request.body(), Heartbeat)))

    @app.delete("/workers/{worker_id}/unregister")
    async def unregister(worker_id: str, incarnation: str = "") -> Response:
        await manager.unregister_worker(worker_id, incarnation)
        return answer({"status": "success"})


def _add_key_routes(app: FastAPI, manager: ManagerPort) -> None:
    @app.post("/admin/keys", openapi_extra=body_schema(KeySpec))
    async def make_key(request: Request) -> Response:
        return answer(await manager.make_key(decode_body(await request.body(), KeySpec)))

    @app.get("/admin/keys")
    async def keys() -> Response:
        return answer({"keys": await manager.keys()})

    @app.delete("/admin/keys/{id}")
    async def revoke_key(id: str) -> Response:
        return answer(await manager.revoke_key(id))


async def _begun(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same chunks. An error before the first one comes out here, while there is still a status to give it; after
    it, a manager that has gone is the end.
    """
    first = await anext(chunks, b"")

    async def chain() -> AsyncIterator[bytes]:
        yield first
        with suppress(ManagerAway):
            async for chunk in chunks:
                yield chunk

    return chain()
