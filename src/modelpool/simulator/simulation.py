"""A pool in virtual time: the controller, the waiting room and the choice of core/, around simulated workers.

Workers do not die here, and nothing fails. The gateway is one process.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import partial

import msgspec

from modelpool.core.admission import Admission, Bounds, State, Ticket
from modelpool.core.availability import is_routed, on_its_way
from modelpool.core.changes import apply
from modelpool.core.demand import Seen
from modelpool.core.events import DemandHeard, Event, ModelRegistered, OrderAnswered, Tick
from modelpool.core.orders import Effect, Sleep, Start, Stop
from modelpool.core.pool import Policy, Pool, instances_of
from modelpool.core.reconcile import next_deadline, reconcile
from modelpool.core.routing.choice import least_loaded
from modelpool.simulator.clock import Clock
from modelpool.simulator.engine import Engine
from modelpool.simulator.machine import Machine, Tally
from modelpool.simulator.scenario import Scenario
from modelpool.simulator.trace import Arrival

DEMAND_INTERVAL_S = 1.0
"""A gateway says what it sees this often, as the real one does."""
HOP_S = 0.003
"""From one part of the pool to another, and what is thought there."""
REPORT_S = 0.025
"""A worker collects what changes for a moment before it reports."""
LEAD_S = 60.0
"""The pool runs for so long before the first request: models are registered, and those that fit are started."""
SWAP = "makes room for "


class Gateway(msgspec.Struct, frozen=True, kw_only=True):
    """Its limits."""

    max_ongoing: int = 1 << 20
    max_wait_s: float = 300.0
    max_waiting: int = 8192
    drain_s: float = 30.0
    """The workers': what a stop or a sleep gives to requests in flight."""


