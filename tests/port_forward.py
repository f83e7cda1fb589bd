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
_BACKLOG = 128


class Forward:
    """Passes connections on to a socket file: those to a port of this machine, or to another socket file (`at`).
    `count`: how many there were.
    """

    def __init__(self, socket_file: Path, at: int | Path = 0) -> None:
        self.count = 0
        self._open: list[socket.socket] = []
        self._passing = threading.Event()
        self._passing.set()
        if isinstance(at, Path):
            self._listener = _listening(at)
        else:
            self._listener = socket.create_server(("127.0.0.1", at), backlog=_BACKLOG)
            self.port: int = self._listener.getsockname()[1]
        accepting = (self._listener, lambda: _connected(socket_file), self._note, self._passing)
        threading.Thread(target=_accept, args=accepting, daemon=True).start()

    def _note(self, *sockets: socket.socket) -> None:
        self.count += 1
        self._open += sockets

    def freeze(self) -> None:
        """Not a byte passes, and nobody is told: what comes waits, connections too."""
        self._passing.clear()

    def thaw(self) -> None:
        self._passing.set()

    def cut(self) -> None:
        """Nothing listens there any more, and what was open is closed."""
        self.thaw()
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


def _listening(socket_file: Path) -> socket.socket:
    socket_file.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(socket_file))
    listener.listen(_BACKLOG)
    return listener


def _connected(socket_file: Path) -> socket.socket:
    there = socket.socket(socket.AF_UNIX)
    there.connect(str(socket_file))
    return there


def _accept(
    listener: socket.socket,
    connect: Callable[[], socket.socket],
    note: Callable[[socket.socket, socket.socket], None],
    passing: threading.Event,
) -> None:
    with suppress(OSError):
        while True:
            here, _ = listener.accept()
            passing.wait()
            try:
                there = connect()
            except OSError:
                here.close()
                continue
            note(here, there)
            for pair in ((here, there), (there, here)):
                threading.Thread(target=_pass, args=(*pair, passing), daemon=True).start()


def _pass(source: socket.socket, target: socket.socket, passing: threading.Event) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            passing.wait()
            target.sendall(piece)
    passing.wait()
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH", b"lo", _IFF_UP))


def main() -> None:
    socket_file, port, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    _bring_loopback_up()
    listener = _listening(socket_file)
    if os.fork():
        os.execvp(command[0], command)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    always = threading.Event()
    always.set()
    _accept(listener, lambda: socket.create_connection(("127.0.0.1", port)), lambda *_: None, always)


if __name__ == "__main__":
    main()
