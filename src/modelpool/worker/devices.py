"""What instances run on: accelerators by NVML, else the machine itself; or a declared set, for tests."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil
import pynvml
from msgspec.structs import asdict

from modelpool.core.placement import HOST, Other
from modelpool.fake_gpus import FakeGpus, InvalidDeclaration
from modelpool.messages.workers import Device
from modelpool.process import StartupError
from modelpool.process_table import PROC, family, read_processes
from modelpool.worker.memory import machine_memory, tree_bytes

log = logging.getLogger(__name__)

GB = 10**9
CUDA = "cuda"
CPU = "cpu"
# psutil measures between two calls; closer together than this the difference is noise.
_CPU_SAMPLE_S = 0.5
# It fell off the bus, or wants a reset. Anything else that NVML says may pass.
_LOST = frozenset(
    {
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_NOT_FOUND,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
        pynvml.NVML_ERROR_UNKNOWN,
    }
)


class Reading(msgspec.Struct, frozen=True):
    """The devices as they are now, and the machine beside accelerators."""

    devices: tuple[Device, ...]
    host: Device | None = None


class Held(msgspec.Struct, frozen=True):
    """What the processes of one instance hold: of each of its devices (the most, where they differ), and their PSS.

    `device_bytes` is 0 where the driver does not tell; on a machine without accelerators it is the PSS.
    """

    device_bytes: int
    host_bytes: int


class Devices(Protocol):
    """A fixed set of devices of one kind. `environment`: what engines need in theirs to find them."""

    @property
    def kind(self) -> str:
        """ "cuda" or "cpu"."""

    @property
    def environment(self) -> Mapping[str, str]: ...

    def read(self, leaders: Collection[int]) -> Reading:
        """As they are now. Blocks for milliseconds: call it in a thread. `leaders`: the hosts' process ids."""

    def held(self, leader: int) -> Held:
        """What the process `leader` and all below it hold. Blocks."""


class DeclaredGpus:
    """GPUs that do not exist."""

    kind = CUDA

    def __init__(self, gpus: FakeGpus) -> None:
        self._gpus = gpus
        self.environment = gpus.environment

    def read(self, leaders: Collection[int]) -> Reading:
        *devices, host = (Device(**asdict(room)) for room in self._gpus.rooms())
        return Reading(tuple(devices), host)

    def held(self, leader: int) -> Held:
        held = self._gpus.holders().get(leader, {})
        on_devices = (bytes_ for index, bytes_ in held.items() if index != HOST)
        return Held(max(on_devices, default=0), held.get(HOST, 0) + tree_bytes(leader))


class Machine:
    """The machine as one device, where there is no accelerator: its memory and its processors."""

    kind = CPU
    environment: Mapping[str, str] = {}

    def __init__(self) -> None:
        self._sampled_at = time.monotonic()
        self._utilization = psutil.cpu_percent() / 100

    def read(self, leaders: Collection[int]) -> Reading:
        now = time.monotonic()
        if now - self._sampled_at >= _CPU_SAMPLE_S:
            self._sampled_at = now
            self._utilization = psutil.cpu_percent() / 100
        return Reading((_machine(0, f"{os.cpu_count()} CPU cores", self._utilization),))

    def held(self, leader: int) -> Held:
        pss = tree_bytes(leader)
        return Held(pss, pss)


def _machine(index: int, name: str, utilization: float = 0.0) -> Device:
    memory = machine_memory()
    return Device(
        index=index,
        kind=CPU,
        name=name,
        total_bytes=memory.total,
        free_bytes=memory.free,
        utilization=utilization,
    )


