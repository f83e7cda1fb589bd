"""What instances run on: accelerators by NVML, else the machine itself; or a declared set, for tests."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from typing import Any, Protocol

import psutil
import pynvml

from modelpool.messages.workers import Device
from modelpool.process import StartupError
from modelpool.worker.memory import machine_memory

log = logging.getLogger(__name__)

GB = 10**9
CUDA = "cuda"
CPU = "cpu"
# psutil measures between two calls; closer together than this the difference is noise.
_CPU_SAMPLE_S = 0.5


class Devices(Protocol):
    """A fixed set of devices of one kind."""

    @property
    def kind(self) -> str:
        """ "cuda" or "cpu"."""

    def read(self, promised: Mapping[int, int]) -> tuple[Device, ...]:
        """The devices as they are now. Blocks for milliseconds: call it in a thread.

        `promised`: index → bytes promised to instances. Real devices show what is in use themselves.
        """


class DeclaredGpus:
    """GPUs that do not exist. Free is what was not promised."""

    kind = CUDA

    def __init__(self, count: int, total_bytes: int) -> None:
        self._count = count
        self._total_bytes = total_bytes

    def read(self, promised: Mapping[int, int]) -> tuple[Device, ...]:
        return tuple(
            Device(
                index=index,
                kind=CUDA,
                name="fake GPU",
                total_bytes=self._total_bytes,
                free_bytes=max(0, self._total_bytes - promised.get(index, 0)),
            )
            for index in range(self._count)
        )


class Machine:
    """The machine as one device, where there is no accelerator: its memory and its processors."""

    kind = CPU

    def __init__(self) -> None:
        self._sampled_at = time.monotonic()
        self._utilization = psutil.cpu_percent() / 100

    def read(self, promised: Mapping[int, int]) -> tuple[Device, ...]:
        now = time.monotonic()
        if now - self._sampled_at >= _CPU_SAMPLE_S:
            self._sampled_at = now
            self._utilization = psutil.cpu_percent() / 100
        memory = machine_memory()
        return (
            Device(
                index=0,
                kind=CPU,
                name=f"{os.cpu_count()} CPU cores",
                total_bytes=memory.total,
                free_bytes=memory.free,
                utilization=self._utilization,
            ),
        )


class NvidiaGpus:
    """The GPUs that NVML shows, as far as `CUDA_VISIBLE_DEVICES` of the worker allows them.

    `index` is the number in PCI order, which is NVML's; hosts are told to count in the same order.
    """

    kind = CUDA

    def __init__(self, handles: Mapping[int, Any]) -> None:
        self._handles = dict(handles)

    def read(self, promised: Mapping[int, int]) -> tuple[Device, ...]:
        return tuple(_read_gpu(index, handle) for index, handle in self._handles.items())


def _read_gpu(index: int, handle: Any) -> Device:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        utilization = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    except pynvml.NVMLError_NotSupported:
        utilization = 0.0  # a slice of a GPU (MIG) has none
    name = pynvml.nvmlDeviceGetName(handle)
    return Device(
        index=index,
        kind=CUDA,
        name=name.decode() if isinstance(name, bytes) else name,
        total_bytes=memory.total,
        free_bytes=memory.free,
        utilization=utilization,
    )


def find_devices(declared: str, environ: Mapping[str, str]) -> Devices:
    """The declared set, else the GPUs, else the machine. Raises StartupError for a declaration that says nothing."""
    if declared.strip():
        return declared_gpus(declared)
    handles = _nvml_handles(environ.get("CUDA_VISIBLE_DEVICES"))
    return NvidiaGpus(handles) if handles else Machine()


def declared_gpus(text: str) -> DeclaredGpus:
    """`COUNTxGB`, such as `4x80`. Raises StartupError."""
    match = re.fullmatch(r"\s*(\d{1,3})\s*x\s*(\d+(?:\.\d+)?)\s*", text)
    if match is None or int(match[1]) == 0 or float(match[2]) == 0:
        raise StartupError(
            f"The declared devices {text!r} cannot be used: they must be `COUNTxGB`.",
            "Set MODELPOOL_FAKE_DEVICES such as 4x80.",
        )
    return DeclaredGpus(int(match[1]), int(float(match[2]) * GB))


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
