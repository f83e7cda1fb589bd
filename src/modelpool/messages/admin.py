"""Manager → command line and other programs: what `GET /admin/…` answers."""

from __future__ import annotations

import msgspec

from modelpool.core.lifecycle import InstanceState
from modelpool.messages.engine import StartPhase
from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import Device, EngineStatus, LevelChange, Progress


class InstanceView(msgspec.Struct, frozen=True, kw_only=True):
    """`permanent`: its failure lies in the model as it is registered, and trying again is of no use."""

    instance: str
    worker_id: str
    state: InstanceState
    sleep_level_value: int
    reason: str = ""
    leaving: str = ""
    """Why it is to go once others are in its place; "" when it stays."""
    progress: Progress | None = None
    failures: int = 0
    permanent: bool = False
    retry_in_s: float | None = None
    devices: tuple[int, ...] = ()
    pid: int | None = None
    sleep_levels: tuple[int, ...] = ()
    pss_bytes: int = 0
    """Of its process tree, when it was last measured."""
    device_bytes: int = 0
    """And what it held of each of its devices then."""
    weights_bytes: int = 0
    last_sleep: LevelChange | None = None
    last_wake: LevelChange | None = None
    phases: tuple[StartPhase, ...] = ()
    """Where the time of its start went."""


class LearnedView(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of a model on a worker; `worker_id` "" stands for all of them.

    `what`: `start`, `wake_1`, `sleep_1`, `unload`, … in seconds; `held_awake`, `held_1`, … in bytes.
    `typical`: the median of late, `slow`: nine of ten were no more; `seen`: of so many observations.
    """

    what: str
    worker_id: str
    typical: float
    slow: float
    seen: int


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """`state` is the best of the instances' states; `reason` says what stands in the way of all `wanted` replicas.

    `permanent`: what stands in the way lies in the model as it is registered, or in the machines that there are.
    """

    alias: str
    state: InstanceState
    reason: str
    spec: ModelSpec
    created: int
    instances: tuple[InstanceView, ...]
    wanted: int = 1
    permanent: bool = False
    decision: str = ""
    """What the controller does about it next, and why."""
    due_s: float | None = None
    """When it may decide otherwise although nothing happens."""
    outlook: tuple[str, ...] = ()
    """What comes next, when and why; what a request would do; who may take its memory. Sentences."""
    learned: tuple[LearnedView, ...] = ()


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    url: str
    alive: bool
    reason: str
    last_seen_s: float
    """Seconds since it was last heard."""
    run_id: str
    devices: tuple[Device, ...]
    set_aside_bytes: tuple[int, ...] = ()
    """Of each of `devices`: what is promised to instances, whether they hold it by now or not."""
    engines: dict[str, EngineStatus]
    instances: tuple[str, ...]
    host: Device | None = None
    """The machine, beside its accelerators."""
    draining: bool = False
    version: str = ""
    drain: tuple[str, ...] = ()
    """While it is being drained: what it still waits for. Sentences."""


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /admin/status`."""

    version: str
    run_id: str
    epoch: str
    recovering: bool
    models: tuple[ModelView, ...]
    workers: tuple[WorkerView, ...]


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a registration. `routing` is the model as the gateways see it."""

    status: str
    routing: ModelView
