"""The worker's side of a forkserver: keeps one alive, has it fork hosts, and hears of their ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from modelpool.home import open_private
from modelpool.messages.engine import (
    Adopt,
    Exited,
    Fork,
    Forked,
    FromForkserver,
    Imported,
    ImportFailed,
    ToForkserver,
)
from modelpool.messages.models import EngineKind
from modelpool.messages.workers import EngineStatus
from modelpool.process_group import ProcessGroup
from modelpool.worker.forked_host import EngineUnavailable, ForkedHost, ForkFailed
from modelpool.worker.spares import Spares
from modelpool.worker.waiting import all_of, cancelled, first_of

log = logging.getLogger(__name__)

_PACKET_MAX = 1 << 16
_FORK_DEADLINE_S = 10.0
_END_DEADLINE_S = 10.0
_LIVED_LONG_S = 60.0
_BACKOFF_FIRST_S = 0.5
_BACKOFF_MAX_S = 30.0
_SPARE = "spare"

IMPORTING = "importing"
READY = "ready"
FAILED = "failed"
MISSING = "missing"


_Answer = tuple[int, asyncio.Future[int | None]]
"""To a Fork: the host's process, and what becomes its exit status."""


@dataclass(frozen=True)
class _Life:
    """One forkserver process, imported and ready."""

    process: Process
    sock: socket.socket


