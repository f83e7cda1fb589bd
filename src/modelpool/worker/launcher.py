"""Carries one instance from STARTING to its end: fetch, fork, load, watch, drain."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from modelpool.messages.engine import HostSpec, Loaded, StartPhase
from modelpool.messages.models import EngineKind
from modelpool.messages.workers import Address
from modelpool.worker.devices import Devices
from modelpool.worker.forked_host import EngineUnavailable, ForkFailed
from modelpool.worker.forkserver import Forkserver
from modelpool.worker.host import Host, HostEnded, LoadRefused, forked_host
from modelpool.worker.host_spec import host_environment
from modelpool.worker.hub import FetchFailed, Hub
from modelpool.worker.instance import Instance
from modelpool.worker.instance_log import InstanceLog
from modelpool.worker.read_ahead import reading_ahead
from modelpool.worker.residency import follow_orders
from modelpool.worker.waiting import all_of, cancelled, first_of

log = logging.getLogger(__name__)

PROBE_INTERVAL_S = 1.0
END_GRACE_S = 15.0
"""How long a host may take to end after its drain; its own deadline for its engine is 10 s."""
_LAST_CHANCE_S = 1.0
_ADDRESS_IN_USE = "address already in use"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """In seconds."""

    start_s: float
    stall_s: float
    wake_s: float


class HostPlace(msgspec.Struct, frozen=True, kw_only=True):
    """What is the same for all hosts of this worker.

    They listen on `bind`; this process reaches them at `reached_here`, others at `announced`.
    """

    token: str
    bind: str
    reached_here: str
    announced: str
    ports: tuple[int, int]
    cwd: str
    capacity: int | None
    environ: Mapping[str, str]


class StartFailed(Exception):
    """The reason is for people. `permanent`: the next start of the same model will fail in the same way."""

    def __init__(self, reason: str, *, permanent: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent


class AddressInUse(StartFailed):
    """Another process took a port between its choice and its use; the next try chooses again."""


class Launcher:
    def __init__(
        self,
        *,
        forkservers: Mapping[EngineKind, Forkserver],
        hub: Hub,
        place: HostPlace,
        devices: Devices,
        limits: Limits,
        log_of: Callable[[str], InstanceLog],
    ) -> None:
        self._forkservers = forkservers
        self._hub = hub
        self._place = place
        self._devices = devices
        self._limits = limits
        self._log_of = log_of

    async def run(self, instance: Instance) -> None:
        """From STARTING until nothing of the host is left: because it failed, or because it was asked to end."""
        try:
            began = time.monotonic()
            path = await self._fetch(instance)
            fetched = StartPhase("fetch", time.monotonic() - began)
            async with reading_ahead(path), asyncio.timeout(self._limits.start_s) as deadline:
                try:
                    await self._host(instance, path, fetched, deadline)
                except AddressInUse as error:
                    log.warning("%s: %s; it is started once more", instance.name, error)
                    await self._host(instance, path, fetched, deadline)
        except TimeoutError:
            phase = instance.progress.phase if instance.progress else "import"
            instance.fail(f"not ready after {self._limits.start_s:g} s (in phase {phase})")
        except (FetchFailed, StartFailed) as error:
            instance.fail(str(error), permanent=error.permanent)
        except (EngineUnavailable, ForkFailed) as error:
            instance.fail(str(error))

    async def _fetch(self, instance: Instance) -> str:
        """The model's local folder. The fake engine has none."""
        model = instance.model
        if model.engine is EngineKind.FAKE:
            return model.model_name
        revision = model.engine_args.get("revision")
        return await self._hub.local_path(
            model.model_name,
            revision=revision if isinstance(revision, str) else None,
            on_progress=lambda done, total: instance.advance("fetch", done, total),
        )

    async def _host(self, instance: Instance, path: str, fetched: StartPhase, deadline: asyncio.Timeout) -> None:
        """The life of one host, from its fork until its process group is gone. `deadline` is for its start only."""
        log_ = self._log_of(instance.name)
        log_start = await asyncio.to_thread(log_.size)
        began = time.monotonic()
        instance.advance("import")
        forkserver = self._forkservers[instance.model.engine]
        await forkserver.ready()
        imported = time.monotonic()
        try:
            async with forked_host(forkserver, instance.name) as host:
                instance.attach(host)
                loaded = await self._load(instance, host, path, log_, log_start)
                deadline.reschedule(None)
                ready = time.monotonic()
                log.info("%s is ready after %.1f s, process %d", instance.name, ready - began, host.pid)
                # What the host's own phases leave of its time: the fork, and its way to the first of them.
                forking = max(0.0, ready - imported - sum(phase.seconds for phase in loaded.phases))
                instance.activate(
                    loaded,
                    upstream=Address(self._place.reached_here, loaded.port),
                    address=Address(self._place.announced, loaded.port),
                    phases=(
                        fetched,
                        StartPhase("import", imported - began),
                        StartPhase("fork", forking),
                        *loaded.phases,
                    ),
                )
                await self._serve(instance, host, log_)
        finally:
            instance.detach()

    async def _load(self, instance: Instance, host: Host, path: str, log_: InstanceLog, log_start: int) -> Loaded:
        """Raises StartFailed."""
        try:
            return await host.load(self._spec(instance, path, log_), lambda phase: instance.advance("load"))
        except LoadRefused as error:
            reason, permanent = str(error), error.permanent
        except HostEnded as error:
            reason, permanent = await _epitaph(error, log_, log_start), False
        raise AddressInUse(reason) if _ADDRESS_IN_USE in reason.lower() else StartFailed(reason, permanent=permanent)

    async def _serve(self, instance: Instance, host: Host, log_: InstanceLog) -> None:
        """Watch an ACTIVE host until it fails, or is asked to end and has had its time for it."""
        log_start = await asyncio.to_thread(log_.size)
        asked = asyncio.create_task(instance.stop_asked.wait(), name=f"instance {instance.name} stop")
        changing = asyncio.create_task(
            follow_orders(instance, host, self._limits.wake_s, self._devices.held),
            name=f"instance {instance.name} residency",
        )
        try:
            reason = await self._watch(host, asked, changing)
            if reason is None and host.ended.done() and not asked.done():
                reason = await _epitaph(HostEnded(host.ended.result()), log_, log_start)
            if reason is not None:
                instance.fail(reason)
                return
            await cancelled(changing)
            host.shut_down(instance.drain_s)
            await all_of(host.ended, timeout_s=instance.drain_s + END_GRACE_S)
        finally:
            await cancelled(asked, changing)

    async def _watch(self, host: Host, asked: asyncio.Task[bool], changing: asyncio.Task[str]) -> str | None:
        """Probe until the host ended or is asked to end (None), or is of no use any more: then why."""
        while True:
            await first_of(host.ended, asked, changing, timeout_s=PROBE_INTERVAL_S)
            if changing.done():
                return changing.result()
            if host.ended.done() or asked.done():
                return None
            if host.silence() > self._limits.stall_s:
                # It may be us who stood still; then its answers are waiting to be read.
                await first_of(host.probe(), host.ended, timeout_s=_LAST_CHANCE_S)
                if not host.ended.done() and host.silence() > self._limits.stall_s:
                    host.kill()
                    return f"stalled: it has not answered a probe for {host.silence():.0f} s"
            host.probe()

    def _spec(self, instance: Instance, path: str, log_: InstanceLog) -> HostSpec:
        kind = self._devices.kind
        environment = host_environment(self._place.environ, device_kind=kind, devices=instance.devices)
        return HostSpec(
            instance=instance.name,
            model=instance.model,
            model_path=path,
            token=self._place.token,
            bind=self._place.bind,
            ports=self._place.ports,
            env={**environment, **self._devices.environment},
            cwd=self._place.cwd,
            log_path=str(log_.path),
            device_kind=kind,
            devices=instance.devices,
            memory_bytes=instance.memory_bytes,
            capacity=self._place.capacity,
        )


async def _epitaph(ended: HostEnded, log_: InstanceLog, since: int) -> str:
    """How a host ended, with its last words where they may say why."""
    if ended.status == -9:
        return str(ended)
    last = await asyncio.to_thread(log_.last_words, since)
    return f"{ended}: {last}" if last else str(ended)