class Served(msgspec.Struct, frozen=True, gc=False):
    """What became of one request. `wait_s`: in the gateway, all of it; `refused`: why."""

    time: float
    model: str
    wait_s: float
    refused: str = ""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Of a whole trace; seconds. `device_s`: that devices were not asleep; `steps`: of the controller."""

    served: tuple[Served, ...]
    seconds: float
    starts: int
    stops: int
    sleeps: dict[int, int]
    wakes: dict[int, int]
    swaps: int
    device_s: float
    steps: int


class Simulation:
    """Use once: `run`. The same seed gives the same outcome."""

    def __init__(
        self,
        scenario: Scenario,
        arrivals: Sequence[Arrival],
        *,
        policy: Policy,
        gateway: Gateway = Gateway(),
        seed: int = 0,
        lead_s: float = LEAD_S,
    ) -> None:
        self._clock = Clock()
        self._scenario = scenario
        self._arrivals = arrivals
        self._gateway = gateway
        self._lead_s = lead_s
        self._draw = random.Random(seed)
        self._tally = Tally()
        self._served: list[Served] = []
        self._swaps = 0
        self._steps = 0
        # The manager. Its clock is ours; no worker is lost, so none need report when nothing changes.
        self._pool = Pool(policy=msgspec.structs.replace(policy, heartbeat_timeout_s=float("inf")))
        self._tick_at = float("inf")
        self._machines = {
            name: Machine(
                name,
                kind,
                self._clock,
                draw=self._draw,
                drain_s=gateway.drain_s,
                tally=self._tally,
                changed=self._report_soon,
            )
            for name, kind in scenario.machines()
        }
        self._reporting: set[str] = set()
        # The gateway.
        bounds = Bounds(tickets=gateway.max_waiting, bytes=1 << 60)
        self._admission = Admission(max_ongoing=gateway.max_ongoing, bounds=bounds)
        self._routes: dict[str, tuple[Engine, ...]] = {}
        self._turns: dict[str, int] = {}
        self._waiting: dict[Ticket, Arrival] = {}
        self._rings_at = float("inf")
        self._told: dict[Engine, int] = {}
        self._silent = True

    def run(self) -> Outcome:
        """Until every request was answered or told why not."""
        for number, alias in enumerate(self._scenario.aliases(self._arrivals)):
            costs = self._scenario.costs(alias)
            self._pool = apply(
                self._pool, ModelRegistered(costs.model(alias, number), costs.learned(), costs.resting), 0.0
            )
        for machine in self._machines.values():
            self._pool = apply(self._pool, machine.report(), 0.0)
        self._happens(Tick())
        self._clock.at(self._lead_s, self._begin)
        while len(self._served) < len(self._arrivals):
            assert self._clock.step(), "a request is forgotten"
        for machine in self._machines.values():
            machine.count()
        return Outcome(
            served=tuple(self._served),
            seconds=self._clock.now - self._lead_s,
            starts=self._tally.starts,
            stops=self._tally.stops,
            sleeps=self._tally.sleeps,
            wakes=self._tally.wakes,
            swaps=self._swaps,
            device_s=self._tally.device_s,
            steps=self._steps,
        )

    def _begin(self) -> None:
        """What was done before the first request does not count."""
        for machine in self._machines.values():
            machine.count()
        self._tally.begin()
        self._swaps = 0
        self._report_demand_regularly()
        self._arrive(0)

    # ------------------------------------------------------------ the manager

    def _happens(self, event: Event) -> None:
        """One step of the controller, as the manager's loop makes it."""
        now = self._clock.now
        self._steps += 1
        pool = apply(self._pool, event, now)
        changed = pool.touched
        self._pool, effects = reconcile(msgspec.structs.replace(pool, news=frozenset()), now)
        for effect in effects:
            self._swaps += isinstance(effect, (Stop, Sleep)) and effect.reason.startswith(SWAP)
            self._clock.after(HOP_S, partial(self._order, effect))
        self._clock.after(HOP_S, partial(self._publish, changed | self._pool.touched))
        due = next_deadline(self._pool)
        if due is not None and due < self._tick_at:
            self._tick_at = due
            self._clock.at(max(due, now + 0.01), self._tick)

    def _tick(self) -> None:
        self._tick_at = float("inf")
        self._happens(Tick())

    def _order(self, effect: Effect) -> None:
        instance = self._pool.instances.get((effect.worker_id, effect.instance))
        if instance is not None:
            self._machines[effect.worker_id].obey(effect, self._scenario.costs(instance.alias), instance.alias)
            if isinstance(effect, Start):
                self._clock.after(HOP_S, partial(self._happens, OrderAnswered((effect.worker_id, effect.instance))))

    def _report_soon(self, machine: Machine) -> None:
        if machine.worker_id not in self._reporting:
            self._reporting.add(machine.worker_id)
            self._clock.after(REPORT_S, partial(self._report, machine))

    def _report(self, machine: Machine) -> None:
        self._reporting.discard(machine.worker_id)
        self._happens(machine.report())

    # ------------------------------------------------------------ the gateway

    def _arrive(self, number: int) -> None:
        arrival = self._arrivals[number]
        if number + 1 < len(self._arrivals):
            self._clock.at(self._lead_s + self._arrivals[number + 1].time, partial(self._arrive, number + 1))
        if self._admission.enter(arrival.model) and self._send(arrival):
            return
        if not self._is_coming(arrival.model):
            self._refuse(arrival, "there is no room for its model")
            return
        ticket = Ticket(
            arrival.model, caller="", priority=0, size=0, deadline=self._clock.now + self._gateway.max_wait_s
        )
        first = not self._admission.waiting_for(arrival.model)
        if refusal := self._admission.join(ticket):
            self._refuse(arrival, refusal)
            return
        self._waiting[ticket] = arrival
        if first:
            self._clock.after(HOP_S, self._report_demand)
        self._arm()

    def _is_coming(self, alias: str) -> bool:
        return bool(self._routes.get(alias)) or on_its_way(self._pool, alias, self._clock.now)

    def _refuse(self, arrival: Arrival, why: str) -> None:
        waited_s = self._clock.now - self._lead_s - arrival.time
        self._served.append(Served(arrival.time, arrival.model, waited_s, refused=why))

    def _send(self, arrival: Arrival) -> bool:
        """To an instance, unless all have as many as they take."""
        alias = arrival.model
        places = [engine for engine in self._routes[alias] if engine.inflight < engine.capacity]
        if not places:
            self._admission.full(alias)
            self._grant(self._admission.done())
            return False
        turn = self._turns[alias] = self._turns.get(alias, -1) + 1
        engine, _ = least_loaded(places, turn)
        engine.take()
        self._clock.after(engine.costs.serves(arrival, self._draw), partial(self._done, engine))
        wait_s = max(0.0, self._clock.now - self._lead_s - arrival.time)
        self._served.append(Served(arrival.time, alias, wait_s))
        return True

    def _done(self, engine: Engine) -> None:
        engine.leave()
        if not engine.inflight:
            self._machines[engine.worker_id].drained(engine)
        if engine in self._routes[engine.alias]:
            self._grant(self._admission.freed(engine.alias))
        self._grant(self._admission.done())

    def _grant(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            if self._send(self._waiting[ticket]):
                del self._waiting[ticket]
            else:
                self._admission.join(ticket)

    def _places(self, alias: str) -> int:
        return sum(max(0, engine.capacity - engine.inflight) for engine in self._routes[alias])

    def _publish(self, aliases: Iterable[str]) -> None:
        """The gateway hears where these models are, and what is not to come any more."""
        for alias in sorted(aliases):
            before = self._routes.get(alias, ())
            routes = tuple(
                engine
                for each in instances_of(self._pool, alias)
                if is_routed(self._pool, each) and (engine := self._machines[each.worker_id].engines.get(each.instance))
            )
            self._routes[alias] = routes
            if routes and not before:
                self._grant(self._admission.available(alias, self._places(alias)))
            elif before and not routes:
                self._admission.unavailable(alias)
            elif self._admission.is_full(alias):
                self._grant(self._admission.freed(alias, self._places(alias)))
        for alias in [each for each in self._admission.wanted if not self._is_coming(each)]:
            for ticket in self._admission.evict(alias):
                self._refuse(self._waiting.pop(ticket), "there is no room for its model")

    def _report_demand_regularly(self) -> None:
        self._report_demand()
        self._clock.after(DEMAND_INTERVAL_S, self._report_demand_regularly)

    def _report_demand(self) -> None:
        seen: dict[str, Seen] = {}
        for alias, engines in self._routes.items():
            requests = sum(each.requests - self._told.get(each, 0) for each in engines)
            inflight = {each.name: each.inflight for each in engines if each.inflight}
            if requests or inflight:
                seen[alias] = Seen(inflight=inflight, requests=requests)
        self._told = {each: each.requests for engines in self._routes.values() for each in engines}
        for alias in self._admission.wanted:
            waiting, said = self._admission.waiting_for(alias), seen.get(alias, Seen())
            if self._routes.get(alias):
                seen[alias] = msgspec.structs.replace(said, queued=waiting)
            else:
                seen[alias] = msgspec.structs.replace(said, waiting=waiting)
        if seen or not self._silent:
            self._silent = not seen
            self._happens(DemandHeard("gateway", seen))

    def _arm(self) -> None:
        due = self._admission.next_deadline
        if due is not None and due < self._rings_at:
            self._rings_at = due
            self._clock.at(due, self._ring)

    def _ring(self) -> None:
        self._rings_at = float("inf")
        for ticket in self._admission.expire(self._clock.now):
            assert ticket.state is State.ENDED
            self._refuse(self._waiting.pop(ticket), "it waited too long")
        self._arm()
