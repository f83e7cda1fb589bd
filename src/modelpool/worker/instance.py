"""One instance as its worker knows it: what was ordered, its state, and how it is reported."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from msgspec.structs import replace

from modelpool.core.lifecycle import InstanceState, move, sleep_level
from modelpool.messages.engine import HostStatus, Loaded, StartPhase, Wake
from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import Address, InstanceReport, LevelChange, Progress, SleepOrder
from modelpool.worker.devices import Held
from modelpool.worker.host import Host

log = logging.getLogger(__name__)

_OVER = (InstanceState.FAILED, InstanceState.UNLOADED, InstanceState.ABSENT)
_SETTLED = (InstanceState.ACTIVE, InstanceState.SLEEP_1, InstanceState.SLEEP_2)
_AT_LEVEL = {1: InstanceState.SLEEP_1, 2: InstanceState.SLEEP_2}


class Instance:
    """One start of an instance, from STARTING to its end; the next start is another object.

    `stop_asked` is set once it is to end, with `drain_s` to let requests in flight end. Every change calls `changed`.
    """

    def __init__(
        self,
        name: str,
        model: ModelSpec,
        *,
        devices: tuple[int, ...],
        memory_bytes: int,
        changed: Callable[[], None],
        after: asyncio.Task[None] | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.devices = devices
        self.memory_bytes = memory_bytes
        self.state = move(InstanceState.ABSENT, InstanceState.STARTING)
        self.progress: Progress | None = None
        self.reason = ""
        self.permanent = False
        self.after = after
        """The task of an earlier start of this name, which may still be giving memory back."""
        self.task: asyncio.Task[None] | None = None
        self.host: Host | None = None
        self.upstream: Address | None = None
        """Where the host answers this process."""
        self.address: Address | None = None
        """Where it answers others."""
        self.loaded: Loaded | None = None
        self.last_status: HostStatus | None = None
        self.stop_asked = asyncio.Event()
        self.drain_s = 0.0
        self.level = 0
        """The sleep level that it has, or is on its way to."""
        self.orders: asyncio.Queue[SleepOrder | Wake] = asyncio.Queue()
        self.held = Held(0, 0)
        """As it was measured last."""
        self.last_sleep: LevelChange | None = None
        self.last_wake: LevelChange | None = None
        self.phases: tuple[StartPhase, ...] = ()
        self._changed = changed
        self._changed_at = time.time()

    @property
    def over(self) -> bool:
        """Whether it has failed or ended, and may be started again under the same name."""
        return self.state in _OVER

    @property
    def settled(self) -> bool:
        """Whether it is awake or asleep for good, and may be ordered to another level."""
        return self.state in _SETTLED and sleep_level(self.state) == self.level and not self.stop_asked.is_set()

    def move(self, target: InstanceState, reason: str = "") -> None:
        """Raises IllegalTransition, and then changes nothing."""
        self.state = move(self.state, target)
        self.reason = reason
        self.progress = None
        self._touch()

    def fail(self, reason: str, *, permanent: bool = False) -> None:
        """FAILED, while what is left of it is cleaned up. One that was asked to end has just ended: no change."""
        if not self.stop_asked.is_set() and not self.over:
            log.warning("%s failed: %s", self.name, reason)
            self.permanent = permanent
            self.move(InstanceState.FAILED, reason)

    def ask_to_end(self, drain_s: float) -> None:
        """DRAINING from now on. One that starts, or takes no requests already, has nothing to drain."""
        self.drain_s = drain_s
        self.stop_asked.set()
        if self.state is InstanceState.ACTIVE:
            self.move(InstanceState.DRAINING)
        else:
            self.reason = "it is being stopped"
            self._touch()

    def ask_to_sleep(self, order: SleepOrder) -> None:
        """DRAINING from now on, unless it sleeps already, and goes deeper."""
        self.level = order.level
        if self.state is InstanceState.ACTIVE:
            self.move(InstanceState.DRAINING)
        self.orders.put_nowait(order)

    def ask_to_wake(self) -> None:
        self.level = 0
        self.move(InstanceState.WAKING)
        self.orders.put_nowait(Wake())

    def fall_asleep(self, change: LevelChange, held: Held) -> None:
        self.last_sleep = change
        self.held = held
        self.move(_AT_LEVEL[change.level])

    def stay(self, change: LevelChange) -> None:
        """The order to sleep came to nothing, and it is what it was: mostly its requests would not end."""
        self.last_sleep = change
        self.level = sleep_level(self.state)
        if self.state is InstanceState.DRAINING and not self.stop_asked.is_set():
            self.move(InstanceState.ACTIVE)
        self._touch()

    def awake(self, change: LevelChange) -> None:
        self.last_wake = change
        self.held = Held(0, self.held.host_bytes)  # of its devices not what it held asleep, and not measured yet
        if not self.stop_asked.is_set():
            self.move(InstanceState.ACTIVE)

    def measured(self, held: Held) -> None:
        """So much it holds now, after its start or its last wake."""
        self.held = held
        if self.last_wake is not None:
            self.last_wake = replace(self.last_wake, bytes_after=held.host_bytes, device_bytes_after=held.device_bytes)
        self._touch()

    def advance(self, phase: str, done_bytes: int = 0, total_bytes: int = 0) -> None:
        """Say how far the start is. What comes after it was given up says nothing."""
        progress = Progress(phase=phase, done_bytes=done_bytes, total_bytes=total_bytes)
        if self.state is InstanceState.STARTING and progress != self.progress:
            self.progress = progress
            self._touch()

    def activate(self, loaded: Loaded, *, upstream: Address, address: Address, phases: tuple[StartPhase, ...]) -> None:
        self.loaded = loaded
        self.phases = phases
        self.upstream = upstream
        self.address = address
        self.move(InstanceState.ACTIVE)

    def attach(self, host: Host) -> None:
        self.host = host

    def detach(self) -> None:
        """The host is gone; its last figures stay."""
        if self.host is not None:
            self.last_status = self.host.status
            self.host = None

    def _touch(self) -> None:
        # Reports are ordered by this: it must grow even when the clock does not.
        self._changed_at = max(time.time(), self._changed_at + 1e-6)
        self._changed()

    def report(self) -> InstanceReport:
        return InstanceReport(
            instance=self.name,
            model=self.model,
            state=self.state,
            progress=self.progress,
            reason=self.reason,
            permanent=self.permanent,
            address=None if self.over else self.address,
            capacity=self.loaded.capacity if self.loaded else 0,
            max_model_len=self.loaded.max_model_len if self.loaded else None,
            devices=self.devices,
            memory_bytes=self.memory_bytes,
            pid=self.host.pid if self.host else None,
            changed_at=self._changed_at,
            sleep_levels=self.loaded.sleep_levels if self.loaded else (),
            pss_bytes=self.held.host_bytes,
            device_bytes=self.held.device_bytes,
            weights_bytes=self.loaded.weights_bytes if self.loaded else 0,
            last_sleep=self.last_sleep,
            last_wake=self.last_wake,
            phases=self.phases,
        )
