"""What the kernel knows of a client, beyond what its transport says."""

from __future__ import annotations

import asyncio
import fcntl
import select
import socket
import struct
import termios


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Written to the client, and not yet taken by it."""
    unsent = transport.get_write_buffer_size()
    sock = _socket(transport)
    if sock is not None:
        unsent += struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
    return unsent


def has_left(transport: asyncio.Transport) -> bool:
    """Whether the client sends no more, even where that lies behind something that is still unread."""
    sock = _socket(transport)
    if sock is None:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))


def reset(transport: asyncio.Transport) -> None:
    """Abort, and forget what is unsent: the kernel would go on offering it to the client."""
    sock = _socket(transport)
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _socket(transport: asyncio.Transport) -> socket.socket | None:
    """An open one; the transport may be closed, or none of a socket."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    return sock if sock is not None and sock.fileno() >= 0 else None
