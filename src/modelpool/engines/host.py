"""A process that owns one engine: it loads, serves, answers probes, drains and ends. Forked by the forkserver.

    spec read → environment, folder, log → listening socket → engine loaded → loop: HTTP and control socket → ended

All before the loop happens in a process with one thread, since engines fork their own children while they load.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import signal
import socket
import sys
import tempfile
import traceback
from contextlib import suppress
from multiprocessing import shared_memory
from pathlib import Path
from typing import NoReturn

import setproctitle
import uvloop

from modelpool.engines.control import Control
from modelpool.engines.engine import Engine, EngineModule, LoadError, one_line
from modelpool.engines.hangup import on_hangup
from modelpool.engines.listener import NoFreePort, listen
from modelpool.engines.meter import Meter
from modelpool.engines.residency import Residency
from modelpool.engines.scratch import shared_memory_prefix
from modelpool.engines.server import Server
from modelpool.engines.start_clock import StartClock
from modelpool.messages.engine import (
    Drain,
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
    Wake,
    WakeFailed,
)

logger = logging.getLogger(__name__)

# How long requests in flight may take to be told that their engine died.
_DEATH_NOTICE_S = 1.0


def main(control_fd: int, engine: EngineModule, scratch: Path) -> int:
    """The child's whole life. Returns its exit status: 0 only after a Shutdown.

    `scratch` is to be its folder for temporary files, which its parent removes.
    """
    os.set_inheritable(control_fd, False)
    control = Control(socket.socket(fileno=control_fd))
    setproctitle.setproctitle("modelpool: spare host")
    # At once, since a later forkserver removes the folders of an earlier one in which it finds nobody.
    scratch.mkdir(mode=0o700)
    spec = control.receive_spec()
    if spec is None:
        return 0
    try:
        _enter(spec, scratch)
        listener = listen(spec.bind, spec.ports)
    except (NoFreePort, OSError) as error:
        control.send(LoadFailed(reason=f"The host of {spec.instance} cannot start: {error}."))
        return 1
    _close_in_children(control.sock, listener)
    clock = StartClock()
    loaded = _load(engine, spec, control, clock)
    if loaded is None:
        return 1
    host = Host(spec, control, loaded, clock)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            status = runner.run(host.serve(listener))
    finally:
        loaded.close()
    if host.failure:
        # Once more, since the last line of its log is what a person is shown.
        logger.critical("the engine died: %s", host.failure)
    return status


def _enter(spec: HostSpec, scratch: Path) -> None:
    """Become the host of `spec`: environment, folders, log file, name."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    vars(shared_memory)["_SHM_NAME_PREFIX"] = f"/{shared_memory_prefix(scratch)}"
    os.environ.update(spec.env)
    os.chdir(spec.cwd)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Appending, so that a log file that is copied and truncated goes on at its new end.
    log = os.open(spec.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    os.close(log)
    os.close(null)
    setproctitle.setproctitle(f"modelpool: host {spec.instance}")
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)-7s host %(name)s: %(message)s",
        force=True,
    )


def _close_in_children(*socks: socket.socket) -> None:
    """Keep our sockets out of the engine's processes: held open there, they would hide that this one is dead."""

    def close() -> None:
        for sock in socks:
            sock.close()

    os.register_at_fork(after_in_child=close)


def _load(engine: EngineModule, spec: HostSpec, control: Control, clock: StartClock) -> Engine | None:
    """Load, telling the worker about phases and failure. None when it failed."""

    def phase(name: str) -> None:
        clock.begin(name)
        control.send(Loading(phase=name))

    with on_hangup(control.sock, _end_group):
        try:
            loaded = engine.load(spec, phase)
            clock.end()
            clock.split(loaded.facts.phases)
            clock.begin("app")
            return loaded
        except LoadError as error:
            logger.error("not loaded: %s", error, exc_info=error.__cause__)
            control.send(LoadFailed(reason=str(error), permanent=error.permanent))
        except Exception as error:  # noqa: BLE001  the top of a process: whatever it is, the worker is told
            traceback.print_exc()
            control.send(LoadFailed(reason=one_line(error)))
    return None


def _end_group() -> NoReturn:
    """The worker is gone: end at once, with all our processes."""
    logger.error("the worker is gone")
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("unreachable: this process was in the group")