class Forkserver:
    """Keeps a forkserver of one engine kind alive while `run` runs, started at once or at the first fork.

    Hosts live on when it dies: the next one adopts them, so that they end with this worker. `changed` is called
    whenever `status` changed. `missing` says how to install an engine that is not there. `spares`: how many hosts are
    forked ahead.
    """

    def __init__(
        self,
        kind: EngineKind,
        *,
        environment: Mapping[str, str],
        log_path: Path,
        changed: Callable[[], None],
        spares: int = 0,
        lazy: bool = False,
        missing: str = "",
    ) -> None:
        self.kind = kind
        self.status = EngineStatus(state=READY if lazy else IMPORTING)
        self._environment = dict(environment)
        self._log_path = log_path
        self._changed = changed
        self._wanted = asyncio.Event()
        if not lazy:
            self._wanted.set()
        self._serial = 0
        self._pending: dict[str, asyncio.Future[_Answer]] = {}
        self._exits: dict[int, asyncio.Future[int | None]] = {}
        self.spares = Spares(spares, lambda: self._fork(_SPARE))
        # Resolved with a forkserver that is ready, with why there will be none, or with None when one died.
        self._life: asyncio.Future[_Life | EngineUnavailable | None] = asyncio.Future()
        if missing:
            self.status = EngineStatus(state=MISSING, reason=missing)
            self._life.set_result(EngineUnavailable(missing))

    # ------------------------------------------------------------ its life

    async def run(self, living: Callable[[], tuple[int, ...]]) -> None:
        """Start it, and start it again when it dies, until cancelled or until it turns out that it cannot be.

        `living`: the process ids of the hosts that a new one is to adopt, beside the spare ones.
        """
        if self._life.done():
            return
        await self._wanted.wait()
        loop = asyncio.get_running_loop()
        backoff = 0.0
        while True:
            began = loop.time()
            self._set_status(IMPORTING)
            try:
                await self._live((*living(), *self.spares.pids()))
            except EngineUnavailable:
                return
            except OSError as error:
                log.error("the %s forkserver cannot be started: %s", self.kind, error)
            lived = loop.time() - began
            backoff = 0.0 if lived > _LIVED_LONG_S else min(_BACKOFF_MAX_S, max(_BACKOFF_FIRST_S, 2 * backoff))
            log.warning(
                "the %s forkserver ended after %.1f s; the next one starts in %.1f s", self.kind, lived, backoff
            )
            await asyncio.sleep(backoff)

    async def _live(self, living: tuple[int, ...]) -> None:
        """One process from start to end. Raises EngineUnavailable when it says that it cannot import."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        process: Process | None = None
        try:
            try:
                process = await self._spawn(theirs)
            finally:
                theirs.close()
            log.info("the %s forkserver is process %d", self.kind, process.pid)
            if living:
                await _send(ours, Adopt(pids=living))
            reading = asyncio.create_task(self._read(ours, process), name=f"{self.kind} forkserver's messages")
            try:
                await process.wait()
                self._over()
                # What it said last is still in the socket, whose end comes with the last copy of its descriptor.
                await all_of(reading, timeout_s=1.0)
            finally:
                await cancelled(reading)
            if not reading.cancelled() and isinstance(error := reading.exception(), EngineUnavailable):
                raise error
        finally:
            ours.close()
            self._over()
            if process is not None:
                await _end(process)

    async def _spawn(self, theirs: socket.socket) -> Process:
        fd = theirs.fileno()
        command = ("-m", "modelpool.engines.forkserver", "--fd", str(fd), "--engine", self.kind.value)
        with open_private(self._log_path, "ab") as output:
            # A session of its own: Ctrl-C in a terminal is for the worker, which then ends its hosts in order.
            return await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                pass_fds=(fd,),
                env=self._environment,
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _over(self) -> None:
        """This process is of no use any more: those who wait for it wait for the next one."""
        ended, self._life = self._life, asyncio.Future()
        if ended.done() and isinstance(ended.result(), EngineUnavailable):
            self._life = ended
        elif not ended.done():
            ended.set_result(None)

    def _set_status(self, state: str, reason: str = "") -> None:
        self.status = EngineStatus(state=state, reason=reason)
        self._changed()

    # ------------------------------------------------------------ messages

    async def _read(self, sock: socket.socket, process: Process) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                packet = await loop.sock_recv(sock, _PACKET_MAX)
            except ConnectionError:
                return
            if not packet:
                return
            self._take(msgspec.json.decode(packet, type=FromForkserver), sock, process)

    def _take(self, message: FromForkserver, sock: socket.socket, process: Process) -> None:
        match message:
            case Imported(seconds):
                log.info("the %s engine was imported in %.1f s", self.kind, seconds)
                if process.returncode is None:
                    self._life.set_result(_Life(process, sock))
                    self._set_status(READY)
            case ImportFailed(reason, missing):
                log.error("the %s engine: %s", self.kind, reason)
                self._set_status(MISSING if missing else FAILED, reason)
                error = EngineUnavailable(reason)
                self._life.set_result(error)
                raise error
            case Forked(name, pid):
                self._exits[pid] = asyncio.Future()
                if (pending := self._pending.pop(name, None)) is not None and not pending.done():
                    pending.set_result((pid, self._exits[pid]))
            case Exited(pid, status):
                if (exit_ := self._exits.pop(pid, None)) is not None and not exit_.done():
                    exit_.set_result(status)

    # ------------------------------------------------------------ forking

    async def ready(self) -> None:
        """Return once a host can be had. Raises EngineUnavailable."""
        self._wanted.set()
        if not self.spares:
            await self._ready_life()

    async def _ready_life(self) -> _Life:
        while (life := await asyncio.shield(self._life)) is None:
            pass
        if isinstance(life, EngineUnavailable):
            raise EngineUnavailable(str(life))
        return life

    async def fork(self, instance: str) -> ForkedHost:
        """A spare host, else one that is forked as soon as a forkserver is ready.

        The caller owns what it gets, and closes it. Raises EngineUnavailable, ForkFailed.
        """
        self._wanted.set()
        return self.spares.take() or await self._fork(instance)

    async def _fork(self, instance: str) -> ForkedHost:
        """In the next forkserver when one died before it did."""
        while True:
            life = await self._ready_life()
            if (host := await self._fork_in(life, instance)) is not None:
                return host

    async def _fork_in(self, life: _Life, instance: str) -> ForkedHost | None:
        """None: it died meanwhile. A host it may have forked sees that its socket has no other end, and ends."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        host: ForkedHost | None = None
        try:
            try:
                forked = await self._ask(life, instance, theirs, reader)
            finally:
                theirs.close()
            if forked is not None:
                pid, exit_ = forked
                host = ForkedHost(_group(pid), reader, writer, exit_)
            return host
        finally:
            if host is None:
                writer.close()

    async def _ask(
        self, life: _Life, instance: str, theirs: socket.socket, reader: asyncio.StreamReader
    ) -> _Answer | None:
        # With a number, so that the answer to a start that was given up is not taken for the answer to this one.
        self._serial += 1
        name = f"{instance}#{self._serial}"
        pending: asyncio.Future[_Answer] = asyncio.Future()
        self._pending[name] = pending
        ended = asyncio.create_task(life.process.wait())
        # A host says nothing before it is spoken to: what can be read here is the end of a socket nobody took.
        refused = asyncio.create_task(reader.read(1))
        try:
            await _send(life.sock, Fork(instance=name), theirs)
            theirs.close()
            await first_of(pending, ended, refused, timeout_s=_FORK_DEADLINE_S)
            if pending.done():
                return pending.result()
            if refused.done() and not ended.done():
                await all_of(ended, timeout_s=1.0)
                if not ended.done():
                    raise ForkFailed(f"the {self.kind} forkserver cannot fork; {self._log_path} says why")
            if not ended.done():
                log.error("the %s forkserver does not answer; it is ended", self.kind)
                life.process.kill()
            return None
        except OSError:
            return None
        finally:
            self._pending.pop(name, None)
            await cancelled(ended, refused)

    def forget(self, pid: int) -> None:
        """Nobody waits for the exit status of this host any more."""
        self._exits.pop(pid, None)


def _group(pid: int) -> ProcessGroup:
    try:
        return ProcessGroup(pid)
    except ProcessLookupError:
        raise ForkFailed(f"the host {pid} ended as soon as it was forked") from None


async def _send(sock: socket.socket, message: ToForkserver, *descriptors: socket.socket) -> None:
    """Send one packet, with descriptors. Raises OSError when the other side is gone."""
    packet = msgspec.json.encode(message)
    while True:
        try:
            socket.send_fds(sock, [packet], [each.fileno() for each in descriptors])
            return
        except BlockingIOError:
            await _writable(sock)


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    # A descriptor of its own: the loop is reading from the socket's.
    twin = os.dup(sock.fileno())

    def resolve() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(twin, resolve)
    try:
        await ready
    finally:
        loop.remove_writer(twin)
        os.close(twin)


async def _end(process: Process) -> None:
    """Wait for the end of a forkserver whose socket is closed: it kills its hosts first. In the end it is killed."""
    try:
        async with asyncio.timeout(_END_DEADLINE_S):
            await process.wait()
    except TimeoutError:
        log.error("the forkserver %d does not end; it is killed", process.pid)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.wait()
