"""The worker's HTTP service: orders, reports, logs, and the watch by which its end is seen. The proxy is in proxy.py.

Every route but `/health` wants the cluster token. `{instance}` may contain `/`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp

from modelpool import __version__
from modelpool.control_http import TokenGuard, answer, body_schema, render_errors, share_schemas
from modelpool.errors import BodyTooLarge, Conflict
from modelpool.messages.models import decode_body
from modelpool.messages.workers import SleepOrder, StartOrder, WorkerDescription
from modelpool.worker.fence import Fence, FenceGuard
from modelpool.worker.supervisor import Supervisor

MAX_ORDER_BYTES = 4 << 20
WATCH_INTERVAL_S = 5.0


def worker_app(
    supervisor: Supervisor,
    *,
    describe: Callable[[], Awaitable[WorkerDescription]],
    proxy: ASGIApp,
    fence: Fence,
    token: str,
    ending: asyncio.Event,
    dismiss: Callable[[], None],
) -> ASGIApp:
    """The whole service. Open streams end once `ending` is set; `dismiss` is called where the manager says so."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    render_errors(app)
    _add_worker_routes(app, describe, ending)
    _add_orders(app, supervisor)
    _add_dismissal(app, supervisor, dismiss)
    _add_reports(app, supervisor, ending)
    app.mount("/proxy", proxy)
    return TokenGuard(FenceGuard(app, fence), token=token)


def _add_worker_routes(
    app: FastAPI, describe: Callable[[], Awaitable[WorkerDescription]], ending: asyncio.Event
) -> None:
    @app.get("/health")
    async def health() -> Response:
        return answer({"status": "ok"})

    @app.get("/info")
    async def info() -> Response:
        return answer(await describe())

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return answer(share_schemas(get_openapi(title="Model Pool worker", version=__version__, routes=app.routes)))

    @app.get("/watch")
    async def watch() -> Response:
        return StreamingResponse(_empty_lines(ending), media_type="text/plain")


async def _empty_lines(ending: asyncio.Event) -> AsyncIterator[bytes]:
    while not ending.is_set():
        yield b"\n"
        try:
            async with asyncio.timeout(WATCH_INTERVAL_S):
                await ending.wait()
        except TimeoutError:
            continue


def _add_orders(app: FastAPI, supervisor: Supervisor) -> None:
    @app.post("/instances/start", openapi_extra=body_schema(StartOrder))
    async def start(request: Request) -> Response:
        return answer(await supervisor.start(decode_body(await _body(request), StartOrder)))

    @app.post("/instances/{instance:path}/stop")
    async def stop(instance: str) -> Response:
        return answer(supervisor.stop(instance))

    @app.post("/instances/{instance:path}/sleep", openapi_extra=body_schema(SleepOrder))
    async def sleep(instance: str, request: Request) -> Response:
        return answer(supervisor.sleep(instance, decode_body(await _body(request), SleepOrder)))

    @app.post("/instances/{instance:path}/wake")
    async def wake(instance: str) -> Response:
        return answer(supervisor.wake(instance))


def _add_dismissal(app: FastAPI, supervisor: Supervisor, dismiss: Callable[[], None]) -> None:
    @app.post("/dismiss")
    async def dismissed() -> Response:
        if running := supervisor.reports():
            raise Conflict(f"`{running[0].instance}` is here, so this worker does not end.", code="worker_busy")
        supervisor.take_no_more_orders()
        dismiss()
        return answer({"status": "ok"})


async def _body(request: Request) -> bytes:
    """Raises BodyTooLarge, before the whole of it was read."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_ORDER_BYTES:
            raise BodyTooLarge(f"The body is larger than {MAX_ORDER_BYTES} bytes.")
    return bytes(body)


def _add_reports(app: FastAPI, supervisor: Supervisor, ending: asyncio.Event) -> None:
    @app.get("/instances")
    async def instances() -> Response:
        return answer({"instances": supervisor.reports()})

    @app.get("/instances/{instance:path}/status")
    async def status(instance: str) -> Response:
        # An instance may itself be called `…/status`.
        if not supervisor.has(instance) and supervisor.has(f"{instance}/status"):
            return answer(supervisor.report(f"{instance}/status"))
        return answer(await supervisor.status(instance))

    @app.get("/instances/{instance:path}/logs")
    async def logs(
        instance: str, tail: Annotated[int, Query(ge=0, le=1_000_000)] = 200, follow: bool = False
    ) -> Response:
        if not supervisor.has(instance) and supervisor.has(f"{instance}/logs"):
            return answer(supervisor.report(f"{instance}/logs"))
        log = await asyncio.to_thread(supervisor.log, instance)
        media_type = "text/plain; charset=utf-8"
        if not follow:
            text, _ = await asyncio.to_thread(log.tail, tail)
            return Response(text, media_type=media_type)
        return StreamingResponse(_until(ending, log.follow(tail)), media_type=media_type)

    @app.get("/instances/{instance:path}")
    async def report(instance: str) -> Response:
        return answer(supervisor.report(instance))


async def _until(ending: asyncio.Event, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        if ending.is_set():
            return
        yield chunk
