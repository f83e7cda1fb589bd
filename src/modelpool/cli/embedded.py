"""A whole pool on one machine: gateway, manager and worker as children, started again when they die, ended together.

Each child leads a session of its own, so that an interrupt at the terminal reaches only the parent, which then ends
them in order; the kernel sends them SIGTERM when the parent itself is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil

from modelpool.home import Home
from modelpool.process import READY_FD, RUN_ID, Announcement, NotStarted, Ready, StartupError
from modelpool.settings import Settings, to_environ
from modelpool.tcp import LISTEN_FD, listen_shared

READY_DEADLINE_S = 60.0
END_DEADLINE_S = 15.0
RESTART_INITIAL_S = 0.2
RESTART_MAX_S = 5.0
_LOG_BYTES_MAX = 16 << 20

Notice = Callable[[str], None]
"""Told in a sentence what happened to a child."""


class Child:
    """One part of the pool as a process: `python -m modelpool.<part>`."""

    def __init__(
        self,
        part: str,
        environ: Mapping[str, str],
        log_path: Path,
        notice: Notice,
        *,
        port_variable: str = "",
        listen: socket.socket | None = None,
    ) -> None:
        self.part = part
        self.log_path = log_path
        self.url = ""
        self._port_variable = port_variable
        self._environ = dict(environ)
        self._inherits: tuple[int, ...] = ()
        if listen is not None:
            self._inherits = (listen.fileno(),)
            self._environ[LISTEN_FD] = str(listen.fileno())
        self._notice = notice
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> str:
        """Start and wait until it serves; the URL where. Raises StartupError with its own reason and hint."""
        reader, writer = os.pipe()
        try:
            with _log_file(self.log_path) as log:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    f"modelpool.{self.part}",
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(writer, *self._inherits),
                    start_new_session=True,
                    env={**self._environ, READY_FD: str(writer)},
                )
        finally:
            os.close(writer)
        announcement = await _announcement(reader, self._process)
        if isinstance(announcement, Ready):
            self.url = announcement.url
            if self._port_variable:  # a port that was any free one stays the same through restarts
                self._environ[self._port_variable] = self.url.rsplit(":", 1)[1]
            return self.url
        await self._end_process()
        reason = announcement.reason if announcement else f"it ended before it was ready; see {self.log_path}"
        raise StartupError(f"the {self.part} cannot start: {reason}", announcement.hint if announcement else "")

    async def keep(self) -> None:
        """Start it again whenever it dies, with a growing pause while it keeps dying; until cancelled."""
        pause = RESTART_INITIAL_S
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None
            since = loop.time()
            status = await self._process.wait()
            self._notice(f"the {self.part} ended ({_status_text(status)}) and is started again; see {self.log_path}")
            if loop.time() - since > RESTART_MAX_S:
                pause = RESTART_INITIAL_S
            await asyncio.sleep(pause)
            pause = min(RESTART_MAX_S, pause * 2)
            try:
                await self.start()
            except (StartupError, OSError, msgspec.DecodeError) as error:
                self._notice(f"the {self.part} could not be started again: {error}")

    async def end(self) -> None:
        """SIGTERM; SIGKILL to its session when it has not ended in time."""
        await self._end_process()

    async def _end_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)  # `terminate` would reap it behind the loop's back
        try:
            async with asyncio.timeout(END_DEADLINE_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


class EmbeddedPool:
    """The children of one `modelpool up`.

    It holds the gateways' sockets itself: while one of them is started again, who connects waits and is not refused.
    """

    def __init__(self, settings: Settings, home: Home, notice: Notice) -> None:
        self.run_id = settings.run_id
        self._home = home
        control_url = f"unix:{home.control_socket}"
        environ = {
            **os.environ,
            **to_environ(settings),
            RUN_ID: settings.run_id,
            "SPT_NOENV": "1",
            "PYTHONUNBUFFERED": "1",
            "MANAGER_URL": control_url,
        }
        self.manager = Child("manager", environ, home.logs / "manager.log", notice)
        self._sockets = listen_shared(
            settings.gateway.host,
            settings.gateway.port,
            settings.gateway.processes,
            flag="--port",
            variable="SERVE_PORT",
        )
        self.gateways = [
            Child(
                "gateway", environ, home.logs / f"gateway{f'-{number}' if number > 1 else ''}.log", notice, listen=each
            )
            for number, each in enumerate(self._sockets, 1)
        ]
        self.worker = Child("worker", environ, home.logs / "worker.log", notice, port_variable="WORKER_PORT")

    @property
    def url(self) -> str:
        """Where clients reach the pool."""
        return self.gateways[0].url

    async def start(self) -> None:
        """Manager first, then the others, who need its socket. Raises StartupError."""
        await self.manager.start()
        try:
            async with asyncio.TaskGroup() as starting:
                for gateway in self.gateways:
                    starting.create_task(gateway.start())
                starting.create_task(self.worker.start())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None  # one reason is enough, and the other child is ended anyway

    async def keep(self) -> None:
        """Keep all parts running, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for child in (self.manager, *self.gateways, self.worker):
                tasks.create_task(child.keep())

    async def end(self) -> None:
        """End all parts: first who takes requests, last who knows."""
        await asyncio.gather(*(gateway.end() for gateway in self.gateways), self.worker.end())
        await self.manager.end()
        self._home.drop_shared_memory()
        for sock in self._sockets:
            sock.close()


@asynccontextmanager
async def embedded_pool(settings: Settings, home: Home, notice: Notice) -> AsyncIterator[EmbeddedPool]:
    """A pool that serves; on the way out not one of its processes is left."""
    pool = EmbeddedPool(settings, home, notice)
    try:
        await pool.start()
        yield pool
    finally:
        await pool.end()
        sweep(settings.run_id)


def sweep(run_id: str) -> None:
    """SIGKILL whatever of this run is still there, found by the run id in its environment."""
    if not run_id:
        return
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environ = each.environ()
            ours = READY_FD in environ or "MODELPOOL_ENGINES_OF" in environ
            if each.pid != os.getpid() and ours and environ.get(RUN_ID) == run_id:
                each.kill()


async def _announcement(reader: int, process: asyncio.subprocess.Process) -> Announcement | None:
    """What a child says on its pipe: it is ready, or why not; None when it ends or is silent for too long."""
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reader, "rb", buffering=0)
    )
    try:
        async with asyncio.timeout(READY_DEADLINE_S):
            line = await stream.readline()
    except TimeoutError:
        return NotStarted(f"it was not ready within {READY_DEADLINE_S:.0f} s")
    finally:
        transport.close()
    decoder: msgspec.json.Decoder[Announcement] = msgspec.json.Decoder(Announcement)
    return decoder.decode(line) if line else None


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[int]:
    """The child's log, opened for appending; the one before is kept beside it once it is long."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _LOG_BYTES_MAX:
        path.replace(path.with_suffix(".log.1"))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _status_text(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
