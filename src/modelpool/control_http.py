"""What the control services (manager, worker) have in common as HTTP services: errors, answers, the token, serving.

Bodies and answers are msgspec structs; FastAPI gives routes, lifespans and the OpenAPI document. The byte path does
not come by here.
"""

from __future__ import annotations

import hmac
import logging
import os
import socket
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from modelpool.errors import (
    InternalError,
    InvalidBody,
    InvalidRequest,
    MethodNotAllowed,
    PoolError,
    RouteNotFound,
    Unauthorized,
    error_body,
    error_headers,
)
from modelpool.tcp import bind_tcp as bind_tcp

log = logging.getLogger(__name__)


def answer(value: object, status: int = 200) -> Response:
    """A struct, or builtins, as a JSON response."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_response(error: PoolError) -> Response:
    return Response(error_body(error), error.status, dict(error_headers(error)), media_type="application/json")


def body_schema(type_: type[Any]) -> dict[str, Any]:
    """`openapi_extra` for a route whose body is decoded with `decode_body`."""
    (schema,), components = msgspec.json.schema_components([type_], ref_template="#/$defs/{name}")
    schema = {**components.get(type_.__name__, schema), "$defs": components}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def share_schemas(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document in which what bodies define for themselves stands where all may refer to it."""
    shared = document.setdefault("components", {}).setdefault("schemas", {})
    for operations in document["paths"].values():
        for operation in operations.values():
            content = operation.get("requestBody", {}).get("content", {})
            for kind, body in content.items():
                shared.update(_with_shared_references(body["schema"].get("$defs", {})))
                schema = {name: value for name, value in body["schema"].items() if name != "$defs"}
                content[kind] = {"schema": _with_shared_references(schema)}
    return document


def _with_shared_references(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {name: _with_shared_references(value) for name, value in schema.items()}
    if isinstance(schema, list):
        return [_with_shared_references(each) for each in schema]
    if isinstance(schema, str):
        return schema.replace("#/$defs/", "#/components/schemas/")
    return schema


def render_errors(app: FastAPI) -> None:
    """Every error that leaves `app` has our envelope."""

    async def pool_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, PoolError)
        return error_response(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        if error.status_code == 404:
            return error_response(RouteNotFound(f"There is no route {path}."))
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "").split(", ")
            return error_response(MethodNotAllowed(request.method, path, allowed))
        return error_response(InvalidRequest(str(error.detail)))

    async def bad_parameter(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        field = str(first["loc"][-1])
        return error_response(InvalidBody(f"`{field}`: {first['msg']}, got {first.get('input')!r}.", param=field))

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(InternalError("Something went wrong here; the log of this service says what."))

    app.add_exception_handler(PoolError, pool_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, bad_parameter)
    app.add_exception_handler(Exception, unexpected)


class TokenGuard:
    """ASGI middleware: 401 for every request without `Authorization: Bearer <token>`, but for the `open_` paths."""

    def __init__(self, app: ASGIApp, *, token: str, open_: Iterable[str] = ("/health",)) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()
        self._open = frozenset(open_)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] in ("http", "websocket")
        if asks and scope["path"] not in self._open and not self._knows(scope):
            await error_response(Unauthorized("The cluster token is missing or wrong."))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        return any(
            name == b"authorization" and hmac.compare_digest(value, self._expected) for name, value in scope["headers"]
        )


class Server(uvicorn.Server):
    """uvicorn on sockets that are bound already; the process's signals stay with whoever runs it."""

    def __init__(self, app: ASGIApp, *, log_level: str = "warning") -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level=log_level,
                server_header=False,
                timeout_graceful_shutdown=2,
                timeout_keep_alive=75,
            )
        )

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def bind_control_socket(path: Path) -> socket.socket:
    """The control socket, mode 0600 from its first moment. A file left by a dead manager is replaced."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    finally:
        os.umask(mask)
    return sock
