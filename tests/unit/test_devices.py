"""What is made of what NVML says. The driver is a stand-in; its errors are the library's own."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pynvml

from modelpool.core.placement import GB, HOST
from modelpool.worker.devices import NvidiaGpus

US, STRANGER, ELSEWHERE = os.getpid(), os.getppid(), 2**22 + 1


class Nvml:
    """A driver with GPUs of 80 GB. `users`: by handle, who holds how many GB. `broken`: what it says instead."""

    NVMLError = pynvml.NVMLError
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported

    def __init__(self, users: dict[str, dict[int, int | None]]) -> None:
        self.users = users
        self.broken: dict[str, int] = {}

    def _check(self, handle: str) -> None:
        if code := self.broken.get(handle):
            raise pynvml.NVMLError(code)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        self._check(handle)
        used = sum(gb or 0 for gb in self.users[handle].values()) * GB
        return SimpleNamespace(total=80 * GB, free=80 * GB - used)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"H200"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> Any:
        self._check(handle)
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=None if gb is None else gb * GB)
            for pid, gb in self.users[handle].items()
        ]


def test_others_are_named_and_ours_are_not() -> None:
    driver = Nvml({"a": {US: 30, STRANGER: 20, ELSEWHERE: 5}, "b": {US: 10}})
    reading = NvidiaGpus({0: "a", 1: "b"}, driver).read([US])
    first, second = reading.devices
    assert (first.name, first.total_bytes, first.free_bytes) == ("H200", 80 * GB, 25 * GB)
    # One that this machine's process table does not know may be ours, seen from outside a container.
    assert [(each.pid, each.bytes) for each in first.others] == [(STRANGER, 20 * GB)]
    assert first.others[0].name
    assert second.others == ()
    assert reading.host is not None
    assert reading.host.index == HOST


def test_what_an_instance_holds_is_the_most_that_it_holds_of_any_device() -> None:
    gpus = NvidiaGpus({0: "a", 1: "b"}, Nvml({"a": {US: 30, STRANGER: 20}, "b": {US: 10}}))
    assert gpus.held(US).device_bytes == 30 * GB
    assert gpus.held(US).host_bytes > 10**6
    silent = NvidiaGpus({0: "a"}, Nvml({"a": {US: None}}))
    assert silent.held(US).device_bytes == 0


def test_a_gpu_that_cannot_be_read_any_more_is_lost_and_the_others_are_not() -> None:
    driver = Nvml({"a": {US: 30}, "b": {US: 10}})
    gpus = NvidiaGpus({0: "a", 1: "b"}, driver)
    gpus.read([])
    driver.broken["a"] = pynvml.NVML_ERROR_GPU_IS_LOST
    first, second = gpus.read([]).devices
    assert (first.lost, first.total_bytes, first.free_bytes) == ("GPU is lost", 80 * GB, 0)
    assert (second.lost, second.free_bytes) == ("", 70 * GB)
    assert gpus.held(US).device_bytes == 10 * GB
    driver.broken["b"] = pynvml.NVML_ERROR_TIMEOUT
    assert gpus.read([]).devices[1] == second
