"""The parent that hosts are forked from: `python -m modelpool.engines.forkserver --fd N --engine vllm|fake`.

It imports an engine once, stays alone in its process (one thread, no event loop, no device context, so that a fork is
safe), and forks on request. Its only link to the world is a socket held by the worker; when that closes, it kills every
host that it forked or adopted, and ends. Messages: modelpool.messages.engine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from modelpool import process
from modelpool.engines import host
from modelpool.engines.engine import EngineModule, NotForkable, NotInstalled, engine_module, one_line
from modelpool.engines.hangup import on_hangup
from modelpool.engines.scratch import Scratch
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

logger = logging.getLogger(__name__)

_PACKET_MAX = 1 << 16
_END_DEADLINE_S = 5.0
_PR_SET_CHILD_SUBREAPER = 36


class Link:
    """The worker's socket: packets, of which a Fork carries one descriptor."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, message: FromForkserver) -> None:
        """Send a packet. A worker that is gone is noticed by reading, not here."""
        with suppress(ConnectionError):
            self.sock.send(msgspec.json.encode(message))

    def receive(self) -> tuple[ToForkserver, int | None] | None:
        """One message and the descriptor that came with it, or None when the worker is gone."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.sock, _PACKET_MAX, 1)
        except ConnectionError:
            return None
        if not packet:
            return None
        return msgspec.json.decode(packet, type=ToForkserver), descriptors[0] if descriptors else None

    def close(self) -> None:
        self.sock.close()


class Forkserver:
    """Forks hosts, sees them end, and leaves nothing of them behind.

    `forked` holds the hosts that are children of this process; `adopted` those of an earlier forkserver, by a pidfd
    each, since the number of a process that is not our child may be given to another one at any time. Each host has a
    folder for temporary files, which goes with it however it ends.
    """

    def __init__(self, link: Link, engine: EngineModule) -> None:
        self._link = link
        self._engine = engine
        self._forked: set[int] = set()
        self._scratch = Scratch()
        self._adopted: dict[int, int] = {}
        self._ending = False
        self._poll = select.poll()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Serve until the worker is gone or SIGTERM comes; then nothing that was forked or adopted is alive."""
        self._catch_signals()
        self._poll.register(self._link.sock, select.POLLIN)
        self._poll.register(self._wake_read, select.POLLIN)
        try:
            while not self._ending:
                for fd, _ in self._poll.poll():
                    self._serve_ready(fd)
        finally:
            self._kill_all()
            self._scratch.remove()

    def _serve_ready(self, fd: int) -> None:
        if fd == self._wake_read:
            self._take_signals()
        elif fd == self._link.sock.fileno():
            self._take_message()
        elif (pid := next((pid for pid, pidfd in self._adopted.items() if pidfd == fd), None)) is not None:
            self._release_adopted(pid)

    def _catch_signals(self) -> None:
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, _noted_by_wakeup_fd)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def _take_signals(self) -> None:
        if signal.SIGTERM in os.read(self._wake_read, 4096):
            self._ending = True
        self._reap()

    def _take_message(self) -> None:
        received = self._link.receive()
        match received:
            case None:
                self._ending = True
            case Fork(instance), int(descriptor):
                self._fork(instance, descriptor)
            case Adopt(pids), _:
                for pid in pids:
                    self._adopt(pid)
            case message, _:
                logger.error("a message that cannot be served: %r", message)

    def _fork(self, instance: str, control: int) -> None:
        """Fork a host. Where the machine cannot, the worker sees the end of the host's control socket."""
        try:
            pid = os.fork()
        except OSError:
            logger.exception("cannot fork a host for %s", instance)
            os.close(control)
            return
        if pid == 0:
            self._become_host(control)
        os.close(control)
        self._forked.add(pid)
        self._link.send(Forked(instance=instance, pid=pid))

    def _become_host(self, control: int) -> None:
        """In the child: shed all that is the forkserver's, and never return into its loop."""
        status = 1
        try:
            self._engine.start_survivors()
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._link.close()
            for fd in (self._wake_read, self._wake_write, *self._adopted.values()):
                os.close(fd)
            status = host.main(control, self._engine, self._scratch.of_host(os.getpid()))
        except BaseException:  # noqa: BLE001  the top of a process
            traceback.print_exc()
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _adopt(self, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._link.send(Exited(pid=pid, status=None))
            return
        self._adopted[pid] = pidfd
        self._poll.register(pidfd, select.POLLIN)

    def _release_adopted(self, pid: int) -> None:
        pidfd = self._adopted.pop(pid)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _kill_group(pid)
        self._link.send(Exited(pid=pid, status=None))

    def _reap(self) -> None:
        """Reap all children that ended: hosts, and, since we are a subreaper, what a host left behind.

        A host's group is killed before it is reaped: until then no other process can be given its number.
        """
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            if pid in self._forked:
                _kill_group(pid)
            _, status = os.waitpid(pid, 0)
            if pid in self._forked:
                self._forked.remove(pid)
                self._scratch.remove_host(pid)
                self._link.send(Exited(pid=pid, status=os.waitstatus_to_exitcode(status)))

    def _kill_all(self) -> None:
        for pid in self._forked:
            # The child may not have reached its setsid() yet; then it has no group and no children either.
            os.kill(pid, signal.SIGKILL)
            _kill_group(pid)
        for pid, pidfd in self._adopted.items():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                _kill_group(pid)
        while self._forked:
            pid, _ = os.wait()
            self._forked.discard(pid)
        for pidfd in self._adopted.values():
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            ended.poll(_END_DEADLINE_S * 1000)


def _noted_by_wakeup_fd(_number: int, _frame: object) -> None:
    """Signals are read from the wakeup descriptor; a handler must exist for that."""


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _become_subreaper() -> None:
    """Processes that a killed host leaves behind become our children, so that they are reaped whatever init does."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _threads() -> int:
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1


def _import(engine: EngineModule) -> Imported | ImportFailed:
    began = time.monotonic()
    try:
        engine.preload()
        if (threads := _threads()) != 1:
            raise NotForkable(f"its imports started {threads - 1} threads (is OPENBLAS_NUM_THREADS=1 set?)")
    except NotInstalled as error:
        return ImportFailed(reason=str(error), missing=True)
    except NotForkable as error:
        return ImportFailed(reason=f"The engine cannot be forked: {error}.")
    except Exception as error:  # noqa: BLE001  whatever an import raises, the worker is told
        traceback.print_exc()
        return ImportFailed(reason=f"The engine cannot be imported: {one_line(error)}")
    # What exists now stays: never looked at again by the collector, so its pages stay shared with every child.
    gc.collect()
    gc.freeze()
    return Imported(seconds=time.monotonic() - began)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m modelpool.engines.forkserver")
    parser.add_argument("--fd", type=int, required=True, help="a SOCK_SEQPACKET socket held by the worker")
    parser.add_argument("--engine", type=EngineKind, required=True, help="vllm or fake")
    arguments = parser.parse_args(argv)
    os.environ.pop(process.READY_FD, None)
    process.enter("forkserver")
    os.set_inheritable(arguments.fd, False)
    link = Link(socket.socket(fileno=arguments.fd))
    engine = engine_module(arguments.engine)
    with on_hangup(link.sock, lambda: os._exit(0)):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        outcome = _import(engine)
    link.send(outcome)
    if isinstance(outcome, ImportFailed):
        return 1
    _become_subreaper()
    Forkserver(link, engine).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
