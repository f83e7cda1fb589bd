"""A machine of which one port can be reached, and no other: a network of its own, and a forward into it.

`python -m tests.port_forward SOCKET PORT COMMAND…`, in a network namespace: COMMAND, whose PORT is reached by SOCKET.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
_PR_SET_PDEATHSIG = 1


class Forward:
    """Passes the connections to a port of this machine on to a socket file; `count`: how many there were."""

    def __init__(self, socket_file: Path, port: int = 0) -> None:
        self.count = 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        accepting = (self._listener, lambda: _connected(socket_file), self._note)
        threading.Thread(target=_accept, args=accepting, daemon=True).start()

    def _note(self, *sockets: socket.socket) -> None:
        self.count += 1
        self._open += sockets

    def cut(self) -> None:
        """Nothing listens there any more, and what was open is closed."""
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def inside(socket_file: Path, port: int, command: list[str]) -> list[str]:
    """The command, in a network where nobody reaches it but by the socket file."""
    own = [sys.executable, "-m", "tests.port_forward", str(socket_file), str(port), *command]
    return ["unshare", "--user", "--map-root-user", "--net", *own]


@contextmanager
def forwarded(socket_file: Path) -> Iterator[Forward]:
    forward = Forward(socket_file)
    try:
        yield forward
    finally:
        forward.cut()


def _connected(socket_file: Path) -> socket.socket:
    there = socket.socket(socket.AF_UNIX)
    there.connect(str(socket_file))
    return there


def _accept(
    listener: socket.socket, connect: Callable[[], socket.socket], note: Callable[[socket.socket, socket.socket], None]
) -> None:
    with suppress(OSError):
        while True:
            here, _ = listener.accept()
            try:
                there = connect()
            except OSError:
                here.close()
                continue
            note(here, there)
            for pair in ((here, there), (there, here)):
                threading.Thread(target=_pass, args=pair, daemon=True).start()


def _pass(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH", b"lo", _IFF_UP))


def main() -> None:
    socket_file, port, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    _bring_loopback_up()
    socket_file.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(socket_file))
    listener.listen(128)
    if os.fork():
        os.execvp(command[0], command)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _accept(listener, lambda: socket.create_connection(("127.0.0.1", port)), lambda *_: None)


if __name__ == "__main__":
    main()