class NvidiaGpus:
    """The GPUs that NVML shows, as far as `CUDA_VISIBLE_DEVICES` of the worker allows them.

    `index` is the number in PCI order, which is NVML's; hosts are told to count in the same order.
    """

    kind = CUDA
    environment: Mapping[str, str] = {}

    def __init__(self, handles: Mapping[int, Any], nvml: Any = pynvml) -> None:
        self._handles = dict(handles)
        self._nvml = nvml
        self._last: dict[int, Device] = {}

    def read(self, leaders: Collection[int]) -> Reading:
        table = read_processes()
        ours = {member.pid for leader in leaders for member in family(leader, table)}
        devices = tuple(self._read(index, handle, ours) for index, handle in self._handles.items())
        return Reading(devices, _machine(HOST, "host memory"))

    def held(self, leader: int) -> Held:
        members = {member.pid for member in family(leader, read_processes())}
        on_devices = []
        for handle in self._handles.values():
            try:
                users = self._users(handle)
            except self._nvml.NVMLError:
                continue
            on_devices.append(sum(bytes_ for pid, bytes_ in users.items() if pid in members))
        return Held(max(on_devices, default=0), tree_bytes(leader))

    def _read(self, index: int, handle: Any, ours: Collection[int]) -> Device:
        try:
            device = self._last[index] = self._read_sound(index, handle, ours)
        except self._nvml.NVMLError as error:
            before = self._last.get(index)
            if before is not None and error.value not in _LOST:
                log.warning("device %d cannot be read: %s", index, error)
                return before
            return Device(
                index=index,
                kind=CUDA,
                name=before.name if before else "",
                total_bytes=before.total_bytes if before else 0,
                free_bytes=0,
                lost=str(error),
            )
        return device

    def _read_sound(self, index: int, handle: Any, ours: Collection[int]) -> Device:
        """Raises NVMLError."""
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        try:
            utilization = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except self._nvml.NVMLError_NotSupported:
            utilization = 0.0  # a slice of a GPU (MIG) has none
        name = self._nvml.nvmlDeviceGetName(handle)
        return Device(
            index=index,
            kind=CUDA,
            name=name.decode() if isinstance(name, bytes) else name,
            total_bytes=memory.total,
            free_bytes=memory.free,
            utilization=utilization,
            others=_others(self._users(handle), ours),
        )

    def _users(self, handle: Any) -> dict[int, int]:
        """Process id → bytes that it holds there, as far as the driver tells. Raises NVMLError."""
        try:
            running = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._nvml.NVMLError_NotSupported:
            return {}
        return {each.pid: each.usedGpuMemory or 0 for each in running}


def _others(users: Mapping[int, int], ours: Collection[int], proc: Path = PROC) -> tuple[Other, ...]:
    """Those who are not ours, the largest first. In a container the driver's ids may be of nobody here."""
    others = []
    for pid, bytes_ in users.items():
        try:
            name = (proc / str(pid) / "comm").read_text().strip()
        except OSError:
            continue
        if pid not in ours:
            others.append(Other(pid, name, bytes_))
    return tuple(sorted(others, key=lambda each: -each.bytes))


def find_devices(declared: str, environ: Mapping[str, str], folder: Path) -> Devices:
    """The declared set, else the GPUs, else the machine. `folder` is where those who use a declared set meet.

    Raises StartupError for a declaration that says nothing.
    """
    if declared.strip():
        return declared_gpus(declared.strip(), folder)
    handles = _nvml_handles(environ.get("CUDA_VISIBLE_DEVICES"))
    return NvidiaGpus(handles) if handles else Machine()


def declared_gpus(text: str, folder: Path) -> DeclaredGpus:
    """Raises StartupError."""
    try:
        gpus = FakeGpus(text, folder)
    except InvalidDeclaration as error:
        reason = f"The declared devices cannot be used: {error}."
        raise StartupError(reason, "Set MODELPOOL_FAKE_DEVICES such as 4x80.") from error
    folder.mkdir(mode=0o700, exist_ok=True)
    return DeclaredGpus(gpus)


def lost_devices(devices: Iterable[Device]) -> dict[int, str]:
    """Index → why it is lost."""
    return {device.index: f"device {device.index} is lost: {device.lost}" for device in devices if device.lost}


def _nvml_handles(visible: str | None) -> dict[int, Any]:
    """Index → NVML handle of every GPU that may be used; nothing where there is no driver."""
    try:
        pynvml.nvmlInit()
        handles = {index: pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())}
        names = {index: pynvml.nvmlDeviceGetUUID(handle) for index, handle in handles.items()}
    except pynvml.NVMLError as error:
        log.info("no GPU is used: %s", error)
        return {}
    return {index: handles[index] for index in visible_indices(visible, names)}


def visible_indices(visible: str | None, uuids: Mapping[int, str]) -> list[int]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` names, by index or by (the beginning of) UUID; all where it is not set.

    As in CUDA, the first name that fits nothing hides all after it.
    """
    if visible is None:
        return list(uuids)
    chosen: list[int] = []
    for name in (part.strip() for part in visible.split(",")):
        if name.isdecimal():
            found = int(name) if int(name) in uuids else None
        else:
            found = next((index for index, uuid in uuids.items() if name and uuid.startswith(name)), None)
        if found is None:
            break
        chosen.append(found)
    return sorted(set(chosen))
