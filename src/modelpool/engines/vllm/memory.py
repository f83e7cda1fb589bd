"""How much memory an engine may take, as arguments of vLLM.

On an accelerator an instance's share is `gpu_memory_utilization` of the device: vLLM counts weights, activations and KV
cache of this engine against it, and leaves alone what others hold. On a CPU it would be a share of all memory of the
machine, taken whether it is free or not; there the KV cache gets a size of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelpool.messages.engine import HostSpec

MiB = 1 << 20
GiB = 1 << 30

# What a CPU engine takes besides weights and KV cache: its two processes' own pages and the activations.
CPU_OVERHEAD = GiB
CPU_KV_MIN = 64 * MiB
CPU_KV_MAX_DEFAULT = 4 * GiB


def memory_arguments(
    spec: HostSpec, environment: Mapping[str, str], *, weights: int, device_total: int, available: int
) -> dict[str, Any]:
    """vLLM's memory arguments. Sizes in bytes: of the model's files, of one device, and free on it now."""
    model = spec.model
    share = spec.memory_bytes or int((model.gpu_memory_gb or 0) * 10**9)
    cpu = spec.device_kind == "cpu"
    kv_cache_is_given = _kv_cache_is_given(model.engine_args, environment)
    if share and cpu and not kv_cache_is_given:
        return {"kv_cache_memory_bytes": max(CPU_KV_MIN, share - weights - CPU_OVERHEAD)}
    if share and not cpu:
        # Rounded down: a share is a promise about what is left for others.
        return {"gpu_memory_utilization": max(0.0001, min(1.0, math.floor(10_000 * share / device_total) / 10_000))}
    if model.gpu_memory_utilization is not None:
        return {"gpu_memory_utilization": model.gpu_memory_utilization}
    if not cpu or kv_cache_is_given:
        return {}
    size = max(CPU_KV_MIN, min(CPU_KV_MAX_DEFAULT, (available - weights) // 8))
    # The context as long as fits, since the size was not the user's choice.
    return {"kv_cache_memory_bytes": size, **({} if model.max_model_len else {"max_model_len": -1})}


def _kv_cache_is_given(engine_args: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    names = {name.replace("-", "_") for name, value in engine_args.items() if value is not None}
    return "kv_cache_memory_bytes" in names or bool(environment.get("VLLM_CPU_KVCACHE_SPACE"))


def weights_bytes(model_path: Path) -> int:
    """Size of a model's weight files, which is about what they take in memory."""
    if model_path.is_file():
        return model_path.stat().st_size
    sizes = [sum(file.stat().st_size for file in model_path.glob(f"*.{kind}")) for kind in ("safetensors", "bin")]
    return next((size for size in sizes if size), 0)
