"""Where a client's requests begin and end: strict HTTP/1.1, which every reader on the way takes for the same."""

from __future__ import annotations

from collections import deque
from enum import Enum, auto
from typing import NoReturn, Protocol

import httptools

from modelpool.errors import BodyTooLarge, HeadersTooLarge, InvalidRequest, PoolError
from modelpool.gateway.client_limits import Limits
from modelpool.gateway.request import Request

# Where a second one would let two readers of the message see different things.
_ONCE = (b"host", b"content-length", b"transfer-encoding", b"authorization", b"x-api-key", b"expect")


class Gate(Protocol):
    """Asked while a request is read."""

    def admit(self, request: Request) -> None:
        """Set the request's id and route, now that its head is there. Raises PoolError to refuse it unread."""

    def upgrades(self, method: bytes, target: bytes) -> bool:
        """Whether such a request may become a WebSocket. Others are read as if they had not asked for it."""


class Phase(Enum):
    """What is being read."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    NOTHING = auto()
    """The connection ends. What still comes is thrown away."""


class RequestReader:
    """Makes requests of the bytes of one connection.

    Public for the connection, on every request's path: `phase`; `queue`, the requests that were read, last of all why
    no more will be; `request` and `target` of the message that is being read; `begun`, whether one began in the bytes
    fed last; `wants_continue`, whether its client waits to be told to send the body.
    """

    __slots__ = (
        "_body",
        "_body_bytes",
        "_fed",
        "_gate",
        "_head_bytes",
        "_headers",
        "_limits",
        "_parser",
        "begun",
        "phase",
        "queue",
        "request",
        "target",
        "wants_continue",
    )

    def __init__(self, gate: Gate, limits: Limits) -> None:
        self._gate = gate
        self._limits = limits
        self._parser = httptools.HttpRequestParser(self)
        self.phase = Phase.IDLE
        self.queue: deque[Request | PoolError] = deque()
        self.request: Request | None = None
        self.target = b""
        self.begun = False
        self.wants_continue = False
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._fed = 0
        self._body: list[bytes] = []
        self._body_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """Read on. What follows a request that is to become a WebSocket is no HTTP, and is returned."""
        self._fed = len(data)
        self.begun = False
        rest = b""
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                rest = self._go_on(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if self.phase is not Phase.NOTHING:
                self.refuse(InvalidRequest(f"This is not valid HTTP/1.1: {error}.", code="invalid_http"))
            return b""
        if self.phase is Phase.HEAD:
            # Where in these bytes the message began is not known: then only what was made out of them counts.
            self._head_bytes += _head_length(self.target, self._headers) if self.begun else self._fed
            if self._head_bytes > self._limits.head_bytes:
                self.refuse(_headers_too_large(self._limits))
        return rest

    def refuse(self, error: PoolError) -> None:
        """Have it answered with this when it is its turn, and read nothing more."""
        self.phase = Phase.NOTHING
        self.wants_continue = False
        self.queue.append(error)

    def stop(self) -> None:
        """Read nothing more, and forget what was read."""
        self.phase = Phase.NOTHING
        self.queue.clear()

    def close(self) -> None:
        """Stopped for good."""
        self.stop()
        del self._parser  # they hold each other, which only a rare full look of the garbage collector would find

    def _go_on(self, rest: memoryview) -> bytes:
        """Read requests as if they had not asked for another protocol (`h2c`, as some clients always do).

        But for those that become a WebSocket. The parser takes what follows the others for that protocol too, so it is
        given the head again without the wish.
        """
        while True:
            if self.queue and isinstance(last := self.queue[-1], Request) and last.upgrade:
                return bytes(rest)
            version = self._parser.get_http_version().encode()
            head = b"%b %b HTTP/%b\r\n" % (self._parser.get_method(), self.target, version)
            head += b"".join(b"%b: %b\r\n" % each for each in self._headers if each[0] != b"upgrade")
            self._parser = httptools.HttpRequestParser(self)
            self._parser.feed_data(head + b"\r\n")
            try:
                self._parser.feed_data(rest)
                return b""
            except httptools.HttpParserUpgrade as upgrade:
                rest = rest[upgrade.args[0] :]

    # Called by the parser

    def on_message_begin(self) -> None:
        self.phase = Phase.HEAD
        self.target = b""
        self.begun = True
        self._headers = []
        self._head_bytes = 0
        self._body = []
        self._body_bytes = 0

    def on_url(self, part: bytes) -> None:
        self.target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.phase is Phase.HEAD:  # after it these are trailers, which nobody here reads
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        method = parser.get_method()
        if method == b"CONNECT":
            self._stop(InvalidRequest("CONNECT is for proxies, and this is none.", code="invalid_http"))
        upgrade = parser.should_upgrade()
        if upgrade and not self._gate.upgrades(method, self.target):
            return
        self.phase = Phase.BODY
        version = parser.get_http_version()
        if not self.target.startswith(b"/"):
            self.target, self._headers = _origin_form(self.target, self._headers)
        self.request = request = Request(
            method, self.target, self._headers, http10=version == "1.0", keep_alive=parser.should_keep_alive()
        )
        request.upgrade = upgrade
        has_body = b"transfer-encoding" in request.by_name or request.by_name.get(b"content-length", b"0") != b"0"
        if error := self._fault(request, version):
            self._stop(error)
        try:
            self._gate.admit(request)
        except PoolError as refusal:
            if has_body:
                self._stop(refusal)
            request.refusal = refusal
            return
        if has_body and request.by_name.get(b"expect", b"").lower() == b"100-continue" and not request.http10:
            self.wants_continue = True

    def on_body(self, part: bytes) -> None:
        self._body.append(part)
        self._body_bytes += len(part)
        if self._body_bytes > self._limits.body_bytes:
            self._stop(_body_too_large(self._limits))

    def on_message_complete(self) -> None:
        request = self.request
        if request is None:
            return  # to be read again without its upgrade
        self.phase = Phase.IDLE
        self.request = None
        self.wants_continue = False
        self._headers = []
        body = self._body
        request.body = body[0] if len(body) == 1 else b"".join(body)
        self._body = []
        self.queue.append(request)

    def _fault(self, request: Request, version: str) -> PoolError | None:
        """What a strict server must refuse and the parser does not."""
        headers, by_name = request.headers, request.by_name
        if version not in ("1.1", "1.0"):
            return InvalidRequest(f"HTTP/{version} is not spoken here.", code="invalid_http")
        limit = self._limits.head_bytes
        if self._head_bytes + self._fed > limit and _head_length(self.target, headers) > limit:
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
        self.refuse(error)
        raise _StopReading


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
