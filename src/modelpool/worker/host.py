"""The worker's side of one engine host: its control socket, its process, its end."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import msgspec

from modelpool.messages.engine import (
    Drain,
    Drained,
    FromHost,
    HostSpec,
    HostStatus,
    Loaded,
    LoadFailed,
    Loading,
    Probe,
    Shutdown,
    Sleep,
    SleepFailed,
    SleepRefused,
    Slept,
    ToHost,
    Wake,
    WakeFailed,
    Woken,
)
from modelpool.worker.forked_host import ForkedHost
from modelpool.worker.forkserver import Forkserver
from modelpool.worker.waiting import all_of, cancelled, first_of

log = logging.getLogger(__name__)

# After its process ended: how long what it said last, and its exit status, may take to reach us.
_LAST_WORDS_S = 1.0
# A host that has closed its control socket is about to end.
_SILENT_END_S = 15.0


Change = Drained | Slept | SleepRefused | SleepFailed | Woken | WakeFailed


class LoadRefused(Exception):
    """The host says that it cannot load the model; the text is its reason. `permanent`: nor will the next one."""

    def __init__(self, reason: str, *, permanent: bool) -> None:
        super().__init__(reason)
        self.permanent = permanent


class HostEnded(Exception):
    """The process has ended. `status` as in `os.waitstatus_to_exitcode`, None where nobody could tell."""

    def __init__(self, status: int | None) -> None:
        super().__init__(_ending(status))
        self.status = status


def _ending(status: int | None) -> str:
    if status is None:
        return "ended"
    if status >= 0:
        return f"exit status {status}"
    try:
        name = f" ({signal.Signals(-status).name})"
    except ValueError:
        name = ""
    return f"killed by signal {-status}{name}"


@asynccontextmanager
async def forked_host(forkserver: Forkserver, instance: str) -> AsyncIterator[Host]:
    """A host, as soon as one can be had. On the way out its whole process group is gone.

    Raises EngineUnavailable, ForkFailed.
    """
    forked = await forkserver.fork(instance)
    try:
        host = Host(forked)
        try:
            yield host
        finally:
            await host.close()
    finally:
        forkserver.forget(forked.pid)
        forked.close()


class Host:
    """An engine host. Use `forked_host`.

    `status` is its last answer to a probe; `silence()` how long the oldest unanswered probe has been waiting.
    """

    def __init__(self, forked: ForkedHost) -> None:
        self.pid = forked.pid
        self.status: HostStatus | None = None
        self._forked = forked
        self._group = forked.group
        self._on_phase: Callable[[str], None] = lambda phase: None
        self._loaded: asyncio.Future[Loaded | LoadFailed] = asyncio.Future()
        # (sent at, answer) of the probes under way; answers come in order.
        self._probes: deque[tuple[float, asyncio.Future[HostStatus]]] = deque()
        self._change: asyncio.Future[Change] | None = None
        self._reading = asyncio.create_task(self._read(), name=f"host {self.pid} reading")
        self.ended = asyncio.create_task(self._end(), name=f"host {self.pid} end")
        """Done with the exit status once the process has ended."""

    # ------------------------------------------------------------ what it is told

    async def load(self, spec: HostSpec, on_phase: Callable[[str], None]) -> Loaded:
        """Have it load its model. Raises LoadRefused, HostEnded."""
        self._on_phase = on_phase
        self._send(spec)
        await first_of(self._loaded, self.ended)
        if not self._loaded.done():
            raise HostEnded(self.ended.result())
        if isinstance(answer := self._loaded.result(), LoadFailed):
            raise LoadRefused(answer.reason, permanent=answer.permanent)
        return answer

    def probe(self) -> asyncio.Future[HostStatus]:
        """Ask for its status. The answer never comes when it ends, or stalls."""
        answer: asyncio.Future[HostStatus] = asyncio.Future()
        self._probes.append((asyncio.get_running_loop().time(), answer))
        self._send(Probe())
        return answer

    def silence(self) -> float:
        """For how many seconds the oldest unanswered probe has been waiting; 0 when none is."""
        return asyncio.get_running_loop().time() - self._probes[0][0] if self._probes else 0.0

    def change(self, order: Drain | Sleep | Wake) -> asyncio.Future[Change]:
        """Have it drain, sleep or wake, one order at a time. The answer never comes when it ends, or stalls."""
        self._change = asyncio.Future()
        self._send(order)
        return self._change

    def shut_down(self, drain_s: float) -> None:
        """Let it end after the requests in flight. May be repeated, with less time."""
        self._send(Shutdown(drain_s=drain_s))

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        self._group.kill()

    def _send(self, message: ToHost) -> None:
        # Small messages, one a second: what a stalled host does not read is bounded by the time until it is killed.
        self._forked.writer.write(msgspec.json.encode(message) + b"\n")

    # ------------------------------------------------------------ what it says

    async def _read(self) -> None:
        """Take messages until the host closes its socket."""
        with suppress(ConnectionError):
            while line := await self._forked.reader.readline():
                self._take(msgspec.json.decode(line, type=FromHost))

    def _take(self, message: FromHost) -> None:
        match message:
            case Loading(phase):
                self._on_phase(phase)
            case Loaded() | LoadFailed():
                if not self._loaded.done():
                    self._loaded.set_result(message)
            case HostStatus():
                self.status = message
                _, answer = self._probes.popleft()
                if not answer.done():
                    answer.set_result(message)
            case Drained() | Slept() | SleepRefused() | SleepFailed() | Woken() | WakeFailed():
                if self._change is not None and not self._change.done():
                    self._change.set_result(message)

    async def _end(self) -> int | None:
        ended = asyncio.create_task(self._group.leader_ended())
        try:
            await first_of(ended, self._reading)
            if not ended.done():
                await all_of(ended, timeout_s=_SILENT_END_S)
                if not ended.done():
                    log.error("host %d broke off its control socket and lives on; it is killed", self.pid)
                    self._group.kill()
                    await ended
            # Its children may hold the socket open, and its forkserver may be stopped: neither is waited for long.
            await all_of(self._reading, self._forked.exit, timeout_s=_LAST_WORDS_S)
            return self._forked.exit.result() if self._forked.exit.done() else None
        finally:
            await cancelled(ended)

    async def close(self) -> None:
        """Kill what still lives of it, and return once it is gone."""
        self._group.kill()
        await cancelled(self._reading, self.ended)
        await self._group.end()
        for task in (self._reading, self.ended):
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("host %d: its messages cannot be read", self.pid, exc_info=error)
