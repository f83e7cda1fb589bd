"""Models on one machine under the real controller, in virtual time: orders take as long as they are said to take."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from modelpool.core.demand import Seen
from modelpool.core.events import DemandHeard, Event, ModelRegistered, OrderAnswered, Report, Tick, WorkerReported
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import Effect, Sleep, Start, Stop
from modelpool.core.placement import GB
from modelpool.core.pool import Device, Model, Policy, Pool
from modelpool.core.reconcile import next_deadline, step

S = InstanceState
_LEVELS = {1: S.SLEEP_1, 2: S.SLEEP_2}


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, and which part of a model's memory a sleeper still holds at each level."""

    start_s: float = 2.0
    wake_s: float = 0.2
    sleep_s: float = 0.2
    stop_s: float = 1.0
    held: tuple[float, float] = (0.25, 0.1)


class World:
    """One worker with one device. `steps`: every order that was carried out, as (time, order)."""

    def __init__(
        self,
        policy: Policy,
        models: Iterable[Model],
        *,
        total_gb: float,
        costs: Costs | None = None,
        capacity: int = 10,
    ) -> None:
        self.now = 0.0
        self.pool = Pool(policy=policy)
        self.states: dict[str, S] = {}
        self.inflight: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()
        self.steps: list[tuple[float, Effect]] = []
        self.most_used = 0
        self.costs = costs or Costs()
        self.capacity = capacity
        self.total = int(total_gb * GB)
        self._sizes: dict[str, int] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._leaving: dict[str, Callable[[], None]] = {}
        self._came: Counter[str] = Counter()
        self.when_active: Callable[[str], None] = lambda alias: None
        for model in models:
            self._sizes[model.alias] = model.memory_bytes or 0
            self._happens(ModelRegistered(model))
        self._report()

    # ------------------------------------------------------------ time

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now + seconds, next(self._numbers), act))

    def run(self, until: float) -> None:
        """Let everything happen that is due by then."""
        while (due := self._due()) <= until:
            self.now = max(self.now, due)
            if self._timers and self._timers[0][0] <= self.now:
                heapq.heappop(self._timers)[2]()
            else:
                self._happens(Tick())
        self.now = until

    def _due(self) -> float:
        deadline = next_deadline(self.pool)
        timer = self._timers[0][0] if self._timers else float("inf")
        # As the manager's loop does, which never spins.
        return min(timer, float("inf") if deadline is None else max(deadline, self.now + 0.01))

    # ------------------------------------------------------------ what the clients do

    def active(self, alias: str) -> list[str]:
        """The instances that the gateways have a route to."""
        return [
            name
            for name, state in self.states.items()
            if alias_of(name) == alias and state is S.ACTIVE and self._routed(name)
        ]

    def _routed(self, name: str) -> bool:
        known = self.pool.instances.get(("w", name))
        return known is not None and known.state is S.ACTIVE and not known.stopping

    def begin(self, alias: str, instance: str) -> None:
        self.inflight[instance] += 1
        self._came[alias] += 1
        self.demand()

    def end(self, instance: str) -> None:
        self.inflight[instance] -= 1
        if not self.inflight[instance] and (leave := self._leaving.pop(instance, None)):
            leave()
        self.demand()

    def serve(self, inflight: Mapping[str, int]) -> None:
        """So many are in flight from now on at these instances, and none at others."""
        self.inflight = Counter(inflight)
        for name in [each for each in self._leaving if not self.inflight[each]]:
            self._leaving.pop(name)()
        self.demand()

    def wait(self, alias: str) -> None:
        self.waiting[alias] += 1
        self._came[alias] += 1
        self.demand()

    def asked(self, alias: str) -> None:
        """A request came, and the gateway will say so."""
        self._came[alias] += 1

    def demand(self) -> None:
        """What the gateway says now."""
        seen: dict[str, Seen] = {}
        for alias in self._sizes:
            mine = {name: count for name, count in self.inflight.items() if count and alias_of(name) == alias}
            if mine or self.waiting[alias] or self._came[alias]:
                seen[alias] = Seen(waiting=self.waiting[alias], inflight=mine, requests=self._came[alias])
        self._came.clear()
        self._happens(DemandHeard("g", seen))

    # ------------------------------------------------------------ what the worker does

    def held(self, name: str) -> int:
        part = {S.SLEEP_1: self.costs.held[0], S.SLEEP_2: self.costs.held[1]}.get(self.states[name], 1.0)
        return int(self._sizes[alias_of(name)] * part)

    @property
    def used(self) -> int:
        return sum(map(self.held, self.states))

    def _happens(self, event: Event) -> None:
        self.pool, effects = step(self.pool, event, self.now)
        for effect in effects:
            self.steps.append((self.now, effect))
            self._obey(effect)

    def _obey(self, order: Effect) -> None:
        name = order.instance
        if isinstance(order, Start):
            self._becomes(name, S.STARTING)
            self.after(self.costs.start_s, lambda: self._comes(name))
        elif isinstance(order, Stop):
            self._leaves(name, lambda: self.after(self.costs.stop_s, lambda: self._gone(name)))
        elif isinstance(order, Sleep):
            level = _LEVELS[order.level]
            self._leaves(name, lambda: self.after(self.costs.sleep_s, lambda: self._reaches(name, level)))
        else:
            self._becomes(name, S.WAKING)
            self.after(self.costs.wake_s, lambda: self._comes(name))
        self.after(0.0, lambda: self._answered(name))

    def _answered(self, name: str) -> None:
        self._happens(OrderAnswered(("w", name)))

    def _leaves(self, name: str, then: Callable[[], None]) -> None:
        """Once its requests have ended."""
        if self.states.get(name) is S.ACTIVE:
            self.states[name] = S.DRAINING
        if self.inflight[name]:
            self._leaving[name] = then
        else:
            then()

    def _becomes(self, name: str, state: S) -> None:
        self.states[name] = state
        self.most_used = max(self.most_used, self.used)

    def _comes(self, name: str) -> None:
        if self.states.get(name) in (S.STARTING, S.WAKING):
            self._reaches(name, S.ACTIVE)
            self.when_active(alias_of(name))

    def _reaches(self, name: str, state: S) -> None:
        self._becomes(name, state)
        self._report()

    def _gone(self, name: str) -> None:
        self.states.pop(name, None)
        self._report()

    def _report(self) -> None:
        device = Device(index=0, kind="cuda", total_bytes=self.total, free_bytes=self.total - self.used)
        reports = tuple(
            Report(
                instance=name,
                alias=alias_of(name),
                key=alias_of(name),
                state=state,
                devices=(0,),
                memory_bytes=self._sizes[alias_of(name)],
                held_bytes=self.held(name) if state in (S.SLEEP_1, S.SLEEP_2) else 0,
                capacity=self.capacity,
                levels=(1, 2),
                changed_at=self.now,
            )
            for name, state in self.states.items()
        )
        self._happens(
            WorkerReported(worker_id="w", incarnation="1", devices=(device,), engines={"fake": ""}, reports=reports)
        )


