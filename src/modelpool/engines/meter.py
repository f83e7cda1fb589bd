"""The door of a host: every request is checked, counted and timed here, whatever way it came."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modelpool.engines.engine import ASGIApp, Message, Receive, Scope, Send
from modelpool.errors import Draining, PoolError, Unauthorized, error_body, error_headers

# Answered by the tokenizer alone; their times would hide what the engine needs.
_UNTIMED = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")


@dataclass
class Mean:
    """The last of a series of seconds, and the mean over all."""

    last: float | None = None
    total: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        self.last = seconds
        self.total += seconds
        self.count += 1

    @property
    def average(self) -> float | None:
        return self.total / self.count if self.count else None


class Meter:
    """ASGI middleware: token, in-flight count, times, and no new work while it drains or sleeps.

    A POST or a WebSocket is inference and counts; a GET does not. `inflight` goes back on every way out: answered,
    refused, failed, cancelled. Times are those of requests that the engine answered (status below 400, tokenizing left
    out): `ttft` to the first byte of the body, `e2e` to its last one. `receive` is handed on as it is, so that the
    engine sees clients leave, and nothing is buffered.
    """

    def __init__(self, app: ASGIApp, token: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._authorization = f"Bearer {token}".encode()
        self._clock = clock
        self._idle = asyncio.Event()
        self._idle.set()
        self.inflight = 0
        self.requests_total = 0
        self.ttft = Mean()
        self.e2e = Mean()
        self.draining = False
        """It ends: never open again."""
        self.closed = False
        """For a sleep, and until it is known to be sound after it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif not self._authorized(scope):
            await _refuse(scope, send, Unauthorized("This engine is reached through its pool, with the cluster token."))
        elif scope["type"] == "http" and scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif self.draining or self.closed:
            await _refuse(scope, send, Draining("This instance takes no new requests.", retry_after=1))
        else:
            with self._counted():
                await self._app(scope, receive, send if scope["path"] in _UNTIMED else self._timed(send))

    async def idle(self) -> None:
        """Return once nothing is in flight."""
        await self._idle.wait()

    def _authorized(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._authorization)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.inflight += 1
        self.requests_total += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.inflight -= 1
            if not self.inflight:
                self._idle.set()

    def _timed(self, send: Send) -> Send:
        began = self._clock()
        answered = False
        first = True

        async def timed(message: Message) -> None:
            nonlocal answered, first
            await send(message)
            if message["type"] == "http.response.start":
                answered = message["status"] < 400
            elif answered and message["type"] == "http.response.body":
                now = self._clock()
                if first and message.get("body"):
                    first = False
                    self.ttft.add(now - began)
                if not message.get("more_body", False):
                    self.e2e.add(now - began)

        return timed


async def _refuse(scope: Scope, send: Send, error: PoolError) -> None:
    kind = "http.response"
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            return
        kind = "websocket.http.response"
    body = error_body(error)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in error_headers(error)),
    ]
    await send({"type": f"{kind}.start", "status": error.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
