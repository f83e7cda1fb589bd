"""How long the controller thinks: one step of it by what happened, with 10,000 models on 1,000 workers.

python -m benchmarks.controller
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

from msgspec.structs import replace

from modelpool.core.demand import Demand, Seen
from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import GB
from modelpool.core.pool import (
    DemandHeard,
    Device,
    Event,
    Model,
    Policy,
    Pool,
    Report,
    Tick,
    WorkerGone,
    WorkerReported,
    apply,
)
from modelpool.core.reconcile import Effect, next_deadline, reconcile

DEVICES = 8
DEVICE = 80 * GB
SIZE = 50 * GB
SIZES = 10
STEPS = 10
POLICY = Policy(heartbeat_timeout_s=1e9)


class World:
    """On each device one model is awake, and none more has room, but on a few; some sleep beside, some are unloaded."""

    def __init__(self, models: int, workers: int) -> None:
        self.now = 0.0
        self.workers = workers
        self.running: list[list[Report]] = [[] for _ in range(workers)]
        self.effects: tuple[Effect, ...] = ()
        self.slowest = 0.0
        aliases = [f"model-{number}" for number in range(models)]
        known = [_model(number, alias) for number, alias in enumerate(aliases)]
        self.pool = Pool(
            policy=POLICY,
            models={each.alias: each for each in known},
            demand=dict.fromkeys(aliases, Demand(asked_at=0.0)),
            wanted_up=frozenset(aliases),
            touched=frozenset(aliases),
        )
        free = iter(aliases)
        for worker in range(workers):
            for device in range(DEVICES if worker >= workers // 100 else DEVICES - 1):
                self.running[worker].append(_report(next(free), InstanceState.ACTIVE, device))
            self.running[worker].append(_report(next(free), InstanceState.SLEEP_1, 0))
        self.awake = [each.alias for here in self.running for each in here if each.state is InstanceState.ACTIVE]
        self.asleep = [each.alias for here in self.running for each in here if each.state is InstanceState.SLEEP_1]
        self.unloaded = list(free)
        for worker in range(workers):
            self.pool = apply(self.pool, self.heartbeat(worker), self.now)
        self.settle()

    def heartbeat(self, worker: int) -> WorkerReported:
        reports = self.running[worker]
        held = [0] * DEVICES
        for each in reports:
            held[each.devices[0]] += each.held_bytes or each.memory_bytes
        devices = (
            Device(index=index, kind="cuda", total_bytes=DEVICE, free_bytes=DEVICE - used)
            for index, used in enumerate(held)
        )
        return WorkerReported(
            worker_id=f"worker-{worker}",
            incarnation="1",
            devices=tuple(devices),
            engines={"fake": ""},
            reports=tuple(reports),
        )

    def happens(self, event: Event) -> float:
        """Seconds that the step took."""
        self.now += 0.01
        begun = time.thread_time()
        self.pool, self.effects = reconcile(apply(self.pool, event, self.now), self.now)
        next_deadline(self.pool)
        return time.thread_time() - begun

    def settle(self) -> list[float]:
        """Until nothing is due: the seconds of each step."""
        took = [self.happens(Tick())]
        while (due := next_deadline(self.pool)) is not None and due <= self.now:
            took.append(self.happens(Tick()))
        return took


def _model(number: int, alias: str) -> Model:
    return Model(alias=alias, key=alias, engine="fake", created=number, memory_bytes=SIZE + number % SIZES)


def _report(alias: str, state: InstanceState, device: int) -> Report:
    return Report(
        instance=alias,
        alias=alias,
        key=alias,
        state=state,
        devices=(device,),
        memory_bytes=SIZE,
        held_bytes=GB if state is InstanceState.SLEEP_1 else 0,
        capacity=64,
        levels=(1, 2),
    )


def asking(*aliases: str) -> DemandHeard:
    return DemandHeard("gateway", {alias: Seen(waiting=1, requests=1) for alias in aliases})


def serving(*aliases: str) -> DemandHeard:
    return DemandHeard("gateway", {alias: Seen(inflight={alias: 20}, requests=5) for alias in aliases})


def measured(models: int = 10_000, workers: int = 1_000, steps: int = STEPS) -> Iterator[tuple[str, list[float]]]:
    """What happened, and how long the steps took."""
    world = World(models, workers)
    yield "nothing, time passed", [world.happens(Tick()) for _ in range(steps)]
    yield "a heartbeat without news", [world.happens(world.heartbeat(number)) for number in range(steps)]
    for count in (100, 1_000):
        yield (
            f"a gateway tells of {count:,} models in use",
            [world.happens(serving(*world.awake[:count])) for _ in range(steps)],
        )
    yield "a request for one that sleeps", [world.happens(asking(each)) for each in world.asleep[:steps]]
    yield "a request for one that is not loaded", [world.happens(asking(each)) for each in world.unloaded[:steps]]
    yield "100 requests for such come at once", [world.happens(asking(*world.unloaded[:100])), *world.settle()]
    gone = [WorkerGone(f"worker-{number}", "1", "it ended") for number in range(steps)]
    yield "a worker is lost", [world.happens(each) for each in gone]
    world.now += POLICY.scaling.idle_sleep_1_s
    yield "all are idle, and are put to sleep", world.settle()
    world.pool = replace(world.pool, touched=frozenset(world.pool.models))
    yield "all of them are looked at", world.settle()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1_000)
    options = parser.parse_args()
    print(f"{options.models:,} models on {options.workers:,} workers of {DEVICES} devices; milliseconds a step")
    for what, took in measured(options.models, options.workers):
        print(f"{what:45} median {statistics.median(took) * 1e3:6.1f}  worst {max(took) * 1e3:6.1f}  of {len(took)}")


if __name__ == "__main__":
    main()
