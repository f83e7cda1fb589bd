"""How long the controller thinks about each thing that happens, with 10,000 models on 1,000 workers in virtual time.

python -m benchmarks.controller

Simulated workers of four devices carry orders out and report; gateways say what they have in flight and who waits;
models come and go, workers die and come back. Each step is timed as the manager's loop makes it, in processor time of
its thread, and so is what the gateways are told after it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from itertools import cycle

from msgspec.structs import replace

from modelpool.core.changes import apply
from modelpool.core.demand import Demand, Seen
from modelpool.core.events import (
    DemandHeard,
    Event,
    GatewayGone,
    ModelRegistered,
    ModelRemoved,
    OrderAnswered,
    Tick,
    WorkerGone,
    WorkerReported,
)
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import Effect, Start
from modelpool.core.pool import Policy, Pool
from modelpool.core.reconcile import next_deadline, reconcile
from modelpool.core.scaling import ScalingPolicy
from modelpool.manager.routing_table import RoutingTable
from modelpool.manager.views import Known, WorkerFacts
from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import Address, InstanceReport, WorkerInfo
from modelpool.process import calm_collector
from modelpool.simulator.clock import Clock
from modelpool.simulator.engine import Engine
from modelpool.simulator.machine import Machine, Tally
from modelpool.simulator.scenario import ModelCosts, WorkerKind

DEVICES = 4
DEVICE_GB = 80.0
SIZES_GB = (30.0, 45.0, 60.0, 75.0)
SLEEPERS = 2
"""On each worker, at the beginning."""
GATEWAYS = 4
IN_USE = 0.2
"""Of the models that are awake, at each gateway."""
REQUESTS_PER_S = 5.0
"""For models that are not awake."""
HEARTBEAT_S = 5.0
HOP_S = 0.003
REPORT_S = 0.025
POLICY = Policy(scaling=ScalingPolicy(idle_sleep_1_s=300.0, idle_sleep_2_s=600.0, idle_unload_s=900.0))
BOUND_S = 0.05
S = InstanceState


class World:
    """Memory is nearly full: on each worker some models are awake, some sleep, and others are unloaded."""

    def __init__(self, models: int, workers: int, seed: int = 1) -> None:
        self.took: dict[str, list[float]] = defaultdict(list)
        self._draw = random.Random(seed)
        self._clock = Clock()
        self._costs = {f"model-{number}": ModelCosts(memory_gb=SIZES_GB[number % 4]) for number in range(models)}
        self._specs = {alias: ModelSpec(alias=alias, fake=True) for alias in self._costs}
        self._facts: dict[str, WorkerFacts] = {}
        self._lives: dict[str, int] = defaultdict(lambda: 1)
        self._reporting: set[str] = set()
        self._tick_at = float("inf")
        self._table = RoutingTable()
        self._in_use: list[dict[str, Seen]] = [{} for _ in range(GATEWAYS)]
        self._waiting: list[set[str]] = [set() for _ in range(GATEWAYS)]
        self._machines = self._filled(workers)
        self._pool = Pool(
            policy=POLICY,
            models={alias: costs.model(alias, number) for number, (alias, costs) in enumerate(self._costs.items())},
            learned={alias: costs.learned() for alias, costs in self._costs.items()},
            demand={alias: Demand(asked_at=-self._draw.uniform(0, 300)) for alias in self._costs},
        )
        for machine in self._machines.values():
            self._pool = apply(self._pool, self._heard(machine), 0.0)

    def _filled(self, workers: int) -> dict[str, Machine]:
        machines: dict[str, Machine] = {}
        aliases = cycle(self._costs)
        left = len(self._costs)
        for number in range(workers):
            machine = self._machine(f"worker-{number}")
            machines[machine.worker_id] = machine
            free_gb = [DEVICE_GB] * DEVICES
            asleep = 0
            while left and asleep < SLEEPERS:
                alias, left = next(aliases), left - 1
                costs = self._costs[alias]
                index = max(range(DEVICES), key=free_gb.__getitem__)
                engine = Engine(alias, alias, machine.worker_id, (index,), costs)
                awake = free_gb[index] >= costs.memory_gb + SLEEPERS
                engine.state = S.ACTIVE if awake else S.SLEEP_1
                free_gb[index] -= costs.memory_gb if awake else costs.held_gb[0]
                asleep += not awake
                machine.engines[alias] = engine
        return machines

    def _machine(self, worker_id: str) -> Machine:
        return Machine(
            worker_id,
            WorkerKind(devices=DEVICES, device_gb=DEVICE_GB),
            self._clock,
            draw=self._draw,
            drain_s=30.0,
            tally=Tally(),
            changed=self._report_soon,
        )

    def run(self, seconds: float) -> None:
        """Until so much virtual time has passed."""
        for number, machine in enumerate(self._machines.values()):
            self._clock.at(HEARTBEAT_S * number / len(self._machines), partial(self._beat, machine))
        for gateway in range(GATEWAYS):
            self._clock.at(gateway / GATEWAYS, partial(self._demand_regularly, gateway))
        self._clock.at(0.0, self._request)
        self._clock.at(1.0, self._come_and_go)
        self._clock.at(seconds / 4, partial(self._lose, next(iter(self._machines.values())), seconds / 8))
        self._clock.at(seconds * 0.9, partial(self._happens, "a gateway is lost", GatewayGone("gateway-0")))
        self._happens("time passes", Tick())
        while self._clock.now < seconds:
            self._clock.step()

    # ------------------------------------------------------------ the manager

    def _happens(self, what: str, event: Event) -> None:
        """One step of the controller, as the manager's loop makes it."""
        now = self._clock.now
        begun = time.thread_time()
        pool = apply(apply(self._pool, event, now), Tick(), now)
        self._pool, effects = reconcile(pool, now)
        due = next_deadline(self._pool)
        self.took[what].append(time.thread_time() - begun)
        for effect in effects:
            self._clock.after(HOP_S, partial(self._order, effect))
        self._publish(now)
        if self._table.behind:
            due = now
        if due is not None and due < self._tick_at:
            self._tick_at = due
            self._clock.at(max(due, now + 0.01), self._tick)

    def _publish(self, now: float) -> None:
        begun = time.thread_time()
        news, self._pool = self._pool.news, replace(self._pool, news=frozenset())
        known = Known(pool=self._pool, specs=self._specs, facts=self._facts, now=now)
        changed, _ = self._table.refresh(known, news)
        self.took["the gateways are told"].append(time.thread_time() - begun)
        for gateway, waiting in enumerate(self._waiting):
            for alias in waiting.intersection(changed):
                if routes := changed[alias].routes:
                    waiting.discard(alias)
                    self._in_use[gateway][alias] = Seen(inflight={routes[0].instance: 1}, requests=1)

    def _tick(self) -> None:
        self._tick_at = float("inf")
        self._happens("time passes", Tick())

    # ------------------------------------------------------------ the workers

    def _order(self, effect: Effect) -> None:
        instance = self._pool.instances.get((effect.worker_id, effect.instance))
        if instance is not None:
            self._machines[effect.worker_id].obey(effect, self._costs[instance.alias], instance.alias)
            if isinstance(effect, Start):
                event = OrderAnswered((effect.worker_id, effect.instance))
                self._clock.after(HOP_S, partial(self._happens, "an order is answered", event))

    def _beat(self, machine: Machine) -> None:
        if self._machines[machine.worker_id] is machine:
            self._happens("a heartbeat", self._heard(machine))
            self._clock.after(HEARTBEAT_S, partial(self._beat, machine))

    def _report_soon(self, machine: Machine) -> None:
        if machine.worker_id not in self._reporting:
            self._reporting.add(machine.worker_id)
            self._clock.after(REPORT_S, partial(self._report, machine))

    def _report(self, machine: Machine) -> None:
        self._reporting.discard(machine.worker_id)
        if self._machines[machine.worker_id] is machine:
            self._happens("a worker reports a change", self._heard(machine))

    def _heard(self, machine: Machine) -> WorkerReported:
        life = str(self._lives[machine.worker_id])
        self._facts[machine.worker_id] = WorkerFacts(
            info=WorkerInfo(worker_id=machine.worker_id, incarnation=life, url=f"http://{machine.worker_id}:7000"),
            reports={
                name: InstanceReport(
                    instance=name,
                    model=self._specs.get(engine.alias, ModelSpec(alias=engine.alias, fake=True)),
                    state=engine.state,
                    address=Address(machine.worker_id, 4000),
                    capacity=64,
                )
                for name, engine in machine.engines.items()
            },
        )
        return replace(machine.report(), incarnation=life)

    def _lose(self, machine: Machine, back_s: float) -> None:
        """It dies, and comes back with nothing."""
        life = str(self._lives[machine.worker_id])
        self._lives[machine.worker_id] += 1
        empty = self._machine(machine.worker_id)
        self._machines[machine.worker_id] = empty
        self._happens("a worker is lost", WorkerGone(machine.worker_id, life, "its process has ended"))
        self._clock.after(back_s, lambda: self._happens("a worker registers", self._heard(empty)))
        self._clock.after(back_s + HEARTBEAT_S, partial(self._beat, empty))
        others = [each for each in self._machines.values() if each is not empty]
        self._clock.after(back_s, partial(self._lose, self._draw.choice(others), back_s))

    # ------------------------------------------------------------ the gateways, and people

    def _demand_regularly(self, gateway: int) -> None:
        """What is in flight changes, and a hundredth of the models that are in use."""
        uses, entries = self._in_use[gateway], self._table.entries
        uses = {alias: seen for alias, seen in uses.items() if self._draw.random() > 0.01 and entries[alias].routes}
        awake = [entry for entry in entries.values() if entry.routes]
        for entry in self._draw.sample(awake, max(0, int(len(awake) * IN_USE) - len(uses))):
            uses[entry.alias] = Seen()
        for alias in uses:
            inflight = {route.instance: self._draw.randint(1, 14) for route in entries[alias].routes}
            uses[alias] = Seen(inflight=inflight, requests=self._draw.randint(0, 20))
        self._in_use[gateway] = uses
        self._demand(gateway, "a gateway reports its demand")
        self._clock.after(1.0, partial(self._demand_regularly, gateway))

    def _demand(self, gateway: int, what: str) -> None:
        waiting = {alias: Seen(waiting=1, requests=1) for alias in self._waiting[gateway]}
        self._happens(what, DemandHeard(f"gateway-{gateway}", {**self._in_use[gateway], **waiting}))

    def _request(self) -> None:
        """For a model that is not awake: its gateway says so at once."""
        self._clock.after(self._draw.expovariate(REQUESTS_PER_S), self._request)
        asleep = [alias for alias, entry in self._table.entries.items() if not entry.routes]
        if asleep:
            gateway = self._draw.randrange(GATEWAYS)
            self._waiting[gateway].add(self._draw.choice(asleep))
            self._demand(gateway, "a request waits for a model")

    def _come_and_go(self) -> None:
        self._clock.after(1.0, self._come_and_go)
        number = len(self._costs)
        alias = f"model-{number}"
        self._costs[alias] = ModelCosts(memory_gb=SIZES_GB[number % 4])
        self._specs[alias] = ModelSpec(alias=alias, fake=True)
        self._happens("a model is registered", ModelRegistered(self._costs[alias].model(alias, number)))
        gone = self._draw.choice(list(self._pool.models))
        for uses, waiting in zip(self._in_use, self._waiting, strict=True):
            uses.pop(gone, None)
            waiting.discard(gone)
        self._happens("a model is removed", ModelRemoved(gone))


def measured(models: int = 10_000, workers: int = 1_000, seconds: float = 60.0) -> Mapping[str, list[float]]:
    """How long the steps took, by what happened."""
    world = World(models, workers)
    world.run(seconds)
    return world.took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of virtual time")
    options = parser.parse_args()
    calm_collector()  # as the manager does
    took = measured(options.models, options.workers, options.seconds)
    print(f"{options.models:,} models on {options.workers:,} workers of {DEVICES} devices; milliseconds a step")
    print(f"{'':30}{'steps':>8}{'p50':>8}{'p99':>8}{'max':>8}")
    for what, steps in took.items():
        steps.sort()
        p50, p99 = (steps[int(len(steps) * share)] * 1e3 for share in (0.5, 0.99))
        print(f"{what:30}{len(steps):>8,}{p50:>8.2f}{p99:>8.2f}{steps[-1] * 1e3:>8.2f}")
    late = [what for what, steps in took.items() if steps[int(len(steps) * 0.99)] > BOUND_S]
    print(f"above {BOUND_S * 1e3:.0f} ms at p99: {', '.join(late) or 'none'}")
    return 1 if late else 0


if __name__ == "__main__":
    raise SystemExit(main())
