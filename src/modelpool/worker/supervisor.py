"""Owns every instance of this worker: starts, watches and ends their hosts. Decides nothing about what should run.

One task per start of an instance, from STARTING to the moment its memory is given back. The worker never starts an
instance again by itself: that is for the manager to order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from msgspec.structs import replace

from modelpool.core.lifecycle import InstanceState, sleep_level
from modelpool.errors import Conflict, Draining, InstanceNotFound, InvalidBody
from modelpool.messages.engine import HostStatus
from modelpool.messages.models import EngineKind, ModelSpec, for_engine
from modelpool.messages.workers import (
    UNLOADED_LEVEL,
    Address,
    Device,
    EngineStatus,
    GpuInfo,
    InstanceReport,
    InstanceStatus,
    SleepOrder,
    StartOrder,
)
from modelpool.worker.devices import CPU, GB, Devices, Held, Reading, lost_devices
from modelpool.worker.forkserver import Forkserver
from modelpool.worker.instance import Instance
from modelpool.worker.instance_log import InstanceLog
from modelpool.worker.launcher import END_GRACE_S, Launcher
from modelpool.worker.waiting import first_of

log = logging.getLogger(__name__)

_STATUS_DEADLINE_S = 0.5
_ROTATION_INTERVAL_S = 10.0
_MEASURE_INTERVAL_S = 10.0
_NOISE = 0.02
_SERVED = (InstanceState.ACTIVE, InstanceState.DRAINING)
_NO_FIGURES = HostStatus(inflight=0, requests_total=0)


class Supervisor:
    """The instances of one worker. Use `running_supervisor`.

    `changed` is set whenever a report or an engine's status changed; whoever waits for it clears it.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        forkservers: Mapping[EngineKind, Forkserver],
        devices: Devices,
        log_of: Callable[[str], InstanceLog],
        drain_s: float,
        changed: asyncio.Event,
    ) -> None:
        self.changed = changed
        self._launcher = launcher
        self._forkservers = forkservers
        self._devices = devices
        self._log_of = log_of
        self._drain_s = drain_s
        self._instances: dict[str, Instance] = {}
        # Tasks of instances that are forgotten but not gone yet.
        self._leftovers: dict[str, asyncio.Task[None]] = {}
        self._closing = False
        self._tasks: asyncio.TaskGroup | None = None

    # ------------------------------------------------------------ its life

    def attach(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks

    def take_no_more_orders(self) -> None:
        """Refuse starts from now on."""
        self._closing = True

    async def close(self, drain_s: float) -> None:
        """Take no more orders, and end all instances. Returns once none is left."""
        self.take_no_more_orders()
        tasks = {each.task for each in self._instances.values() if each.task is not None} | {*self._leftovers.values()}
        for instance in list(self._instances.values()):
            self._stop(instance, drain_s)
        if tasks:
            _, alive = await asyncio.wait(tasks, timeout=drain_s + END_GRACE_S)
            for task in alive:
                task.cancel()

    async def rotate_logs(self) -> None:
        """Keep the logs of all instances small, until cancelled."""
        while True:
            await asyncio.sleep(_ROTATION_INTERVAL_S)
            for name in list(self._instances):
                await asyncio.to_thread(self._log_of(name).rotate)

    async def measure(self) -> None:
        """Know what awake instances hold, which may grow while they work, until cancelled."""
        while True:
            await asyncio.sleep(_MEASURE_INTERVAL_S)
            for instance in list(self._instances.values()):
                if instance.state is InstanceState.ACTIVE and instance.host is not None:
                    held = await asyncio.to_thread(self._devices.held, instance.host.pid)
                    if instance.state is InstanceState.ACTIVE and _differ(held, instance.held):
                        instance.held = held

    async def run_forkserver(self, kind: EngineKind) -> None:
        """Keep the forkserver of this kind alive, until cancelled. A new one adopts the hosts of the one before."""
        await self._forkservers[kind].run(
            lambda: tuple(each.host.pid for each in self._instances.values() if each.host and each.model.engine is kind)
        )

    async def keep_spares(self, kind: EngineKind) -> None:
        """Keep hosts of this kind waiting for a model, until cancelled."""
        await self._forkservers[kind].spares.keep()

    # ------------------------------------------------------------ what is asked of it

    def engines(self) -> dict[str, EngineStatus]:
        return {kind.value: forkserver.status for kind, forkserver in self._forkservers.items()}

    async def reading(self) -> Reading:
        """The devices as they are now. What runs on one that is lost fails with that reason."""
        leaders = [each.host.pid for each in self._instances.values() if each.host is not None]
        reading = await asyncio.to_thread(self._devices.read, leaders)
        lost = lost_devices(reading.devices)
        for instance in list(self._instances.values()):
            reasons = [lost[index] for index in instance.devices if index in lost]
            if reasons and not instance.over:
                self._give_up(instance, reasons[0])
        return reading

    def _give_up(self, instance: Instance, reason: str) -> None:
        """FAILED at once, whatever its host is doing."""
        instance.fail(reason)
        if instance.host is not None:
            instance.host.kill()
        elif instance.task is not None:
            instance.task.cancel()

    def reports(self) -> tuple[InstanceReport, ...]:
        return tuple(instance.report() for instance in self._instances.values())

    def report(self, name: str) -> InstanceReport:
        """Raises InstanceNotFound."""
        return self._require(name).report()

    def has(self, name: str) -> bool:
        return name in self._instances

    def log(self, name: str) -> InstanceLog:
        """The log of an instance that runs or ever ran here. Raises InstanceNotFound."""
        log_ = self._log_of(name)
        if name not in self._instances and not log_.exists():
            raise InstanceNotFound(f"No instance `{name}` ever ran on this worker.", param="instance")
        return log_

    def upstream(self, name: str) -> Address:
        """Where an instance answers this process. Raises InstanceNotFound, or Draining while it does not answer."""
        instance = self._require(name)
        if instance.state not in _SERVED or instance.upstream is None:
            reason = f": {instance.reason}" if instance.reason else ""
            raise Draining(
                f"The instance `{name}` is {instance.state}{reason}.", code="instance_not_ready", retry_after=1
            )
        return instance.upstream

    def upstreams(self) -> tuple[Address, ...]:
        """Where all instances that answer do so."""
        return tuple(each.upstream for each in self._instances.values() if each.upstream and each.state in _SERVED)

    async def status(self, name: str) -> InstanceStatus:
        """The host's own figures, the last known ones when it does not answer at once. Raises InstanceNotFound."""
        instance = self._require(name)
        figures = await self._figures(instance)
        held = await asyncio.to_thread(self._devices.held, instance.host.pid) if instance.host else Held(0, 0)
        loaded = instance.loaded
        return InstanceStatus(
            instance=name,
            alias=instance.model.alias,
            state=instance.state,
            sleep_level_value=sleep_level(instance.state),
            inflight_requests=figures.inflight,
            capacity=loaded.capacity if loaded else 0,
            gpu_info=_gpu_info((await self.reading()).devices, instance.devices),
            ttft_last=figures.ttft_last,
            ttft_avg=figures.ttft_avg,
            e2e_last=figures.e2e_last,
            e2e_avg=figures.e2e_avg,
            requests_total=figures.requests_total,
            running=figures.running,
            waiting=figures.waiting,
            kv_cache_usage=figures.kv_cache_usage,
            num_gpu_blocks=loaded.num_gpu_blocks if loaded else None,
            block_size=loaded.block_size if loaded else None,
            max_num_seqs=loaded.max_num_seqs if loaded else None,
            max_num_batched_tokens=loaded.max_num_batched_tokens if loaded else None,
            max_model_len=loaded.max_model_len if loaded else None,
            memory_bytes=held.host_bytes,
            device_bytes=held.device_bytes,
            pid=instance.host.pid if instance.host else None,
            progress=instance.progress,
            reason=instance.reason,
            sleep_levels=loaded.sleep_levels if loaded else (),
            last_sleep=instance.last_sleep,
            last_wake=instance.last_wake,
            phases=instance.phases,
        )

    async def _figures(self, instance: Instance) -> HostStatus:
        host = instance.host
        if host is not None and instance.loaded is not None:
            await first_of(host.probe(), host.ended, timeout_s=_STATUS_DEADLINE_S)
        return (host.status if host is not None else instance.last_status) or _NO_FIGURES

    def _require(self, name: str) -> Instance:
        if (instance := self._instances.get(name)) is None:
            raise InstanceNotFound(f"There is no instance `{name}` on this worker.", param="instance")
        return instance

    # ------------------------------------------------------------ orders

    async def start(self, order: StartOrder) -> InstanceReport:
        """Start an instance, or change nothing when the same one runs. Returns at once.

        Raises Conflict when it runs with another model or is being stopped, or its device is lost, InvalidBody for
        devices that are not there, Draining when this worker ends.
        """
        name = order.instance or order.model.alias
        devices, memory_bytes = _share(order, (await self.reading()).devices)
        if self._closing:
            raise Draining("This worker ends.", code="worker_draining", retry_after=5)
        before = self._instances.get(name)
        if before is not None and not before.over:
            return _running(before, order.model)
        instance = Instance(
            name,
            order.model,
            devices=devices,
            memory_bytes=memory_bytes,
            changed=self.changed.set,
            after=before.task if before else self._leftovers.pop(name, None),
        )
        assert self._tasks is not None
        self._instances[name] = instance
        instance.task = self._tasks.create_task(self._live(instance), name=f"instance {name}")
        instance.task.add_done_callback(lambda _: self._ended(instance))
        self.changed.set()
        log.info("%s starts, engine %s", name, order.model.engine)
        return instance.report()

    def stop(self, name: str) -> InstanceReport:
        """End an instance, after its requests in flight. Returns at once. Raises InstanceNotFound."""
        instance = self._require(name)
        self._stop(instance, self._drain_s)
        return instance.report()

    def sleep(self, name: str, order: SleepOrder) -> InstanceReport:
        """Put an instance to sleep, after its requests in flight; at level 3, end it. Returns at once.

        No change where it sleeps at that level already, or is on its way there. Raises InstanceNotFound, Conflict
        where its state or its deeper level stands against it, InvalidBody for a level that its engine does not have.
        """
        instance = self._require(name)
        drain_s = self._drain_s if order.drain_s is None else order.drain_s
        if order.level == UNLOADED_LEVEL:
            self._stop(instance, drain_s)
        elif order.level != instance.level or instance.over or instance.stop_asked.is_set():
            _check_level(instance, order.level)
            instance.ask_to_sleep(replace(order, drain_s=drain_s))
        return instance.report()

    def wake(self, name: str) -> InstanceReport:
        """Wake an instance; no change where it is awake or wakes. At once. Raises InstanceNotFound, Conflict."""
        instance = self._require(name)
        waking = instance.state is InstanceState.WAKING and not instance.stop_asked.is_set()
        if not waking and not instance.settled:
            raise _busy(instance)
        if instance.level:
            instance.ask_to_wake()
        return instance.report()

    def _stop(self, instance: Instance, drain_s: float) -> None:
        assert instance.task is not None
        if instance.over:
            if instance.state is not InstanceState.ABSENT:
                instance.move(InstanceState.ABSENT)
            self._forget(instance)
        elif not instance.stop_asked.is_set():
            if instance.state is InstanceState.STARTING:
                instance.task.cancel()
            instance.ask_to_end(drain_s)
        elif drain_s < instance.drain_s and instance.host is not None:
            instance.host.shut_down(drain_s)

    def _forget(self, instance: Instance) -> None:
        if self._instances.get(instance.name) is instance:
            del self._instances[instance.name]
        if instance.task is not None and not instance.task.done():
            self._leftovers[instance.name] = instance.task
            instance.task.add_done_callback(lambda task: self._discard_leftover(instance.name, task))
        self.changed.set()

    def _discard_leftover(self, name: str, task: asyncio.Task[None]) -> None:
        if self._leftovers.get(name) is task:
            del self._leftovers[name]

    # ------------------------------------------------------------ the life of one instance

    async def _live(self, instance: Instance) -> None:
        """From STARTING until nothing of the host is left."""
        try:
            if instance.after is not None:
                await asyncio.wait({instance.after})
            await self._launcher.run(instance)
        except asyncio.CancelledError:
            if not instance.stop_asked.is_set():
                raise
        except Exception:
            log.exception("%s: its supervision failed", instance.name)
            instance.fail("the worker made a mistake; its log says which")

    def _ended(self, instance: Instance) -> None:
        """Its task is done, perhaps before its first step: it is FAILED, or gone because it was stopped."""
        if instance.stop_asked.is_set() and instance.state is not InstanceState.ABSENT:
            if instance.state is not InstanceState.STARTING:
                instance.move(InstanceState.UNLOADED)
            instance.move(InstanceState.ABSENT)
            log.info("%s ended", instance.name)
            self._forget(instance)
        self.changed.set()  # what it held is free by now


@asynccontextmanager
async def running_supervisor(supervisor: Supervisor, end_drain_s: float) -> AsyncIterator[Supervisor]:
    """A supervisor that takes orders. On the way out all instances, and then the forkservers, have ended.

    Cancelled, it ends them at once: requests in flight have no time to end.
    """
    async with asyncio.TaskGroup() as tasks:
        supervisor.attach(tasks)
        services = [
            tasks.create_task(supervisor.rotate_logs(), name="log rotation"),
            tasks.create_task(supervisor.measure(), name="measuring"),
        ]
        services += [
            tasks.create_task(supervisor.run_forkserver(kind), name=f"{kind} forkserver") for kind in EngineKind
        ]
        services += [tasks.create_task(supervisor.keep_spares(kind), name=f"{kind} spares") for kind in EngineKind]
        try:
            yield supervisor
            await supervisor.close(end_drain_s)
        finally:
            for service in services:
                service.cancel()


def _check_level(instance: Instance, level: int) -> None:
    """Whether it can go to this level now. Raises Conflict, InvalidBody."""
    if not instance.settled:
        raise _busy(instance)
    if level < instance.level:
        raise Conflict(
            f"The instance `{instance.name}` sleeps at level {instance.level}; wake it first.",
            param="level",
            code="instance_asleep",
        )
    offered = instance.loaded.sleep_levels if instance.loaded else ()
    if level not in offered:
        levels = ", ".join(str(each) for each in (*offered, UNLOADED_LEVEL))
        raise InvalidBody(
            f"`level`: the instance `{instance.name}` has no level {level}; it has {levels}.", param="level"
        )


def _busy(instance: Instance) -> Conflict:
    reason = f": {instance.reason}" if instance.reason else ""
    return Conflict(
        f"The instance `{instance.name}` is {instance.state}{reason}.",
        param="instance",
        code="instance_busy",
        retry_after=1,
    )


def _running(instance: Instance, model: ModelSpec) -> InstanceReport:
    """What a start order for an instance that is not over is answered. Raises Conflict."""
    if instance.stop_asked.is_set():
        raise Conflict(
            f"The instance `{instance.name}` is being stopped.",
            param="instance",
            code="instance_stopping",
            retry_after=1,
        )
    if for_engine(instance.model) != for_engine(model):
        raise Conflict(
            f"The instance `{instance.name}` runs with another model (`{instance.model.alias}`); stop it first.",
            param="model",
            code="instance_taken",
        )
    return instance.report()


def _differ(one: Held, other: Held) -> bool:
    """By more than what comes and goes with every request."""
    pairs = ((one.device_bytes, other.device_bytes), (one.host_bytes, other.host_bytes))
    return any(abs(now - before) > _NOISE * before for now, before in pairs)


def _share(order: StartOrder, devices: tuple[Device, ...]) -> tuple[tuple[int, ...], int]:
    """The devices of an instance and its bytes on each. Raises InvalidBody."""
    model = order.model
    by_index = {device.index: device for device in devices}
    on_cpu = all(device.kind == CPU for device in devices)
    wanted = 1 if on_cpu else model.tensor_parallel_size
    chosen = order.devices or tuple(list(by_index)[:wanted])
    if unknown := [index for index in chosen if index not in by_index]:
        known = ", ".join(str(index) for index in by_index)
        raise InvalidBody(f"`devices`: there is no device {unknown[0]} here; there are {known}.", param="devices")
    if len(set(chosen)) < wanted:
        raise InvalidBody(
            f"`devices`: tensor_parallel_size is {wanted}, but there are {len(set(chosen))} devices for it.",
            param="devices",
        )
    if lost := [reason for index, reason in lost_devices(devices).items() if index in chosen]:
        raise Conflict(f"`devices`: {lost[0]}.", param="devices", code="device_lost")
    if order.memory_bytes:
        return chosen, order.memory_bytes
    if model.gpu_memory_gb is not None:
        return chosen, int(model.gpu_memory_gb * GB)
    if model.gpu_memory_utilization is not None:
        return chosen, int(model.gpu_memory_utilization * min(by_index[index].total_bytes for index in chosen))
    return chosen, 0


def _gpu_info(devices: tuple[Device, ...], chosen: tuple[int, ...]) -> GpuInfo:
    mine = [device for device in devices if device.index in chosen]
    return GpuInfo(
        available_memory_gb=round(sum(device.free_bytes for device in mine) / GB, 3),
        total_memory_gb=round(sum(device.total_bytes for device in mine) / GB, 3),
        utilization=round(sum(device.utilization for device in mine) / max(1, len(mine)), 3),
        name=", ".join(dict.fromkeys(device.name for device in mine)),
        devices=chosen,
    )
