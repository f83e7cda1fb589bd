"""Where each microsecond of the gateway's CPU goes.

    python -m benchmarks.costs

The gateway runs once as it is, for its CPU in all; and once with a clock around the functions of STAGES. A stage is
the time within its functions but not in each other's, with the clock's own cost taken off; of the system calls the
thread's CPU, since whom they wake may take the core. As the clock also slows what it measures, stages are scaled by the
CPU in all without it over that with it. What they leave is the event loop: polling and reading sockets, the task and
its future.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Coroutine, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gateway import load
from benchmarks.keys import LIMITED
from benchmarks.machine import cpu_seconds
from benchmarks.pace import CHUNKS
from benchmarks.report import USUAL, Load, table
from benchmarks.routers import Running, end_on_sigterm, gateways, upstreams
from modelpool.home import Home

SECONDS = 4.0
_OUT = "MODELPOOL_BENCH_COSTS"
_REST = "event loop: poll, read, task, future"
_COROUTINE = "modelpool.gateway.connection:ClientConnection._serve"

STAGES: dict[str, tuple[str, ...]] = {
    "parse the request, make its object, begin its task": (
        "modelpool.gateway.connection:ClientConnection.data_received",
    ),
    "request id, route, CORS": ("modelpool.gateway.app:GatewayApp.admit",),
    "the key": ("modelpool.gateway.auth:Access.check",),
    "coroutines from the listener to the instance and back": (_COROUTINE,),
    "model and stream of the body": ("modelpool.gateway.inference:model_of",),
    "limits of the key": (
        "modelpool.gateway.limiter:Limiter.admitted",
        "modelpool.gateway.limiter:_Grant.__enter__",
        "modelpool.gateway.limiter:_Grant.__exit__",
        "modelpool.gateway.meter:Meter.begin",
        "modelpool.gateway.meter:Meter.feed",
    ),
    "waiting room": (
        "modelpool.gateway.hold:Room.enter",
        "modelpool.gateway.hold:_Held.__enter__",
        "modelpool.gateway.hold:_Held.__exit__",
    ),
    "choose an instance, lease it": (
        "modelpool.gateway.table:Model.choose",
        "modelpool.gateway.instances:Instance.lease",
        "modelpool.gateway.instances:Lease.__enter__",
        "modelpool.gateway.instances:Lease.__exit__",
    ),
    "encode the request": ("modelpool.gateway.inference:encode_request",),
    "write it to the instance (system call)": ("modelpool.relay.upstream:_Connection.begin",),
    "parse the answer, find its end": ("modelpool.relay.upstream:_Connection.data_received",),
    "pass the answer on": (
        "modelpool.gateway.passing:PassThrough.head",
        "modelpool.gateway.passing:PassThrough.data",
        "modelpool.gateway.passing:PassThrough.finish",
    ),
    "write it to the client (system call)": ("modelpool.gateway.connection:ClientConnection._send",),
    "metrics": (
        "modelpool.gateway.observe.metrics:Metrics.chosen",
        "modelpool.gateway.observe.metrics:Metrics.ended",
    ),
    "record for explain": (
        "modelpool.gateway.observe.recent:Recent.chosen",
        "modelpool.gateway.observe.recent:Recent.ended",
    ),
    "journey: what is recorded, and when": (
        "modelpool.gateway.observe.observers:Observers.begin",
        "modelpool.gateway.observe.journey:Journey.asked",
        "modelpool.gateway.observe.journey:Journey.chose",
        "modelpool.gateway.observe.journey:Journey.sent",
        "modelpool.gateway.observe.journey:Journey.passed",
        "modelpool.gateway.observe.journey:Journey.ended",
    ),
    "end of the request": ("modelpool.gateway.connection:ClientConnection._served",),
}
_SYSTEM_CALLS = frozenset(
    {"modelpool.relay.upstream:_Connection.begin", "modelpool.gateway.connection:ClientConnection._send"}
)
_LONGEST_NS = 200_000
"""Somebody else had the core."""
_now = time.perf_counter_ns


class Timed(msgspec.Struct):
    """All calls of a function."""

    calls: int = 0
    ns: int = 0


class Clock:
    """Times functions by their name. `within` and `around`: what timing a call adds to it, and to who calls it."""

    def __init__(self) -> None:
        self.functions: dict[str, Timed] = {}
        self._inner: list[int] = []
        self.within = self._around = 0
        self._calibrate()

    @property
    def cost_ns(self) -> int:
        """Of all calls."""
        return sum(each.calls for each in self.functions.values()) * (self.within + self._around)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        seen, inner = self.functions.setdefault(name, Timed()), self._inner
        within, around = self.within, self._around
        cpu = time.thread_time_ns if name in _SYSTEM_CALLS else _now

        def call(*args: Any, **named: Any) -> Any:
            inner.append(0)
            begin, cpu_begin = _now(), cpu()
            try:
                return function(*args, **named)
            finally:
                cpu_took, took = cpu() - cpu_begin, _now() - begin
                own = min(cpu_took, took) - inner.pop() - within
                seen.calls += 1
                if own < _LONGEST_NS:
                    seen.ns += own
                if inner:
                    inner[-1] += took + around

        return call

    def stepped(self, name: str, function: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
        """A coroutine function, each step of whose coroutine is timed."""
        send = self.timed(name, lambda coroutine, value: coroutine.send(value))
        throw = self.timed(name, lambda coroutine, error: coroutine.throw(error))

        @types.coroutine
        def steps(coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
            step, value = send, None
            while True:
                try:
                    yielded = step(coroutine, value)
                except StopIteration as stop:
                    return stop.value
                try:
                    step, value = send, (yield yielded)
                except BaseException as error:  # noqa: BLE001 it is the coroutine's
                    step, value = throw, error

        async def run(*args: Any) -> Any:
            return await steps(function(*args))

        return run

    def _calibrate(self) -> None:
        """By the batch that was disturbed the least."""
        calls, batches = 1000, []
        for _ in range(100):
            nothing = self.timed("nothing", lambda: None)
            begin = _now()
            for _ in range(calls):
                nothing()
            batches.append(((_now() - begin) // calls, self.functions.pop("nothing").ns // calls))
        in_all, within = min(batches)
        self.within, self._around = within, in_all - within


def wrap(clock: Clock) -> None:
    """Put the clock around all functions of STAGES, where their modules look them up."""
    for path in (path for paths in STAGES.values() for path in paths):
        holder, attribute, function = found(path)
        timed = clock.stepped if path == _COROUTINE else clock.timed
        setattr(holder, attribute, timed(path, function))


def found(path: str) -> tuple[Any, str, Callable[..., Any]]:
    """Where `module:name` or `module:Class.name` is set, its last name, and what it is."""
    module, _, names = path.partition(":")
    holder: Any = importlib.import_module(module)
    *outer, attribute = names.split(".")
    for name in outer:
        holder = getattr(holder, name)
    return holder, attribute, getattr(holder, attribute)


def instrumented() -> int:
    """The gateway with the clock; writes what it saw to the file that the environment names."""
    from modelpool.gateway.__main__ import main as gateway

    clock = Clock()
    wrap(clock)
    status = gateway()
    Path(os.environ[_OUT]).write_bytes(msgspec.json.encode(Seen(clock.functions, clock.cost_ns / 1e9)))
    return status


class Seen(msgspec.Struct, frozen=True):
    """By the clock, which took `cost_s` for itself."""

    functions: dict[str, Timed]
    cost_s: float


class Costs(msgspec.Struct, frozen=True):
    """Microseconds for each request, by stage."""

    stages: dict[str, float]
    in_all: float


def measure(kind: Load, key: str | None = None) -> Costs:
    with tempfile.TemporaryDirectory(prefix="modelpool-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        home = Home(folder / "home")
        stack.enter_context(upstreams(folder, control=home.control_socket))

        def cpu_of(running: Running) -> tuple[float, int]:
            """Seconds, and for how many requests."""
            before = cpu_seconds(running.processes)
            requests = load(running._replace(key=key or running.key), USUAL[kind], SECONDS, kind).requests
            return cpu_seconds(running.processes) - before, requests

        with gateways(home.path) as running:
            load(running, USUAL[kind], SECONDS / 8, kind)
            cpu, requests = cpu_of(running)
        out = folder / "seen"
        with gateways(home.path, module="benchmarks.costs", environ={_OUT: str(out)}) as running:
            cpu_with_clock, _ = cpu_of(running)
        seen = msgspec.json.decode(out.read_bytes(), type=Seen)
    in_all = cpu / requests * 1e6
    scale = in_all / (cpu_with_clock - seen.cost_s) / 1e3
    stages = {stage: sum(seen.functions[path].ns for path in paths) * scale / 1e6 for stage, paths in STAGES.items()}
    return Costs({**stages, _REST: in_all - sum(stages.values())}, in_all)


def main() -> int:
    if _OUT in os.environ:
        return instrumented()
    end_on_sigterm()
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    columns = {
        "plain request": measure(Load.PLAIN),
        "with limits": measure(Load.PLAIN, LIMITED),
        f"stream of {CHUNKS} chunks": measure(Load.PACED),
    }
    names = [*STAGES, _REST]
    rows = [[name, *(f"{each.stages[name]:.1f}" for each in columns.values())] for name in names]
    rows.append(["in all", *(f"{each.in_all:.0f}" for each in columns.values())])
    print(table(["µs of CPU", *columns], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
