"""Worker ↔ manager: registration, heartbeats, orders.

A worker speaks first (`POST /workers/register`, then a heartbeat at once when anything changed and every
`heartbeat_interval_s` otherwise). The manager gives orders over the worker's own HTTP service and keeps
`GET /watch` of it open, so that a worker's end is seen when its socket closes, not when its heartbeat is missed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import Room
from modelpool.messages.engine import StartPhase
from modelpool.messages.models import ModelSpec

GiB = 1 << 30

EPOCH_HEADER = "X-ModelPool-Epoch"
"""On every request of a manager to a worker. A worker obeys the latest manager only; one without it is a person's."""


UNLOADED_LEVEL = 3
"""The sleep level at which there is no process any more."""


class Device(Room, frozen=True, kw_only=True):
    """One accelerator, or the whole machine where there is none (`kind` "cpu"). Memory in bytes.

    `lost`: why it can be used no more. `others`: processes that are not of this pool, and hold memory of it.
    """

    utilization: float = 0.0
    """0 to 1."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether instances of an engine kind can be started here: "importing", "ready", "failed" or "missing"."""

    state: str
    reason: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What a STARTING instance is doing: `phase` is "fetch", "import", "load" or "ready"."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0


class Address(msgspec.Struct, frozen=True):
    """Where an engine host listens."""

    host: str
    port: int


class LevelChange(msgspec.Struct, frozen=True, kw_only=True):
    """The last time that an instance went to sleep, or woke. Bytes are PSS of its process tree, before and after.

    After a wake they are measured once it takes requests; 0 until then. `device_bytes_…`: of each of its devices.

    `level`: the one it went to, or came from. `seconds` come after `drain_s`, the wait for requests in flight.
    `reason`: why it stayed awake; "" when it did not.
    """

    level: int
    seconds: float = 0.0
    drain_s: float = 0.0
    canary_s: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    device_bytes_before: int = 0
    device_bytes_after: int = 0
    reason: str = ""


class InstanceReport(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as its worker sees it. `changed_at` is Unix seconds; `reason` says why it FAILED.

    `permanent`: it will fail in the same way as long as its model is registered as it is.
    """

    instance: str
    model: ModelSpec
    state: InstanceState
    progress: Progress | None = None
    reason: str = ""
    permanent: bool = False
    address: Address | None = None
    capacity: int = 0
    max_model_len: int | None = None
    devices: tuple[int, ...] = ()
    memory_bytes: int = 0
    pid: int | None = None
    """None once nothing of it is left."""
    changed_at: float = 0.0
    sleep_levels: tuple[int, ...] = ()
    """Those that its engine has, of 1 and 2."""
    pss_bytes: int = 0
    """PSS of its process tree when it was last measured: at its start, when it was put to sleep or woken, and then."""
    device_bytes: int = 0
    """What it held of each of its devices then (the most, where they differ); on a CPU that is its PSS."""
    weights_bytes: int = 0
    last_sleep: LevelChange | None = None
    last_wake: LevelChange | None = None
    phases: tuple[StartPhase, ...] = ()
    """Where the time of its start went."""

    @property
    def ending(self) -> bool:
        """It has failed, and what is left of it may still hold its memory."""
        return self.state is InstanceState.FAILED and self.pid is not None


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Who a worker is. `incarnation` is new with each process; `url` is where its control API is reached.

    `direct` is false when engine hosts are reached through the worker's `/proxy/{alias}/` only (`PUBLIC_URL`).
    """

    worker_id: str
    incarnation: str
    url: str
    direct: bool = True
    version: str = ""
    run_id: str = ""


class RegisterWorker(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /workers/register`. Registering again with what runs is how a manager that was away learns of it.

    `host`: the machine, beside its accelerators. `files`: models, by hub name or path, whose files are there.
    """

    info: WorkerInfo
    devices: tuple[Device, ...]
    engines: dict[str, EngineStatus]
    instances: tuple[InstanceReport, ...] = ()
    host: Device | None = None
    files: tuple[str, ...] = ()
    epoch: str = ""
    """Of the latest manager that it has heard of. One that runs nothing may be of another cluster all the same."""
    number: int = 0
    """As of a Heartbeat."""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /workers/{worker_id}/heartbeat`. All instances each time: a report replaces the one before.

    404 `worker_not_found` asks the worker to register again. `number`: greater than that of any earlier report of this
    incarnation, so that one which was held up on its way is known by it; 0 where its sender does not count.
    """

    incarnation: str
    devices: tuple[Device, ...]
    engines: dict[str, EngineStatus]
    instances: tuple[InstanceReport, ...] = ()
    host: Device | None = None
    files: tuple[str, ...] = ()
    number: int = 0


class HeartbeatAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`gateways`: base URLs a worker may use when its own MANAGER_URL is gone. `epoch`: of who answers."""

    gateways: tuple[str, ...] = ()
    epoch: str = ""


class StartOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /instances/start`. Idempotent: the same order for an instance that runs changes nothing.

    `instance` defaults to the model's alias; `devices` to device 0 (as many as tensor_parallel_size says);
    `memory_bytes`, the share of each device promised to the instance, to what the model itself says.
    """

    model: ModelSpec
    instance: str = ""
    devices: tuple[int, ...] = ()
    memory_bytes: int = 0


class SleepOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /instances/{alias}/sleep`. Answered at once; idempotent.

    Level 1 gives back the KV cache, 2 the weights too, 3 ends the process: then the worker knows the instance no more,
    as after a stop. Requests in flight end first; where they do not in `drain_s` (the worker's drain timeout by
    default), it stays awake, but for level 3.
    """

    level: Annotated[int, Meta(ge=1, le=3)]
    drain_s: Annotated[float, Meta(ge=0)] | None = None


class GpuInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The device(s) an instance is on. GB are 10^9 bytes; on a machine without accelerators, host memory and CPU."""

    available_memory_gb: float
    total_memory_gb: float
    utilization: float
    name: str
    devices: tuple[int, ...]


class InstanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /instances/{alias}/status`. Times in seconds over requests the host really served; None before the first."""

    instance: str
    alias: str
    state: InstanceState
    sleep_level_value: int
    inflight_requests: int
    capacity: int
    gpu_info: GpuInfo
    ttft_last: float | None = None
    ttft_avg: float | None = None
    e2e_last: float | None = None
    e2e_avg: float | None = None
    requests_total: int = 0
    running: int = 0
    waiting: int = 0
    kv_cache_usage: float | None = None
    num_gpu_blocks: int | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    memory_bytes: int = 0
    """PSS of the instance's process tree."""
    device_bytes: int = 0
    """What it holds of each of its devices; on a CPU that is its PSS, and 0 where the driver does not tell."""
    pid: int | None = None
    progress: Progress | None = None
    reason: str = ""
    sleep_levels: tuple[int, ...] = ()
    last_sleep: LevelChange | None = None
    last_wake: LevelChange | None = None
    phases: tuple[StartPhase, ...] = ()


class WorkerDescription(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /info` of a worker."""

    info: WorkerInfo
    devices: tuple[Device, ...]
    engines: dict[str, EngineStatus]
    instances: tuple[InstanceReport, ...]
    host: Device | None = None
    files: tuple[str, ...] = ()