class Host:
    """The part of a host's life that has a loop.

    Ends by a Shutdown or SIGTERM (status 0) or by the engine's death (status 1), both through a drain whose deadline
    can only come nearer.
    """

    def __init__(self, spec: HostSpec, control: Control, engine: Engine, clock: StartClock) -> None:
        self._spec = spec
        self._control = control
        self._engine = engine
        self._clock = clock
        self._meter: Meter | None = None
        self._ending = asyncio.Event()
        self._deadline = math.inf
        self._drain_timeout: asyncio.Timeout | None = None
        self._changing: asyncio.Task[None] | None = None
        self.failure = ""

    async def serve(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, 0.0)
        try:
            app = await self._engine.start()
        except LoadError as error:
            logger.error("not started: %s", error, exc_info=error.__cause__)
            self._control.send(LoadFailed(reason=str(error), permanent=error.permanent))
            return 1
        meter = self._meter = Meter(app, self._spec.token)
        server = Server(meter)
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve_on(listener), name="http")
            await server.ready.wait()
            self._announce(listener.getsockname()[1])
            others = [
                tasks.create_task(self._talk(meter, tasks), name="control"),
                tasks.create_task(self._watch_engine(), name="engine"),
            ]
            await self._ending.wait()
            await self._drain(meter)
            server.stop.set()
            await serving
            for task in (*others, self._changing):
                if task is not None:
                    task.cancel()
        return 1 if self.failure else 0

    def _announce(self, port: int) -> None:
        facts = self._engine.facts
        self._clock.end()
        self._control.send(
            Loaded(
                port=port,
                capacity=self._spec.capacity or facts.capacity,
                sleep_levels=facts.sleep_levels,
                weights_bytes=facts.weights_bytes,
                phases=self._clock.phases(),
                max_model_len=facts.max_model_len,
                num_gpu_blocks=facts.num_gpu_blocks,
                block_size=facts.block_size,
                max_num_seqs=facts.max_num_seqs,
                max_num_batched_tokens=facts.max_num_batched_tokens,
            )
        )
        logger.info("serving on port %d", port)

    async def _talk(self, meter: Meter, tasks: asyncio.TaskGroup) -> None:
        """Answer the worker until it is gone."""
        residency = Residency(self._engine, meter)
        while (message := await self._control.receive()) is not None:
            match message:
                case Probe():
                    self._control.send(self._report(meter))
                case Drain() | Sleep() | Wake():
                    # Beside this task, which goes on answering probes; the worker gives one such order at a time.
                    self._changing = tasks.create_task(self._change(residency, message), name="residency")
                case Shutdown(drain_s):
                    logger.info("draining for up to %g s, %d in flight", drain_s, meter.inflight)
                    self._end(drain_s)
                case HostSpec():
                    logger.error("a second host_spec; ignored")
        _end_group()

    async def _change(self, residency: Residency, order: Drain | Sleep | Wake) -> None:
        logger.info("%s", order)
        match order:
            case Drain(drain_s):
                answer: FromHost = await residency.drain(drain_s)
            case Sleep(level):
                answer = await residency.sleep(level)
            case Wake():
                answer = await residency.wake()
        logger.info("%s", answer)
        if isinstance(answer, SleepFailed | WakeFailed):
            self.failure = answer.reason
            self._end(0.0)
        self._control.send(answer)

    def _report(self, meter: Meter) -> HostStatus:
        stats = self._engine.stats()
        return HostStatus(
            inflight=meter.inflight,
            requests_total=meter.requests_total,
            ttft_last=meter.ttft.last,
            ttft_avg=meter.ttft.average,
            e2e_last=meter.e2e.last,
            e2e_avg=meter.e2e.average,
            running=stats.running,
            waiting=stats.waiting,
            kv_cache_usage=stats.kv_cache_usage,
            draining=meter.draining or meter.closed,
        )

    async def _watch_engine(self) -> None:
        self.failure = await self._engine.dead()
        logger.critical("the engine died: %s", self.failure)
        self._end(_DEATH_NOTICE_S)

    def _end(self, drain_s: float) -> None:
        """Begin to end, or, asked again, end sooner."""
        self._deadline = min(self._deadline, asyncio.get_running_loop().time() + drain_s)
        if self._meter is not None:
            self._meter.draining = True
        if self._drain_timeout is not None and not self._drain_timeout.expired():
            self._drain_timeout.reschedule(self._deadline)
        self._ending.set()

    async def _drain(self, meter: Meter) -> None:
        meter.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline) as self._drain_timeout:
                await meter.idle()
        self._drain_timeout = None
