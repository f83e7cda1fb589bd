"""The whole controller on machines that really run out of memory, of devices and of their own, in any order of events.

Two workers of two accelerators each. Models want one or both, some are pinned, some preloaded, some sleep, some only
lightly; their settings change. Others take memory of the devices, devices are lost, and reports, orders and their
effects are late.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from modelpool.core.changes import apply
from modelpool.core.demand import Seen
from modelpool.core.events import (
    DemandHeard,
    Event,
    ModelChanged,
    ModelRegistered,
    OrderAnswered,
    OrderRefused,
    Report,
    Tick,
    WorkerReported,
)
from modelpool.core.lifecycle import InstanceState
from modelpool.core.orders import Effect, Sleep, Start, Stop, Wake
from modelpool.core.placement import GB, HOST, Other
from modelpool.core.pool import Device, Key, Model, Pool
from modelpool.core.reconcile import reconcile
from tests.unit import controller

S = InstanceState
POLICY = replace(controller.POLICY, max_replicas=2, swaps_per_minute=1000, backoff_max_s=8)
DEVICE, MACHINE, PROCESS = 10 * GB, 12 * GB, GB
WORKERS = ("v", "w")
_ASLEEP = (S.SLEEP_1, S.SLEEP_2)


@dataclass(frozen=True)
class Size:
    """Of one model, in GB on each of its devices."""

    each: int
    devices: int = 1
    pinned: bool = False
    preload: bool = False
    levels: tuple[int, ...] = (1, 2)

    @property
    def full(self) -> int:
        return self.each * GB

    @property
    def context(self) -> int:
        return self.full // 8

    @property
    def weights(self) -> int:
        return self.full * self.devices // 2


@dataclass
class Host:
    """A process of an engine. `target`: where it is on its way to."""

    alias: str
    size: Size
    devices: tuple[int, ...]
    state: S = S.STARTING
    target: S = S.ACTIVE
    reason: str = ""
    changed_at: float = 0.0

    @property
    def on_device(self) -> int:
        return 0 if self.state is S.FAILED else self.size.context if self.state in _ASLEEP else self.size.full

    @property
    def on_machine(self) -> int:
        return 0 if self.state is S.FAILED else PROCESS + (self.size.weights if self.state is S.SLEEP_1 else 0)


class World:
    def __init__(self, sizes: dict[str, Size]) -> None:
        self.now = 0.0
        self.sizes = sizes
        self.hosts: dict[Key, Host] = {}
        self.others = {(worker, device): 0 for worker in WORKERS for device in (0, 1)}
        self.lost: set[tuple[str, int]] = set()
        # How often others took memory of a worker, all in all, and as its manager knows it.
        self.surprises = dict.fromkeys(WORKERS, 0)
        self.known = dict.fromkeys(WORKERS, 0)
        self.orders: list[tuple[Effect, int]] = []
        self.waiting = dict.fromkeys(sizes, 0)
        self.inflight: dict[Key, int] = {}
        self.pool = Pool(policy=POLICY)
        for alias, size in sizes.items():
            self.happens(
                ModelRegistered(
                    Model(
                        alias=alias,
                        key=alias,
                        engine="vllm",
                        created=0,
                        devices=size.devices,
                        memory_bytes=size.full,
                        pinned=size.pinned,
                        preload=size.preload,
                    )
                )
            )
        for worker in WORKERS:
            self.report(worker)

    # ------------------------------------------------------------ what there is

    def free(self, worker: str, device: int) -> int:
        """Of a device, or of the machine (HOST)."""
        here = [host for (where, _), host in self.hosts.items() if where == worker]
        if device == HOST:
            return MACHINE - sum(host.on_machine for host in here)
        return DEVICE - self.others[worker, device] - sum(host.on_device for host in here if device in host.devices)

    def sound(self, worker: str) -> None:
        """Nobody has taken what is not there."""
        assert self.free(worker, HOST) >= 0, f"too much of {worker}'s own memory: {self.hosts}"
        for device in (0, 1):
            assert self.free(worker, device) >= 0, f"too much of device {device} of {worker}: {self.hosts}"

    # ------------------------------------------------------------ the manager

    def happens(self, event: Event) -> None:
        before = apply(self.pool, event, self.now)
        self.pool, effects = reconcile(before, self.now)
        for effect in effects:
            self.allowed(before, effect)
            if all(effect != order for order, _ in self.orders):  # else it is given again since nobody has obeyed yet
                self.orders.append((effect, self.known[effect.worker_id]))

    def allowed(self, before: Pool, effect: Effect) -> None:
        """Nobody is made to give way who is pinned, who is busy, or who is to be kept."""
        instance = before.instances.get((effect.worker_id, effect.instance))
        if not isinstance(effect, Stop | Sleep) or instance is None or instance.state is not S.ACTIVE:
            return
        if self.sizes[instance.alias].pinned:
            awake = [
                each for each in before.instances.values() if (each.alias, each.state) == (instance.alias, S.ACTIVE)
            ]
            assert len(awake) > 1, f"{effect} leaves less than its minimum"
            assert not effect.reason.startswith("makes room for "), effect
        if effect.reason.startswith("makes room for "):
            wanting = before.demand[effect.reason.removeprefix("makes room for ")].waiting_since
            busy = before.demand[instance.alias].inflight(effect.instance)
            assert not busy or (wanting is not None and self.now - wanting >= POLICY.turn_max_s), effect

    def report(self, worker: str) -> None:
        self.known[worker] = self.surprises[worker]
        devices = tuple(
            Device(
                index=device,
                kind="cuda",
                total_bytes=DEVICE,
                free_bytes=self.free(worker, device),
                lost="GPU is lost" if (worker, device) in self.lost else "",
                others=(Other(1, "train.py", self.others[worker, device]),) if self.others[worker, device] else (),
            )
            for device in (0, 1)
        )
        machine = Device(index=HOST, kind="cpu", total_bytes=MACHINE, free_bytes=self.free(worker, HOST))
        self.happens(
            WorkerReported(
                worker_id=worker,
                incarnation="1",
                devices=devices,
                host=machine,
                engines={"vllm": ""},
                reports=tuple(
                    Report(
                        instance=name,
                        alias=host.alias,
                        key=host.alias,
                        state=host.state,
                        reason=host.reason,
                        devices=host.devices,
                        memory_bytes=host.size.full,
                        held_bytes=0 if host.state is S.STARTING else host.on_device,
                        host_bytes=0 if host.state is S.STARTING else host.on_machine,
                        weights_bytes=host.size.weights,
                        capacity=4,
                        levels=host.size.levels,
                        changed_at=host.changed_at,
                    )
                    for (where, name), host in self.hosts.items()
                    if where == worker
                ),
            )
        )

    def ask(self) -> None:
        """Who waits and can be served is; what is served goes on until `answer`."""
        for alias in self.sizes:
            awake = [key for key, host in self.hosts.items() if host.alias == alias and host.state is S.ACTIVE]
            if awake and self.waiting[alias]:
                self.inflight[awake[0]] = 1
                self.waiting[alias] = 0
        seen = {}
        for alias, waiting in self.waiting.items():
            served = {name: count for (_, name), count in self.inflight.items() if self._alias(name) == alias}
            if waiting or served:
                seen[alias] = Seen(waiting=waiting, inflight=served)
        self.happens(DemandHeard("g", seen))

    @staticmethod
    def _alias(name: str) -> str:
        return name.partition("-r")[0]

    # ------------------------------------------------------------ the workers

    def obey(self, count: int) -> None:
        """Carry out the oldest orders. What a start or a wake takes it takes at once, and it must be there."""
        for _ in range(min(count, len(self.orders))):
            order, known = self.orders[0]
            self._obey(order, known)
            del self.orders[0]
            self.happens(OrderAnswered((order.worker_id, order.instance)))

    def _obey(self, order: Effect, known: int) -> None:
        key = (order.worker_id, order.instance)
        if isinstance(order, Start):
            self._start(order, known)
        elif (host := self.hosts.get(key)) is None:
            return
        elif isinstance(order, Stop):
            if host.state is S.FAILED:
                del self.hosts[key]
            else:
                self._move(host, host.state, S.UNLOADED)
        elif isinstance(order, Sleep) and host.state is host.target:
            self._sleep(host, order, known)
        elif isinstance(order, Wake) and host.state in _ASLEEP and host.target is host.state:
            self._grow(host, order, known, S.WAKING)

    def _start(self, order: Start, known: int) -> None:
        key = (order.worker_id, order.instance)
        before = self.hosts.get(key)
        if before is not None and before.state is not S.FAILED:
            return
        if lost := [device for device in order.devices if (order.worker_id, device) in self.lost]:
            self.happens(OrderRefused(key, f"device {lost[0]} is lost"))
            return
        size = self.sizes[order.alias]
        host = Host(order.alias, size, order.devices, state=S.FAILED)
        self.hosts[key] = host
        self._grow(host, order, known, S.STARTING)

    def _sleep(self, host: Host, order: Sleep, known: int) -> None:
        level = (S.SLEEP_1, S.SLEEP_2)[order.level - 1]
        assert order.level in host.size.levels, f"{order} of {host}"
        if host.state is S.ACTIVE:
            self._move(host, S.DRAINING, level)
        elif (host.state, level) == (S.SLEEP_1, S.SLEEP_2):
            self._grow(host, order, known, S.DRAINING)
            if host.state is S.DRAINING:
                self._move(host, S.SLEEP_2, S.SLEEP_2)

    def _grow(self, host: Host, order: Effect, known: int, state: S) -> None:
        """To a state in which it holds all. Where others took the memory meanwhile it fails, and only then."""
        before = host.state
        self._move(host, state, S.ACTIVE)
        if min(self.free(order.worker_id, device) for device in host.devices) < 0:
            assert self.surprises[order.worker_id] > known, f"{order} of {host}, {before}: {self.hosts}"
            self._move(host, S.FAILED, S.FAILED, "out of memory")
        self.sound(order.worker_id)

    def _move(self, host: Host, state: S, target: S, reason: str = "") -> None:
        host.state, host.target, host.reason = state, target, reason
        self.now += 0.001
        host.changed_at = self.now

    def finish(self) -> None:
        """Whatever is on its way arrives."""
        for key, host in list(self.hosts.items()):
            if host.target is S.UNLOADED:
                del self.hosts[key]
                self.inflight.pop(key, None)
            elif host.state is not host.target and not (host.state is S.DRAINING and key in self.inflight):
                self._move(host, host.target, host.target)
                self.sound(key[0])

    def take(self, worker: str, device: int, gb: int) -> None:
        """Somebody else takes so much, or what there is, or gives all back."""
        free = self.free(worker, device)
        self.others[worker, device] = self.others[worker, device] + min(free, gb * GB) if gb else 0
        self.surprises[worker] += 1

    def change(self, alias: str, number: int) -> None:
        """Its settings, while it runs."""
        before = self.pool.models[alias]
        self.happens(ModelChanged(replace(before, preload=not before.preload, max_replicas=1 + number % 3)))

    def lose(self, worker: str, device: int) -> None:
        self.lost.add((worker, device))
        for (where, _), host in self.hosts.items():
            if where == worker and device in host.devices and host.state is not S.FAILED:
                self._move(host, S.FAILED, S.FAILED, f"device {device} is lost")


sizes = st.builds(
    Size,
    st.integers(1, 10),
    devices=st.sampled_from([1, 1, 2]),
    pinned=st.sampled_from([False, False, False, True]),
    preload=st.sampled_from([False, False, True]),
    levels=st.sampled_from([(), (1,), (1, 2), (1, 2)]),
)
actions = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask", "ask", "obey", "obey", "finish", "report", "report", "wait", "answer", "take", "lose", "change"]
        ),
        st.sampled_from(WORKERS),
        st.integers(0, 1),
        st.integers(0, 5),
    ),
    max_size=80,
)


def played(world: World, script: list[tuple[str, str, int, int]]) -> None:
    aliases = sorted(world.sizes)
    for action, worker, device, number in script:
        world.now += 0.9
        if action == "ask":
            world.waiting[aliases[number % len(aliases)]] += 1
            world.ask()
        elif action == "obey":
            world.obey(number)
        elif action == "finish":
            world.finish()
        elif action == "report":
            world.report(worker)
        elif action == "answer":
            world.inflight.clear()
            world.ask()
        elif action == "take":
            world.take(worker, device, number)
        elif action == "change":
            world.change(aliases[number % len(aliases)], number)
        elif action == "lose" and worker == "w":
            world.lose(worker, device)
        elif action == "wait":
            world.now += 25 * number
            world.report(worker)
            world.happens(Tick())


@settings(max_examples=40, deadline=None)
@given(st.lists(sizes, min_size=2, max_size=4), actions)
def test_nobody_takes_what_is_not_there_and_whoever_waits_is_served_or_told_why(
    models: list[Size], script: list[tuple[str, str, int, int]]
) -> None:
    world = World(dict(zip("abcd", models, strict=False)))
    played(world, script)
    for _ in range(60):
        world.now += 6
        world.obey(100)
        world.finish()
        for worker in WORKERS:
            world.report(worker)
        world.ask()
        world.inflight.clear()
        world.happens(Tick())
    scarce = world.lost or any(world.others.values()) or any(each.pinned for each in models)
    for alias, waiting in world.waiting.items():
        assert not waiting or (scarce and "of " in world.pool.shortages.get(alias, "")), (alias, world.pool.shortages)
