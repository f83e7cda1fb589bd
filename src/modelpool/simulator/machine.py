"""A simulated worker: takes the controller's orders as a real one does, and needs for them what was measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial

from modelpool.core.events import Report, WorkerReported
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import Effect, Sleep, Start, Stop, Wake
from modelpool.core.placement import GB, HOST
from modelpool.core.pool import Device
from modelpool.simulator.clock import Clock
from modelpool.simulator.engine import Engine
from modelpool.simulator.scenario import ENGINE, ModelCosts, WorkerKind, drawn

S = InstanceState
_ASLEEP = {S.SLEEP_1: 1, S.SLEEP_2: 2}
_LEVELS = {1: S.SLEEP_1, 2: S.SLEEP_2}


class Tally:
    """What was done, by all machines together."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Count anew."""
        self.starts = 0
        self.stops = 0
        self.sleeps = {1: 0, 2: 0}
        self.wakes = {1: 0, 2: 0}
        self.device_s = 0.0
        """Seconds that devices spent with something on them that was awake, or on its way up or down."""


class Machine:
    """`changed` is called with itself whenever there is something to report."""

    def __init__(
        self,
        worker_id: str,
        kind: WorkerKind,
        clock: Clock,
        *,
        draw: random.Random,
        drain_s: float,
        tally: Tally,
        changed: Callable[[Machine], None],
    ) -> None:
        self.worker_id = worker_id
        self.engines: dict[str, Engine] = {}
        self._kind = kind
        self._clock = clock
        self._draw = draw
        self._drain_s = drain_s
        self._tally = tally
        self._changed = changed
        self._counted_at = 0.0

    def report(self) -> WorkerReported:
        reports = tuple(
            Report(
                instance=each.name,
                alias=each.alias,
                key=each.alias,
                state=each.state,
                devices=each.devices,
                memory_bytes=_bytes(each.costs.memory_gb),
                held_bytes=_held(each) if each.state in _ASLEEP else 0,
                host_bytes=self._held_on_host(each),
                weights_bytes=_weights(each),
                capacity=each.costs.capacity,
                levels=(1, 2) if each.costs.sleeps else (),
                slept_s=each.slept_s,
                changed_at=each.changed_at,
            )
            for each in self.engines.values()
        )
        return WorkerReported(
            worker_id=self.worker_id,
            incarnation="1",
            devices=tuple(self._shown()),
            host=self._host(),
            engines={ENGINE: ""},
            reports=reports,
        )

    def obey(self, order: Effect, costs: ModelCosts, alias: str) -> None:
        """An order that was carried out, or is being, changes nothing."""
        engine = self.engines.get(order.instance)
        match order:
            case Start():
                if engine is None:
                    self._start(Engine(order.instance, alias, self.worker_id, order.devices, costs))
            case Stop():
                if engine is not None and not engine.ending:
                    self._stop(engine)
            case Sleep(level=level):
                if engine is not None and engine.state is S.ACTIVE:
                    self._drain(engine, partial(self._sleep, engine, level))
                elif engine is not None and engine.state is S.SLEEP_1 and level == 2:
                    self._sleep(engine, level)
            case Wake():
                if engine is not None and engine.state in _ASLEEP:
                    self._wake(engine)

    def count(self) -> None:
        """Bring the tally up to now."""
        now = self._clock.now
        used = {index for each in self.engines.values() if each.state not in _ASLEEP for index in each.devices}
        self._tally.device_s += len(used) * (now - self._counted_at)
        self._counted_at = now

    def drained(self, engine: Engine) -> None:
        """Nothing is in flight to it any more."""
        if engine.when_drained is not None:
            then, engine.when_drained = engine.when_drained, None
            then()

    def _start(self, engine: Engine) -> None:
        self.count()
        self.engines[engine.name] = engine
        self._tally.starts += 1
        self._move(engine, S.STARTING)
        self._later(engine, drawn(engine.costs.start_s, self._draw), partial(self._move, engine, S.ACTIVE))

    def _stop(self, engine: Engine) -> None:
        engine.ending = True
        self._tally.stops += 1
        if engine.state is S.STARTING:
            self._end(engine)
        elif engine.state is S.ACTIVE or engine.when_drained is not None:
            self._drain(engine, partial(self._ended_soon, engine))
        else:
            self._ended_soon(engine)

    def _ended_soon(self, engine: Engine) -> None:
        self._later(engine, drawn(engine.costs.stop_s, self._draw), partial(self._end, engine))

    def _end(self, engine: Engine) -> None:
        self.count()
        engine.step += 1
        del self.engines[engine.name]
        self._changed(self)

    def _drain(self, engine: Engine, then: Callable[[], None]) -> None:
        """Closed to requests; `then` once those in flight have ended. It opens again where they do not in time."""
        engine.when_drained = then
        self._move(engine, S.DRAINING)
        if not engine.inflight:
            self.drained(engine)
        else:
            self._later(engine, self._drain_s, partial(self._not_drained, engine))

    def _not_drained(self, engine: Engine) -> None:
        if engine.when_drained is None:
            return
        if engine.ending:
            self.drained(engine)
        else:
            engine.when_drained = None
            self._move(engine, S.ACTIVE)

    def _sleep(self, engine: Engine, level: int) -> None:
        self._tally.sleeps[level] += 1
        engine.slept_s = drawn(engine.costs.sleep_s[level - 1], self._draw)
        self._later(engine, engine.slept_s, partial(self._move, engine, _LEVELS[level]))

    def _wake(self, engine: Engine) -> None:
        level = _ASLEEP[engine.state]
        self._tally.wakes[level] += 1
        engine.woken_from = engine.state
        self._move(engine, S.WAKING)
        self._later(engine, drawn(engine.costs.wake_s[level - 1], self._draw), partial(self._move, engine, S.ACTIVE))

    def _move(self, engine: Engine, state: S) -> None:
        self.count()
        engine.state = state
        engine.changed_at = self._clock.now
        self._changed(self)

    def _later(self, engine: Engine, seconds: float, then: Callable[[], None]) -> None:
        """Unless something else was begun with it by then."""
        engine.step += 1
        step = engine.step

        def due() -> None:
            if engine.step == step:
                then()

        self._clock.after(seconds, due)

    def _shown(self) -> Iterator[Device]:
        """Memory of a start is not seen before its end."""
        for index in range(self._kind.devices):
            used = sum(_held(each) for each in self.engines.values() if index in each.devices)
            yield _device(index, "cuda" if self._kind.accelerated else "cpu", self._kind.device_gb, used)

    def _host(self) -> Device | None:
        if self._kind.host_gb is None or not self._kind.accelerated:
            return None
        return _device(HOST, "cpu", self._kind.host_gb, sum(map(self._held_on_host, self.engines.values())))

    def _held_on_host(self, engine: Engine) -> int:
        if not self._kind.accelerated or engine.state is S.STARTING:
            return 0
        return _bytes(engine.costs.held_on_host_gb[_ASLEEP.get(_settled(engine), 0)])


def _held(engine: Engine) -> int:
    state = _settled(engine)
    if state is S.STARTING:
        return 0
    return _bytes(engine.costs.held_gb[_ASLEEP[state] - 1] if state in _ASLEEP else engine.costs.memory_gb)


def _settled(engine: Engine) -> S:
    """What it holds is that of this state."""
    return engine.woken_from if engine.state is S.WAKING else engine.state


def _weights(engine: Engine) -> int:
    _, level_1, level_2 = engine.costs.held_on_host_gb
    return _bytes(max(0.0, level_1 - level_2))


def _device(index: int, kind: str, size_gb: float, used: int) -> Device:
    total = _bytes(size_gb)
    return Device(index=index, kind=kind, total_bytes=total, free_bytes=total - used)


def _bytes(gigabytes: float) -> int:
    return int(gigabytes * GB)
