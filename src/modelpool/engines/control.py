"""The host's end of its control socket: messages by line, first in a process without a loop, then in one."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

import msgspec

from modelpool.messages.engine import FromHost, HostSpec, ToHost

_READ_MAX = 1 << 16


class Control:
    """Reads and writes one message a line. What was read beyond a line stays for the next call, of either kind."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._unread = bytearray()

    def receive_spec(self) -> HostSpec | None:
        """The first message, before any loop. Blocks; None when the worker is gone."""
        while (line := self._take_line()) is None:
            data = self.sock.recv(_READ_MAX)
            if not data:
                return None
            self._unread += data
        return msgspec.json.decode(line, type=HostSpec)

    async def receive(self) -> ToHost | None:
        """The next message, or None when the worker is gone. The socket is non-blocking from the first call on."""
        loop = asyncio.get_running_loop()
        self.sock.setblocking(False)
        while (line := self._take_line()) is None:
            try:
                data = await loop.sock_recv(self.sock, _READ_MAX)
            except ConnectionError:
                return None
            if not data:
                return None
            self._unread += data
        message: ToHost = msgspec.json.decode(line, type=ToHost)
        return message

    def send(self, message: FromHost) -> None:
        """Send a message. That the worker is gone, or reads nothing any more, is noticed by reading, not here."""
        with suppress(ConnectionError, BlockingIOError):
            self.sock.sendall(msgspec.json.encode(message) + b"\n")

    def _take_line(self) -> bytes | None:
        end = self._unread.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        return line
