"""One client connection: strict HTTP/1.1, requests served in order, one at a time."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import select
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import NoReturn, Protocol, cast

import httptools
import msgspec

from modelpool.errors import (
    BodyTooLarge,
    HeadersTooLarge,
    InternalError,
    InvalidRequest,
    PoolError,
    RequestTimeout,
)
from modelpool.gateway.answer import CONTINUE, encode_answer, encode_error, error_event
from modelpool.gateway.request import Request

log = logging.getLogger(__name__)

# Where a second one would let two readers of the message see different things.
_ONCE = (b"host", b"content-length", b"transfer-encoding", b"authorization", b"x-api-key", b"expect")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one client may ask of us. Sizes in bytes, times in seconds."""

    body_bytes: int
    head_bytes: int = 64 << 10
    ahead_bytes: int = 64 << 10
    """Read of the next requests while one is served."""
    idle_s: float = 120.0
    head_s: float = 15.0
    body_s: float = 30.0
    """A body may pause for this long; what it sends buys more time at `body_rate`."""
    body_rate: int = 1024
    linger_s: float = 2.0
    flush_s: float = 60.0
    check_s: float = 0.5
    """How often deadlines are looked at."""


class Application(Protocol):
    """What the requests are for."""

    def admit(self, request: Request) -> None:
        """Set the request's id and route, now that its head is there. Raises PoolError to refuse it unread."""

    def refused(self, request: Request | None, error: PoolError) -> bytes:
        """Told that a request, or what was none, is answered with this unserved. Header lines for the answer."""

    def upgrades(self, method: bytes, target: bytes) -> bool:
        """Whether such a request may become a WebSocket. Others are read as if they had not asked for it."""

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

    def joined(self, connection: ClientConnection) -> None: ...

    def left(self, connection: ClientConnection) -> None:
        """The connection is gone, and what it ran has ended."""


