"""Plays the worker's part towards a forkserver and its hosts: blocking, with a deadline on every step."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from modelpool.messages.engine import (
    Adopt,
    Drain,
    Drained,
    Exited,
    Fork,
    Forked,
    FromForkserver,
    FromHost,
    HostSpec,
    HostStatus,
    Imported,
    ImportFailed,
    Loaded,
    LoadFailed,
    Probe,
    Shutdown,
    Sleep,
    ToHost,
    Wake,
)
from modelpool.messages.models import EngineKind, ModelSpec

RUN_ID = "MODELPOOL_RUN_ID"
TOKEN = "test-token"

T = TypeVar("T")


class HostEnded(Exception):
    """The host's control socket reached its end."""


class HostDriver:
    """A host and its control socket."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control
        self.phases: list[str] = []
        self.loaded: Loaded | None = None
        self._unread = bytearray()

    @property
    def url(self) -> str:
        assert self.loaded is not None, "not loaded"
        return f"http://127.0.0.1:{self.loaded.port}"

    def send(self, message: ToHost) -> None:
        self.control.sendall(msgspec.json.encode(message) + b"\n")

    def receive(self, timeout_s: float = 10) -> FromHost:
        """The next message. Raises HostEnded, TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while (end := self._unread.find(b"\n")) < 0:
            self.control.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.control.recv(65536)
            except ConnectionError as error:
                raise HostEnded from error
            if not data:
                raise HostEnded
            self._unread += data
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        message: FromHost = msgspec.json.decode(line, type=FromHost)
        return message

    def wait_loaded(self, timeout_s: float = 10) -> Loaded | LoadFailed:
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.receive(deadline - time.monotonic())
            if isinstance(message, LoadFailed):
                return message
            if isinstance(message, Loaded):
                self.loaded = message
                return message
            self.phases.append(getattr(message, "phase", "?"))

    def probe(self, timeout_s: float = 10) -> HostStatus:
        self.send(Probe())
        message = self.receive(timeout_s)
        assert isinstance(message, HostStatus), message
        return message

    def probe_until(self, reached: Callable[[HostStatus], bool], timeout_s: float = 10) -> HostStatus:
        """Probe until the status is as wanted. Raises TimeoutError with the last status seen."""
        deadline = time.monotonic() + timeout_s
        while not reached(status := self.probe(timeout_s)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"last status: {status}")
            select.select([], [], [], 0.01)
        return status

    def sleep(self, level: int, drain_s: float = 5, timeout_s: float = 30) -> FromHost:
        """Order it, after a drain; the answer."""
        self.send(Drain(drain_s))
        answer = self.receive(timeout_s)
        if isinstance(answer, Drained):
            self.send(Sleep(level))
            answer = self.receive(timeout_s)
        return answer

    def wake(self, timeout_s: float = 30) -> FromHost:
        """Order it; the answer."""
        self.send(Wake())
        return self.receive(timeout_s)

    def shutdown(self, drain_s: float = 5) -> None:
        self.send(Shutdown(drain_s=drain_s))


class ForkserverDriver:
    """A forkserver process. On leaving the block its socket is closed, and nothing of its run may be left after it."""

    def __init__(self, engine: EngineKind, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.engine = engine
        self.folder = folder
        self.run_id = f"test-{uuid.uuid4().hex}"
        self.process, self.link = self._start(environment or {})
        self._exits: dict[int, Exited] = {}

    def _start(self, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        module = "modelpool.engines.forkserver"
        single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "SPT_NOENV": "1"}
        with theirs, open(self.folder / "forkserver.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, f"--fd={theirs.fileno()}", f"--engine={self.engine}"],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **single, RUN_ID: self.run_id, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return process, ours

    def receive(self, timeout_s: float = 10) -> FromForkserver:
        """The next message. Raises HostEnded at the end of the forkserver, TimeoutError."""
        self.link.settimeout(timeout_s)
        packet = self.link.recv(65536)
        if not packet:
            raise HostEnded
        message: FromForkserver = msgspec.json.decode(packet, type=FromForkserver)
        return message

    def wait_imported(self, timeout_s: float = 120) -> Imported | ImportFailed:
        message = self.receive(timeout_s)
        assert isinstance(message, Imported | ImportFailed), message
        return message

    def fork(self, instance: str) -> HostDriver:
        """Fork a host that has been told nothing yet."""
        return self.end_fork(self.begin_fork(instance), instance)

    def begin_fork(self, instance: str) -> socket.socket:
        """Ask for a fork; returns our end of the host's control socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self.link, [msgspec.json.encode(Fork(instance=instance))], [theirs.fileno()])
        return ours

    def end_fork(self, control: socket.socket, instance: str) -> HostDriver:
        """Wait for the answer to the oldest fork that was asked for."""
        while not isinstance(message := self.receive(), Forked):
            self._note(message)
        assert message.instance == instance
        return HostDriver(message.pid, control)

    def spec(self, model: ModelSpec, **changes: Any) -> HostSpec:
        spec = HostSpec(
            instance=model.alias,
            model=model,
            model_path=model.model_name,
            token=TOKEN,
            bind="127.0.0.1",
            ports=(0, 0),
            env={},
            cwd=str(self.folder),
            log_path=str(self.folder / f"{model.alias.replace('/', '_')}.log"),
            device_kind="cpu",
            devices=(0,),
            memory_bytes=0,
        )
        return msgspec.structs.replace(spec, **changes)

    def start(self, model: ModelSpec, **changes: Any) -> HostDriver:
        """Fork a host and give it its spec."""
        host = self.fork(model.alias)
        host.send(self.spec(model, **changes))
        return host

    def adopt(self, *pids: int) -> None:
        self.link.send(msgspec.json.encode(Adopt(pids=pids)))

    def wait_exited(self, pid: int, timeout_s: float = 10) -> Exited:
        deadline = time.monotonic() + timeout_s
        while pid not in self._exits:
            self._note(self.receive(max(0.001, deadline - time.monotonic())))
        return self._exits.pop(pid)

    def _note(self, message: FromForkserver) -> None:
        assert isinstance(message, Exited), message
        self._exits[message.pid] = message

    def hang_up(self, timeout_s: float = 10) -> None:
        """Close the link, as the death of a worker does, and wait for the forkserver's end."""
        self.link.close()
        self.process.wait(timeout_s)

    def __enter__(self) -> ForkserverDriver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.link.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        left = wait_for_none(self.run_id)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if kind is None and left:
            raise AssertionError(f"processes left over: {left}")


def processes_of_run(run_id: str) -> dict[int, str]:
    """Every living process whose environment names the run, by id, with its command line."""
    found = {}
    marker = f"{RUN_ID}={run_id}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if marker in (entry / "environ").read_bytes().split(b"\0"):
                    title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(entry.name)] = title.strip()
    return found


def wait_for_none(run_id: str, timeout_s: float = 5) -> dict[int, str]:
    """What is left of a run once it had `timeout_s` to end."""
    deadline = time.monotonic() + timeout_s
    while (left := processes_of_run(run_id)) and time.monotonic() < deadline:
        select.select([], [], [], 0.02)
    return left
