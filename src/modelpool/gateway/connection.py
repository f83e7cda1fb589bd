"""One client connection: strict HTTP/1.1, requests served in order, one at a time."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from typing import Protocol, cast

from modelpool.errors import InternalError, PoolError, RequestTimeout
from modelpool.gateway.answer import CONTINUE, encode_answer, encode_error, error_event
from modelpool.gateway.client_limits import Limits
from modelpool.gateway.framing import Gate, Phase, RequestReader
from modelpool.gateway.peer import has_left, reset, unsent_bytes
from modelpool.gateway.request import Request

log = logging.getLogger(__name__)


class Application(Gate, Protocol):
    """What the requests are for."""

    def refused(self, request: Request | None, error: PoolError) -> bytes:
        """Told that a request, or what was none, is answered with this unserved. Header lines for the answer."""

    async def serve(self, request: Request, client: ClientConnection) -> None:
        """Answer, or raise PoolError to have it rendered. Cancelled when the client leaves."""


class Upstream(Protocol):
    """Where an answer comes from."""

    def pause(self) -> None:
        """Send no more for now: the client does not read."""

    def resume(self) -> None: ...

    def check(self, now: float) -> None:
        """Enforce the deadlines."""


class Owner(Protocol):
    """Keeps the connections of one listener."""

    @property
    def ending(self) -> bool:
        """Whether no more requests are taken."""

    @property
    def retiring(self) -> bool:
        """Whether the next request of each connection is its last."""

    def joined(self, connection: ClientConnection) -> None: ...

    def left(self, connection: ClientConnection) -> None:
        """The connection is gone, and what it ran has ended."""


class ClientConnection(asyncio.Protocol):
    """Also what an Application writes its answer to."""

    __slots__ = (
        "_app",
        "_closing",
        "_deadline",
        "_limits",
        "_loop",
        "_news",
        "_opened",
        "_owner",
        "_reader",
        "_reading",
        "_serving",
        "_stalled_at",
        "_task",
        "_transport",
        "_tunnel",
        "_unread",
        "_unsent",
        "_upstream",
        "_writable",
        "answered",
    )

    def __init__(self, app: Application, owner: Owner, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self._app = app
        self._owner = owner
        self._limits = limits
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._reader = RequestReader(app, limits)
        self._deadline = 0.0
        self._reading = True
        self._writable = True
        self._stalled_at = math.inf
        self._unsent = 0
        self._unread = b""
        # What is served
        self._serving: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._upstream: Upstream | None = None
        self._tunnel: Callable[[bytes], None] | None = None
        self._news: asyncio.Event | None = None
        self._closing = False
        self.answered = False
        self._opened = False

    # For the Application

    def write(self, data: bytes) -> None:
        """A piece of the answer to the request that is being served."""
        self.answered = True
        self._send(data)

    def write_ahead(self, data: bytes) -> None:
        """The head of an event stream, or a comment, while there is no answer yet: it can fail in the stream only."""
        self._opened = True
        self._send(data)

    def close_after(self) -> None:
        """End the connection with the answer that is being written."""
        self._closing = True

    def answer(
        self,
        status: int,
        body: bytes,
        headers: Iterable[tuple[str, str]] = (),
        *,
        content_type: str = "application/json",
    ) -> None:
        """The whole answer to the request that is being served."""
        request = self._serving
        assert request is not None
        self.write(
            encode_answer(
                status,
                body,
                headers,
                close=self.closes,
                head_only=request.head_only,
                added=request.added,
                content_type=content_type,
            )
        )

    @property
    def closes(self) -> bool:
        """Whether the connection ends with the answer that is being written."""
        return self._closing or self._owner.ending

    @property
    def opened(self) -> bool:
        """Whether something was sent ahead of the answer, and status 200 with it."""
        return self._opened

    def attach(self, upstream: Upstream) -> None:
        """The answer comes from there: a client that reads slowly slows it down."""
        self._upstream = upstream
        if not self._writable:
            upstream.pause()

    def detach(self) -> None:
        self._upstream = None

    def switch(self, answer: bytes) -> None:
        """Speak another protocol from here on, which ends with the connection. `answer` says so to the client."""
        self._closing = True
        self._news = asyncio.Event()
        self.write(answer)

    async def received(self) -> bytes:
        """Once switched: wait for what comes next."""
        assert self._news is not None
        while not self._unread:
            self.resume_reading()
            await self._news.wait()
            self._news.clear()
        data, self._unread = self._unread, b""
        return data

    def tunnel(self, send: Callable[[bytes], None]) -> None:
        """Once switched: give all that comes to `send`, as it comes."""
        self._tunnel = send
        data, self._unread = self._unread, b""
        if data:
            send(data)
        self.resume_reading()

    def pause_reading(self) -> None:
        if self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._reading and self._transport is not None and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    # For the listener

    @property
    def busy(self) -> bool:
        return self._task is not None or bool(self._reader.queue)

    @property
    def task(self) -> asyncio.Task[None] | None:
        return self._task

    def check(self, now: float) -> None:
        """Enforce the deadlines, if the client let one pass."""
        if not self._writable and self._transport is not None:
            # Of the socket's own buffer a little may be taken at a time, for long, before there is room in it again.
            before, self._unsent = self._unsent, unsent_bytes(self._transport)
            if self._unsent < before:
                self._stalled_at = now
            elif now - self._stalled_at > self._limits.flush_s:
                self.reset()  # it reads nothing of its answer, and holds its place in the engine
                return
        if self._upstream is not None:
            self._upstream.check(now)
        if self._transport is None:
            return
        if self._task is not None:
            if not self._reading and has_left(self._transport):  # it sent far ahead, and its end lies behind that
                self._transport.abort()
            return
        if now < self._deadline:
            return
        if self._reader.phase in (Phase.HEAD, Phase.BODY):
            self._reader.refuse(RequestTimeout("The request did not come in time."))
            self._next()
        elif self._reader.phase is Phase.IDLE:
            self._close()
        else:
            self.abort()

    def end(self) -> None:
        """Close now if idle, else after the request that is served."""
        if not self.busy:
            self._close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def reset(self) -> None:
        """Abort, and forget what is unsent."""
        if self._transport is not None:
            reset(self._transport)

    # Called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._deadline = self._loop.time() + self._limits.idle_s
        self._owner.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._reader.close()
        self._unread = b""
        if self._task is not None:
            # Not in the task itself: cancelled before its first step, it never runs.
            self._task.add_done_callback(lambda _: self._owner.left(self))
            self._task.cancel()
        else:
            self._owner.left(self)

    def eof_received(self) -> None:
        # Half-closed counts as gone: nobody is there to tell apart who stopped sending from who left.
        if self._task is not None:
            self.abort()
        else:
            self._close()

    def pause_writing(self) -> None:
        self._writable = False
        self._stalled_at = self._loop.time()
        self._unsent = 0
        if self._upstream is not None:
            self._upstream.pause()

    def resume_writing(self) -> None:
        self._writable = True
        self._stalled_at = math.inf
        if self._upstream is not None:
            self._upstream.resume()
        self._next()

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if self._task is not None or reader.queue or self._unread:
            self._keep(data)
        elif reader.phase is not Phase.NOTHING:
            self._feed(data)
            self._next()

    def _send(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)  # which raises once it is closed, before connection_lost comes

    # Reading

    def _keep(self, data: bytes) -> None:
        """Hold what comes while a request is served: reading goes on, since only that shows that the client left."""
        if self._reader.phase is Phase.NOTHING:
            return
        if self._tunnel is not None:
            self._tunnel(data)
            return
        self._unread += data
        if self._news is not None:
            self._news.set()
        if len(self._unread) > self._limits.ahead_bytes:
            self.pause_reading()

    def _feed(self, data: bytes) -> None:
        reader = self._reader
        before = reader.phase
        self._unread = reader.feed(data)
        phase = reader.phase
        if phase is Phase.HEAD:
            if before is not phase or reader.begun:
                self._deadline = self._loop.time() + self._limits.head_s
        elif phase is Phase.BODY:
            bought = math.inf if before is not phase else self._deadline + len(data) / self._limits.body_rate
            self._deadline = min(bought, self._loop.time() + self._limits.body_s)

    # Serving

    def _next(self) -> None:
        """Serve what was read; where nothing was, read on."""
        reader = self._reader
        while self._task is None and self._writable and self._transport is not None:
            if reader.queue:
                self._begin(reader.queue.popleft())
            elif self._unread and reader.phase is not Phase.NOTHING:
                self._feed(self._unread)
            else:
                break
        if self._task is None and self._transport is not None:
            self._read_on()

    def _begin(self, item: Request | PoolError) -> None:
        if isinstance(item, PoolError):
            request = self._reader.request
            added = self._app.refused(request, item)
            head_only = request is not None and request.head_only
            self._send(encode_error(item, self._reader.target, close=True, head_only=head_only, added=added))
            self._linger()
            return
        self._serving = item
        self._closing = item.http10 or not item.keep_alive or item.upgrade or self._owner.retiring
        self._task = self._loop.create_task(self._serve(item))

    def _read_on(self) -> None:
        assert self._transport is not None
        if self._reader.wants_continue:
            self._reader.wants_continue = False
            self._send(CONTINUE)
        self.resume_reading()

    async def _serve(self, request: Request) -> None:
        try:
            if request.refusal is not None:
                self._app.refused(request, request.refusal)
                raise request.refusal
            await self._app.serve(request, self)
        except PoolError as error:
            self._fail(request, error)
        except Exception:
            log.exception("%s %s failed", request.method.decode(), request.path.decode("latin-1"))
            self._fail(request, InternalError("Something went wrong here; the gateway's log says what."))
        finally:
            self._served()

    def _fail(self, request: Request, error: PoolError) -> None:
        if self.answered:
            self._closing = True
            self.abort()  # the only way to say that what was sent is not whole
        elif self._opened:
            self._closing = True
            self.write(error_event(error, request.path, chunked=not request.http10))
        else:
            self.write(
                encode_error(error, request.path, close=self.closes, head_only=request.head_only, added=request.added)
            )

    def _served(self) -> None:
        self._task = None
        self._serving = None
        self._upstream = None
        self.answered = False
        self._opened = False
        if self._transport is None:
            return
        if self._news is not None and self._transport.can_write_eof():
            self._linger()
        elif self.closes:
            self._close()
        else:
            idle = self._reader.phase is Phase.IDLE
            self._deadline = self._loop.time() + (self._limits.idle_s if idle else self._limits.body_s)
            self._next()

    def _close(self) -> None:
        """Close once everything is written."""
        self._reader.stop()
        self._deadline = self._loop.time() + self._limits.flush_s
        if self._transport is not None:
            self._transport.close()

    def _linger(self) -> None:
        """Close in two steps: closing with data unread would reset the connection and take the answer away."""
        assert self._transport is not None
        self._reader.stop()
        self._unread = b""
        unsent = self._transport.get_write_buffer_size() > 0
        self._deadline = self._loop.time() + (self._limits.flush_s if unsent else self._limits.linger_s)
        self.resume_reading()
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()
