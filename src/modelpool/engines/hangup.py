"""Notice that the other side of a socket is gone while this thread is busy and no loop runs."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_hangup(link: socket.socket, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` as soon as the other side of `link` is gone, and once at the start of the block if it is already.

    For the minutes in which a process imports or loads: the kernel signals every change of the socket (SIGIO), and
    Python runs the handler between two instructions of the main thread. What arrives is left to be read.
    """

    def check(*_: object) -> None:
        if hung_up(link):
            act()

    before = signal.signal(signal.SIGIO, check)
    flags = fcntl.fcntl(link, fcntl.F_GETFL)
    fcntl.fcntl(link, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(link, fcntl.F_SETFL, flags | os.O_ASYNC)
    try:
        check()
        yield
    finally:
        fcntl.fcntl(link, fcntl.F_SETFL, flags)
        signal.signal(signal.SIGIO, before)


def hung_up(link: socket.socket) -> bool:
    """Whether the other side is gone. What it sent before may still lie there unread."""
    poll = select.poll()
    poll.register(link, select.POLLRDHUP)
    return bool(poll.poll(0))
