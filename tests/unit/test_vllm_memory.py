"""How an instance's share of memory becomes arguments of vLLM."""

from __future__ import annotations

from typing import Any

from modelpool.engines.vllm.memory import CPU_KV_MAX_DEFAULT, CPU_KV_MIN, CPU_OVERHEAD, GiB, memory_arguments
from modelpool.messages.engine import HostSpec
from modelpool.messages.models import ModelSpec


def arguments(
    *,
    kind: str = "cpu",
    share: int = 0,
    environment: dict[str, str] | None = None,
    available: int = 16 * GiB,
    **model: Any,
) -> dict[str, Any]:
    spec = HostSpec(
        instance="m",
        model=ModelSpec(alias="m", model_name="/m", **model),
        model_path="/m",
        token="",
        bind="127.0.0.1",
        ports=(0, 0),
        env={},
        cwd="/",
        log_path="/dev/null",
        device_kind=kind,
        devices=(0,),
        memory_bytes=share,
    )
    return memory_arguments(spec, environment or {}, weights=2 * GiB, device_total=80 * GiB, available=available)


def test_on_an_accelerator_a_share_is_a_part_of_the_device() -> None:
    assert arguments(kind="cuda", share=20 * GiB) == {"gpu_memory_utilization": 0.25}


def test_a_share_is_never_rounded_up() -> None:
    [value] = arguments(kind="cuda", share=GiB).values()
    assert value * 80 * GiB <= GiB


def test_gigabytes_of_the_model_are_a_share() -> None:
    assert arguments(kind="cuda", gpu_memory_gb=40 * GiB / 1e9) == {"gpu_memory_utilization": 0.5}


def test_what_the_worker_promised_wins_over_what_the_model_says() -> None:
    assert arguments(kind="cuda", share=20 * GiB, gpu_memory_utilization=0.9) == {"gpu_memory_utilization": 0.25}


def test_without_a_share_the_model_or_vllm_decides() -> None:
    assert arguments(kind="cuda", gpu_memory_utilization=0.9) == {"gpu_memory_utilization": 0.9}
    assert arguments(kind="cuda") == {}


def test_on_a_cpu_the_cache_gets_what_the_weights_leave_of_a_share() -> None:
    assert arguments(share=8 * GiB) == {"kv_cache_memory_bytes": 6 * GiB - CPU_OVERHEAD}


def test_on_a_cpu_a_share_that_is_too_small_leaves_a_small_cache() -> None:
    assert arguments(share=GiB) == {"kv_cache_memory_bytes": CPU_KV_MIN}


def test_on_a_cpu_a_default_is_modest_and_fits_the_context_to_it() -> None:
    assert arguments(available=18 * GiB) == {"kv_cache_memory_bytes": 2 * GiB, "max_model_len": -1}
    assert arguments(available=1000 * GiB)["kv_cache_memory_bytes"] == CPU_KV_MAX_DEFAULT
    assert arguments(available=2 * GiB)["kv_cache_memory_bytes"] == CPU_KV_MIN


def test_a_context_that_was_asked_for_is_kept() -> None:
    assert "max_model_len" not in arguments(max_model_len=100)


def test_a_cache_that_was_asked_for_is_kept() -> None:
    for name in ("kv_cache_memory_bytes", "kv-cache-memory-bytes"):
        assert arguments(engine_args={name: 5}, share=8 * GiB) == {}
    assert arguments(environment={"VLLM_CPU_KVCACHE_SPACE": "1"}) == {}


def test_a_utilization_is_passed_on_beside_a_cache() -> None:
    asked = arguments(engine_args={"kv_cache_memory_bytes": 5}, gpu_memory_utilization=0.5)
    assert asked == {"gpu_memory_utilization": 0.5}
    assert arguments(engine_args={"kv_cache_memory_bytes": None}, share=8 * GiB) != {}
