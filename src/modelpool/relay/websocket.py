"""A WebSocket to an upstream: a handshake, and then bytes both ways, whatever frames they are."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Iterable
from typing import Protocol, cast

from websockets.exceptions import ProtocolError
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader
from websockets.utils import accept_key

from modelpool.errors import Draining, InstanceNotFound, RouteNotFound, UpstreamFailed, UpstreamTimeout
from modelpool.relay.endpoint import Endpoint
from modelpool.relay.request import Headers, end_to_end
from modelpool.relay.response import ResponseHead

_HEAD_BYTES_MAX = 64 << 10
_FIRST_BYTES_MAX = 64 << 10
_OURS = frozenset({b"host", b"content-length", b"authorization", b"x-api-key", b"origin"})


class Downstream(Protocol):
    """Where the upstream's bytes go. Called from the event loop; must not block or raise."""

    def write(self, data: bytes) -> None: ...

    def pause_reading(self) -> None:
        """Send nothing more up for now."""

    def resume_reading(self) -> None: ...


class UpstreamSocket(asyncio.Protocol):
    """Use `open_websocket`. Nothing more is read of it until it is joined to a downstream.

    `segments` and `size` count the pieces and bytes that came since. When they came says nothing: there is no one
    request that they answer.
    """

    status = 101
    streamed = False
    first_byte = 0.0

    def __init__(self, loop: asyncio.AbstractEventLoop, key: str) -> None:
        self._accept = accept_key(key).encode()
        self._transport: asyncio.Transport | None = None
        self._downstream: Downstream | None = None
        self.segments = 0
        self.size = 0
        self._unread = b""
        self._dropping: _FirstMessage | None = None
        self._opened: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()

    # For the user

    async def opened(self, instance: str) -> None:
        """Wait for the answer to the handshake. Raises Draining, RouteNotFound, UpstreamFailed."""
        await self._opened
        end = self._unread.index(b"\r\n\r\n") + 4
        status = self._unread[9:12]
        head = ResponseHead(int(status) if status.isdigit() else 0, self._unread[:end])
        self._unread = self._unread[end:]
        if head.status == 101 and (b"sec-websocket-accept", self._accept) in head.headers():
            return
        self.close()
        if head.status in (Draining.status, InstanceNotFound.status):
            raise Draining(f"The instance {instance} takes no new requests.")
        if head.status == 403:  # as ASGI servers refuse what nobody takes
            raise RouteNotFound(f"The instance {instance} serves no such WebSocket: its model has no use for it.")
        raise UpstreamFailed(f"The instance {instance} did not take the WebSocket: status {head.status}.")

    def join(self, downstream: Downstream, *, drop_first: bytes = b"") -> None:
        """Send what comes to `downstream`, but for the first message if it contains `drop_first`."""
        assert self._transport is not None
        self._downstream = downstream
        if drop_first:
            self._dropping = _FirstMessage(drop_first)
        unread, self._unread = self._unread, b""
        if unread:
            self._pass(unread)
        self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def ended(self) -> None:
        """Wait until the upstream has closed the connection."""
        await self._ended

    def pause(self) -> None:
        """Stop reading: the upstream is slowed down by its full socket."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def check(self, now: float) -> None:
        """A WebSocket may be silent for as long as it likes."""

    def close(self) -> None:
        """Leave, at once."""
        if self._transport is not None:
            self._transport.abort()

    # Called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._downstream is not None:
            self._pass(data)
            return
        self._unread += data
        if b"\r\n\r\n" in self._unread:
            if not self._opened.done():
                self._opened.set_result(None)
            self.pause()
        elif len(self._unread) > _HEAD_BYTES_MAX:
            self.close()

    def pause_writing(self) -> None:
        if self._downstream is not None:
            self._downstream.pause_reading()

    def resume_writing(self) -> None:
        if self._downstream is not None:
            self._downstream.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if not self._opened.done():
            self._opened.set_exception(UpstreamFailed("The connection broke before the WebSocket was there."))
            self._opened.exception()  # nobody may be waiting
        if not self._ended.done():
            self._ended.set_result(None)

    def _pass(self, data: bytes) -> None:
        assert self._downstream is not None
        self.segments += 1
        self.size += len(data)
        if self._dropping is not None:
            data = self._dropping.filtered(data)
            if self._dropping.done:
                self._dropping = None
        if data:
            self._downstream.write(data)


class _FirstMessage:
    """Takes the first message out of a server's frames if it contains a text."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._raw = b""
        self._message = b""
        self._frames = b""
        self.done = False

    def filtered(self, data: bytes) -> bytes:
        """What is to be passed of the bytes so far. Frames that make no sense pass as they are."""
        self._raw += data
        passed = b""
        while not self.done:
            try:
                read = _frame(self._raw)
            except ProtocolError:
                self.done = True
                break
            if read is None:
                self.done = len(self._frames) + len(self._raw) > _FIRST_BYTES_MAX
                if self.done:
                    break
                return passed
            frame, size = read
            raw, self._raw = self._raw[:size], self._raw[size:]
            if frame.opcode not in (Opcode.TEXT, Opcode.CONT):
                passed += raw
                continue
            self._message += bytes(frame.data)
            self._frames += raw
            self.done = frame.fin
        return passed + (b"" if self._text in self._message else self._frames) + self._raw


def _frame(raw: bytes) -> tuple[Frame, int] | None:
    """The first frame of a server's bytes and its size, once it is whole."""
    reader = StreamReader()
    reader.feed_data(raw)
    parsing = Frame.parse(reader.read_exact, mask=False)
    try:
        next(parsing)
    except StopIteration as parsed:
        frame: Frame = parsed.value
        return frame, len(raw) - len(reader.buffer)
    return None


async def open_websocket(
    endpoint: Endpoint,
    target: bytes,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    fixed: bytes,
    instance: str,
    timeout_s: float,
) -> UpstreamSocket:
    """Connect and shake hands, without any extension, so that the frames of both sides fit each other.

    `headers` are the client's (names in lower case): its own handshake and credentials are left out. Raises Draining,
    RouteNotFound, UpstreamFailed or UpstreamTimeout.
    """
    loop = asyncio.get_running_loop()
    key = base64.b64encode(os.urandom(16)).decode()
    upstream = UpstreamSocket(loop, key)
    lines = [b"GET %b HTTP/1.1\r\n" % target, fixed]
    lines += [b"%b: %b\r\n" % each for each in passed_on(headers)]
    lines.append(b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n")
    lines.append(b"Sec-WebSocket-Key: %b\r\n\r\n" % key.encode())
    try:
        async with asyncio.timeout(timeout_s):
            await _connect(loop, endpoint, upstream)
            upstream.write(b"".join(lines))
            await upstream.opened(instance)
    except TimeoutError as error:
        upstream.close()
        raise UpstreamTimeout(f"The instance {instance} took no WebSocket within {timeout_s:g} s.") from error
    except BaseException:
        upstream.close()
        raise
    return upstream


def passed_on(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers of a handshake (names in lower case) that are for the upstream too."""
    return [each for each in end_to_end(headers) if each[0] not in _OURS and not each[0].startswith(b"sec-websocket-")]


async def _connect(loop: asyncio.AbstractEventLoop, endpoint: Endpoint, upstream: UpstreamSocket) -> None:
    """Raises UpstreamFailed."""
    try:
        await loop.create_connection(lambda: upstream, *endpoint)
    except OSError as error:
        raise UpstreamFailed("No connection is taken.", may_have_run=False) from error