class _Phase(Enum):
    """What is being read."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    NOTHING = auto()
    """The connection ends. What still comes is thrown away."""


class ClientConnection(asyncio.Protocol):
    """Also what an Application writes its answer to."""

    __slots__ = (
        "_app",
        "_begun",
        "_body",
        "_body_bytes",
        "_closing",
        "_continue",
        "_deadline",
        "_fed",
        "_head_bytes",
        "_headers",
        "_limits",
        "_loop",
        "_news",
        "_opened",
        "_owner",
        "_parser",
        "_phase",
        "_queue",
        "_reading",
        "_request",
        "_serving",
        "_stalled_at",
        "_target",
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
        self._parser = httptools.HttpRequestParser(self)
        self._phase = _Phase.IDLE
        self._deadline = 0.0
        self._reading = True
        self._writable = True
        self._stalled_at = math.inf
        self._unsent = 0
        # The message that is being read
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._begun = False
        self._fed = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._request: Request | None = None
        self._continue = False
        # What was read and waits
        self._queue: deque[Request | PoolError] = deque()
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
        return self._task is not None or bool(self._queue)

    @property
    def task(self) -> asyncio.Task[None] | None:
        return self._task

    def check(self, now: float) -> None:
        """Enforce the deadlines, if the client let one pass."""
        if not self._writable and self._transport is not None:
            if self._took_some(self._transport):
                self._stalled_at = now
            elif now - self._stalled_at > self._limits.flush_s:
                self.reset()  # it reads nothing of its answer, and holds its place in the engine
                return
        if self._upstream is not None:
            self._upstream.check(now)
        if not self._reading and self._task is not None and self._left_unread():
            self.abort()
            return
        if now < self._deadline or self._task is not None or self._transport is None:
            return
        if self._phase in (_Phase.HEAD, _Phase.BODY):
            self._refuse(RequestTimeout("The request did not come in time."))
            self._next()
        elif self._phase is _Phase.IDLE:
            self._close()
        else:
            self.abort()

    def _took_some(self, transport: asyncio.Transport) -> bool:
        """Whether the client read something since this was last asked. Of a socket's own buffer that may be a little
        at a time, for a long time, before there is room in it again.
        """
        unsent = transport.get_write_buffer_size()
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            unsent += struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
        before, self._unsent = self._unsent, unsent
        return unsent < before

    def _left_unread(self) -> bool:
        """Whether the client left while nothing is read of it: it sent far ahead, and its end lies behind that."""
        sock = None if self._transport is None else self._transport.get_extra_info("socket")
        if sock is None or sock.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def end(self) -> None:
        """Close now if idle, else after the request that is served."""
        if not self.busy:
            self._close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def reset(self) -> None:
        """Abort, and forget what is unsent: the kernel would go on offering it to the client."""
        if self._transport is None:
            return
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # Called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._deadline = self._loop.time() + self._limits.idle_s
        self._owner.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        del self._parser  # they hold each other, which only a rare full look of the garbage collector would find
        self._queue.clear()
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
        if self._task is not None or self._queue or self._unread:
            self._keep(data)
        elif self._phase is not _Phase.NOTHING:
            self._feed(data)
            self._next()

    def _send(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)  # which raises once it is closed, before connection_lost comes

    # Reading

    def _keep(self, data: bytes) -> None:
        """Hold what comes while a request is served: reading goes on, since only that shows that the client left."""
        if self._phase is _Phase.NOTHING:
            return
        if self._tunnel is not None:
            self._tunnel(data)
            return
        self._unread += data
        if self._news is not None:
            self._news.set()
        if len(self._unread) > self._limits.ahead_bytes:
            self.pause_reading()

    def _feed(self, data: bytes | memoryview) -> None:
        before = self._phase
        self._fed = len(data)
        self._begun = False
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            if self._phase is not _Phase.NOTHING:
                self._refuse(InvalidRequest(f"This is not valid HTTP/1.1: {error}.", code="invalid_http"))
            return
        phase = self._phase
        if phase is _Phase.HEAD:
            # Where in these bytes the message began is not known: then only what was made out of them counts.
            self._head_bytes += _head_length(self._target, self._headers) if self._begun else self._fed
            if self._head_bytes > self._limits.head_bytes:
                self._refuse(_headers_too_large(self._limits))
            elif before is not phase or self._begun:
                self._deadline = self._loop.time() + self._limits.head_s
        elif phase is _Phase.BODY:
            bought = math.inf if before is not phase else self._deadline + len(data) / self._limits.body_rate
            self._deadline = min(bought, self._loop.time() + self._limits.body_s)

    def _parse(self, data: bytes | memoryview) -> None:
        """Read requests as if they had not asked for another protocol (`h2c`, as some clients always do).

        But for those that become a WebSocket: what follows them is no HTTP. The parser takes what follows the others
        for that protocol too, so it is given the head again without the wish.
        """
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = memoryview(data)[upgrade.args[0] :]
                if self._queue and isinstance(last := self._queue[-1], Request) and last.upgrade:
                    self._unread = bytes(rest)
                    return
                version = self._parser.get_http_version().encode()
                head = b"%b %b HTTP/%b\r\n" % (self._parser.get_method(), self._target, version)
                head += b"".join(b"%b: %b\r\n" % each for each in self._headers if each[0] != b"upgrade")
                self._parser = httptools.HttpRequestParser(self)
                self._parser.feed_data(head + b"\r\n")
                data = rest

    def _refuse(self, error: PoolError) -> None:
        """Answer with this when it is its turn, and read nothing more."""
        self._phase = _Phase.NOTHING
        self._continue = False
        self._queue.append(error)

    # Called by the parser

    def on_message_begin(self) -> None:
        self._phase = _Phase.HEAD
        self._target = b""
        self._headers = []
        self._head_bytes = 0
        self._begun = True
        self._body = []
        self._body_bytes = 0

    def on_url(self, part: bytes) -> None:
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is _Phase.HEAD:  # after it these are trailers, which nobody here reads
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        method = parser.get_method()
        if method == b"CONNECT":
            self._stop(InvalidRequest("CONNECT is for proxies, and this is none.", code="invalid_http"))
        upgrade = parser.should_upgrade()
        if upgrade and not self._app.upgrades(method, self._target):
            return
        self._phase = _Phase.BODY
        version = parser.get_http_version()
        if not self._target.startswith(b"/"):
            self._target, self._headers = _origin_form(self._target, self._headers)
        self._request = request = Request(
            method, self._target, self._headers, http10=version == "1.0", keep_alive=parser.should_keep_alive()
        )
        request.upgrade = upgrade
        has_body = b"transfer-encoding" in request.by_name or request.by_name.get(b"content-length", b"0") != b"0"
        if error := self._fault(request, version):
            self._stop(error)
        try:
            self._app.admit(request)
        except PoolError as refusal:
            if has_body:
                self._stop(refusal)
            request.refusal = refusal
            return
        if has_body and request.by_name.get(b"expect", b"").lower() == b"100-continue" and not request.http10:
            self._continue = True

    def on_body(self, part: bytes) -> None:
        self._body.append(part)
        self._body_bytes += len(part)
        if self._body_bytes > self._limits.body_bytes:
            self._stop(_body_too_large(self._limits))

    def on_message_complete(self) -> None:
        request = self._request
        if request is None:
            return  # to be read again without its upgrade
        self._phase = _Phase.IDLE
        self._request = None
        self._headers = []
        self._continue = False
        body = self._body
        request.body = body[0] if len(body) == 1 else b"".join(body)
        self._body = []
        self._queue.append(request)

    def _fault(self, request: Request, version: str) -> PoolError | None:
        """What a strict server must refuse and the parser does not."""
        headers, by_name = request.headers, request.by_name
        if version not in ("1.1", "1.0"):
            return InvalidRequest(f"HTTP/{version} is not spoken here.", code="invalid_http")
        limit = self._limits.head_bytes
        if self._head_bytes + self._fed > limit and _head_length(self._target, headers) > limit:
            return _headers_too_large(self._limits)
        if len(headers) != len(by_name):
            for name in _ONCE:
                if sum(each == name for each, _ in headers) > 1:
                    return InvalidRequest(f"The header {name.decode()} came more than once.", code="invalid_http")
        if not request.http10 and b"host" not in by_name:
            return InvalidRequest("The header Host is missing.", code="invalid_http")
        if coding := by_name.get(b"transfer-encoding"):
            if coding.lower() != b"chunked" or request.http10:
                return InvalidRequest("The only Transfer-Encoding taken is chunked, in HTTP/1.1.", code="invalid_http")
        elif int(by_name.get(b"content-length", b"0")) > self._limits.body_bytes:
            return _body_too_large(self._limits)
        return None

    def _stop(self, error: PoolError) -> NoReturn:
        """Refuse, and stop the parser: it must not go on to take the unread body for requests."""
        self._refuse(error)
        raise _StopReading

    # Serving

    def _next(self) -> None:
        """Serve what was read; where nothing was, read on."""
        while self._task is None and self._writable and self._transport is not None:
            if self._queue:
                self._begin(self._queue.popleft())
            elif self._unread and self._phase is not _Phase.NOTHING:
                data, self._unread = self._unread, b""
                self._feed(data)
            else:
                break
        if self._task is None and self._transport is not None:
            self._read_on()

    def _begin(self, item: Request | PoolError) -> None:
        if isinstance(item, PoolError):
            request = self._request
            added = self._app.refused(request, item)
            head_only = request is not None and request.head_only
            self._send(encode_error(item, self._target, close=True, head_only=head_only, added=added))
            self._linger()
            return
        self._serving = item
        self._closing = item.http10 or not item.keep_alive or item.upgrade
        self._task = self._loop.create_task(self._serve(item))

    def _read_on(self) -> None:
        assert self._transport is not None
        if self._continue:
            self._continue = False
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
            idle = self._phase is _Phase.IDLE
            self._deadline = self._loop.time() + (self._limits.idle_s if idle else self._limits.body_s)
            self._next()

    def _close(self) -> None:
        """Close once everything is written."""
        self._phase = _Phase.NOTHING
        self._queue.clear()
        self._deadline = self._loop.time() + self._limits.flush_s
        if self._transport is not None:
            self._transport.close()

    def _linger(self) -> None:
        """Close in two steps: closing with data unread would reset the connection and take the answer away."""
        assert self._transport is not None
        self._phase = _Phase.NOTHING
        self._queue.clear()
        self._unread = b""
        unsent = self._transport.get_write_buffer_size() > 0
        self._deadline = self._loop.time() + (self._limits.flush_s if unsent else self._limits.linger_s)
        self.resume_reading()
        if self._transport.can_write_eof() and not self._transport.is_closing():
            self._transport.write_eof()


class _StopReading(Exception):
    """Raised in a parser's callback, which ends the parser; the reason was queued."""


def _origin_form(target: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """`http://host/path` as a path and a Host, which it overrides; other forms as they are."""
    scheme, mark, rest = target.partition(b"://")
    if not mark or scheme.lower() not in (b"http", b"https"):
        return target, headers
    authority, slash, path = rest.partition(b"/")
    return slash + path or b"/", [each for each in headers if each[0] != b"host"] + [(b"host", authority)]


def _head_length(target: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    return len(target) + sum(len(name) + len(value) + 4 for name, value in headers)


def _headers_too_large(limits: Limits) -> HeadersTooLarge:
    return HeadersTooLarge(f"The request's head is longer than {limits.head_bytes} bytes.")


def _body_too_large(limits: Limits) -> BodyTooLarge:
    return BodyTooLarge(f"The body is longer than {limits.body_bytes} bytes.")
