"""Memory that a fake engine holds, so that giving it back can be seen from outside."""

from __future__ import annotations

import mmap
import os
from typing import Protocol

from modelpool.core.placement import HOST
from modelpool.fake_gpus import FakeGpus, from_environment
from modelpool.messages.engine import HostSpec
from modelpool.messages.models import ModelSpec

_MB = 10**6


class Memory(Protocol):
    """What an engine holds at each level: at 0 all, at 2 nothing but what its processes need."""

    def hold(self, level: int) -> int:
        """Hold what belongs to this level; returns the bytes that were given back. Raises OutOfMemory."""


def memory_of(spec: HostSpec) -> Memory:
    """That of its device: of a fake GPU where there are such, else of this process."""
    gpus = from_environment(os.environ) if spec.device_kind == "cuda" else None
    return ProcessMemory(spec.model) if gpus is None else GpuMemory(spec, gpus)


class ProcessMemory:
    """Real memory. Level 1 keeps the weights."""

    def __init__(self, model: ModelSpec) -> None:
        self._weights = Pages(model.fake_weights_mb)
        self._kv_cache = Pages(model.fake_kv_mb)

    def hold(self, level: int) -> int:
        if level == 0:
            self._weights.take()
            self._kv_cache.take()
            return 0
        return self._kv_cache.give_back() + (self._weights.give_back() if level == 2 else 0)


class GpuMemory:
    """Of the fake GPUs that `CUDA_VISIBLE_DEVICES` allows, each alike; as vLLM, it fills its share with KV cache.

    Asleep its context stays there, and level 1 takes host memory for the weights.
    """

    def __init__(self, spec: HostSpec, gpus: FakeGpus) -> None:
        self._gpus = gpus
        self._devices = [int(index) for index in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        self._weights = int(spec.model.fake_weights_mb * _MB)
        self._context = int(spec.model.fake_context_mb * _MB)
        wanted = self._context + (self._weights + int(spec.model.fake_kv_mb * _MB)) // len(self._devices)
        self._awake = max(spec.memory_bytes, wanted)

    def hold(self, level: int) -> int:
        each = self._context if level else self._awake
        return self._gpus.hold(dict.fromkeys(self._devices, each) | ({HOST: self._weights} if level == 1 else {}))


class Pages:
    """So many megabytes, every page of them touched, while taken."""

    def __init__(self, megabytes: float) -> None:
        self.bytes = int(megabytes * _MB)
        self._memory: mmap.mmap | None = None

    def take(self) -> None:
        if self.bytes and self._memory is None:
            self._memory = mmap.mmap(-1, self.bytes)
            self._memory.write(b"\1" * self.bytes)

    def give_back(self) -> int:
        """Returns how many bytes it were."""
        if self._memory is None:
            return 0
        self._memory.close()
        self._memory = None
        return self.bytes
