"""The parts of a pool as processes: started, started again when they die, ended; some outlive whoever started them.

Each leads a session of its own, so that an interrupt at the terminal reaches only the parent, which then ends them in
order. The kernel sends a child SIGTERM when its parent is killed, but for those with a `tag`: they have no parent, go
on, and are adopted by the next who comes with that tag.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from modelpool.process import DETACHED, DISMISSED, READY_FD, RUN_ID, Announcement, NotStarted, Ready, StartupError
from modelpool.process_group import ProcessGroup
from modelpool.process_table import with_variable
from modelpool.settings import Settings, to_environ
from modelpool.tcp import LISTEN_FD

READY_DEADLINE_S = 60.0
END_DEADLINE_S = 15.0
RESTART_INITIAL_S = 0.2
RESTART_MAX_S = 5.0
_LOG_BYTES_MAX = 16 << 20

Notice = Callable[[str], None]
"""Told in a sentence what happened to a child."""


def child_environ(settings: Settings, control_url: str) -> dict[str, str]:
    """The environment of every part of a pool: its settings, and where the manager is reached."""
    own = {RUN_ID: settings.run_id, "SPT_NOENV": "1", "PYTHONUNBUFFERED": "1", "MANAGER_URL": control_url}
    return {**os.environ, **to_environ(settings), **own}


class Child:
    """One part of the pool as a process: `python -m modelpool.<part>`.

    `listen` gives the socket that it serves, at each start, for us to close. `tag` makes it outlive us: a name that no
    other process has.
    """

    def __init__(
        self,
        part: str,
        environ: Mapping[str, str],
        log_path: Path,
        notice: Notice,
        *,
        port_variable: str = "",
        listen: Callable[[], socket.socket] | None = None,
        tag: str = "",
    ) -> None:
        self.part = part
        self.log_path = log_path
        self.url = ""
        self._port_variable = port_variable
        self._environ = {**environ, DETACHED: tag} if tag else dict(environ)
        self._listen = listen
        self._tag = tag
        self._notice = notice
        self._group: ProcessGroup | None = None
        self._own: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._group.leader if self._group else None

    def adopt(self, pid: int, url: str) -> None:
        """Take over a process that was left behind under our tag and serves at `url`. Raises ProcessLookupError."""
        self._group = ProcessGroup(pid)
        self.url = url

    async def start(self) -> str:
        """Start and wait until it serves; the URL where. Raises StartupError with its own reason and hint."""
        others = with_variable(DETACHED, self._tag) if self._tag else []
        announcement = await self._started()
        if isinstance(announcement, Ready):
            self.url = announcement.url
            if self._tag:
                self._group = ProcessGroup(announcement.pid)
            if self._port_variable:  # a port that was any free one stays the same through restarts
                self._environ[self._port_variable] = self.url.rsplit(":", 1)[1]
            return self.url
        await self._end_failed(others)
        reason = announcement.reason if announcement else f"it ended before it was ready; see {self.log_path}"
        raise StartupError(f"the {self.part} cannot start: {reason}", announcement.hint if announcement else "")

    async def _started(self) -> Announcement | None:
        """Start, and hear what it says. One with a tag is no child of ours any more by then."""
        started, reader = self._spawn()
        if not self._tag:
            self._own, self._group = started, ProcessGroup(started.pid)
        announcement = await _announcement(reader)
        if self._tag:
            await asyncio.to_thread(started.wait)
        return announcement

    def _spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        """The process that was started, and the pipe on which it is to say that it is ready."""
        with contextlib.ExitStack() as stack:
            environ, inherits = dict(self._environ), []
            if self._listen is not None:
                inherits.append(stack.enter_context(self._listen()).fileno())
                environ[LISTEN_FD] = str(inherits[0])
            reader, writer = os.pipe()
            stack.callback(os.close, writer)
            log = stack.enter_context(_log_file(self.log_path))
            started = subprocess.Popen(
                [sys.executable, "-m", f"modelpool.{self.part}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer, *inherits),
                start_new_session=True,
                env={**environ, READY_FD: str(writer)},
            )
        return started, reader

    async def keep(self) -> None:
        """Start it again whenever it dies, at once, but with a growing pause while it keeps dying; until cancelled, or
        dismissed.
        """
        pause = 0.0
        loop = asyncio.get_running_loop()
        while True:
            since = loop.time()
            status = await self._ended()
            if status == DISMISSED:
                self._notice(f"the {self.part} was drained, and has ended")
                return
            told = "without a parent to tell how" if status is None else _status_text(status)
            self._notice(f"the {self.part} ended ({told}) and is started again; see {self.log_path}")
            if loop.time() - since > RESTART_MAX_S:
                pause = 0.0
            await asyncio.sleep(pause)
            pause = min(RESTART_MAX_S, max(RESTART_INITIAL_S, pause * 2))
            try:
                await self.start()
            except (StartupError, OSError, msgspec.DecodeError) as error:
                self._notice(f"the {self.part} could not be started again: {error}")

    async def _ended(self) -> int | None:
        """Wait for its end; its status, where it is our own."""
        if self._group is not None:
            await self._group.leader_ended()
            self._group.close()
            self._group = None
        return self._own.wait() if self._own else None

    async def end(self) -> None:
        """SIGTERM; SIGKILL to its session when it has not ended in time."""
        group, self._group = self._group, None
        if group is None:
            return
        await ended_in_time(group)
        if self._own is not None:
            self._own.wait()

    async def _end_failed(self, others: list[int]) -> None:
        """End what was started and did not say that it is ready; not the others of its tag, in whose place it comes."""
        if not self._tag:
            await self.end()
            return
        for pid in with_variable(DETACHED, self._tag):
            if pid not in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


async def ended_in_time(group: ProcessGroup) -> None:
    """SIGTERM; SIGKILL to its session when it has not ended in time."""
    group.terminate()
    try:
        async with asyncio.timeout(END_DEADLINE_S):
            await group.leader_ended()
    except TimeoutError:
        group.kill()
        await group.leader_ended()
    group.close()


async def _announcement(reader: int) -> Announcement | None:
    """What a child says on its pipe: it is ready, or why not; None when it ends before."""
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