class Client:
    """Asks for one model after another, each as soon as the one before has answered. `waits`: of each, in seconds."""

    def __init__(self, world: World, aliases: Iterator[str], *, service_s: float) -> None:
        self.waits: list[float] = []
        self.asked: list[tuple[float, str]] = []
        self._world = world
        self._aliases = aliases
        self._service_s = service_s
        self.busy = True

    def ask(self) -> None:
        self.busy = False
        if alias := next(self._aliases, None):
            self.busy = True
            self.asked.append((self._world.now, alias))
            if active := self._world.active(alias):
                self._served(alias, active)
            else:
                self._world.wait(alias)

    @property
    def waits_for(self) -> str:
        """The model that it waits for; "" while it is served or has ended."""
        return self.asked[-1][1] if len(self.asked) > len(self.waits) else ""

    def granted(self) -> None:
        alias = self.waits_for
        self._world.waiting[alias] -= 1
        self._served(alias, self._world.active(alias))

    def _served(self, alias: str, active: list[str]) -> None:
        self.waits.append(self._world.now - self.asked[-1][0])
        instance = min(active, key=lambda name: self._world.inflight[name])
        self._world.begin(alias, instance)
        self._world.after(self._service_s, lambda: self._answered(instance))

    def _answered(self, instance: str) -> None:
        self._world.end(instance)
        self.ask()


def alias_of(instance: str) -> str:
    return instance.partition("-r")[0]
