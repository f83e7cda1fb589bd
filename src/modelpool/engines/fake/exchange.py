"""One HTTP exchange with the fake engine, on plain ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec

from modelpool.engines.engine import Receive, Scope, Send
from modelpool.messages.models import decode_body
from modelpool.relay.form import fields

T = TypeVar("T")


class Refused(Exception):
    """An error answer in vLLM's envelope."""

    def __init__(self, status: int, type_: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type_, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None) -> Refused:
    return Refused(400, "BadRequestError", message, param)


class ClientLeft(Exception):
    """The client closed its connection."""


class Exchange:
    """`body` is read already; answers go out by `json`, `text`, or `event` after `event` and `end_events`."""

    def __init__(self, scope: Scope, body: bytes, send: Send) -> None:
        self.scope = scope
        self.body = body
        self._send = send
        self.started = False

    def decoded(self, type_: type[T]) -> T:
        """The body as `type_`. Raises what decode_body raises."""
        return decode_body(self.body, type_)

    def form(self, type_: type[T]) -> tuple[T, dict[str, bytes]]:
        """A form: its texts as `type_`, and its files by name. Raises Refused."""
        texts: dict[str, str] = {}
        files: dict[str, bytes] = {}
        content_type = next((value for name, value in self.scope["headers"] if name == b"content-type"), b"")
        try:
            for field in fields(content_type, self.body):
                value = self.body[field.start : field.end]
                if field.filename is None:
                    texts[field.name] = value.decode()
                else:
                    files[field.name] = value
            return msgspec.convert(texts, type_, strict=False), files
        except ValueError as error:
            raise bad_request(str(error)) from error

    async def json(self, value: Any, status: int = 200) -> None:
        await self._answer(status, b"application/json", msgspec.json.encode(value))

    async def refuse(self, refused: Refused) -> None:
        body: dict[str, Any] = refused.body
        if self.scope["path"].startswith("/v1/messages"):
            kind = "not_found_error" if refused.status == 404 else "invalid_request_error"
            body = {"type": "error", "error": {"type": kind, "message": body["error"]["message"]}}
        await self.json(body, refused.status)

    async def text(self, value: str, content_type: bytes = b"text/plain; charset=utf-8") -> None:
        await self._answer(200, content_type, value.encode())

    async def event(self, value: Any, name: str | None = None) -> None:
        """One server-sent event; the first one starts the answer."""
        if not self.started:
            await self._start(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        head = f"event: {name}\n".encode() if name else b""
        data = value.encode() if isinstance(value, str) else msgspec.json.encode(value)
        await self._send({"type": "http.response.body", "body": head + b"data: " + data + b"\n\n", "more_body": True})

    async def end_events(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer(self, status: int, content_type: bytes, body: bytes) -> None:
        await self._start(status, [(b"content-type", content_type), (b"content-length", str(len(body)).encode())])
        await self._send({"type": "http.response.body", "body": body})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises ClientLeft."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def unless_client_leaves(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work`, but cancel it, and return once it has ended, as soon as the client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        left = not working.done()
        if left:
            working.cancel()
        await asyncio.wait({working, watching})
    if not (left and working.cancelled()):
        working.result()
