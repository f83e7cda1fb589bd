"""The sleep levels of a vLLM engine: vLLM's own sleep mode on an accelerator, the Sleeper on a CPU.

Seen working: the Sleeper. Of vLLM's sleep mode, which needs an accelerator, the order of the calls follows its
documentation and source (0.32); it has not been run here.
"""

from __future__ import annotations

from typing import Any, Protocol

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine.async_llm import AsyncLLM

from modelpool.engines.vllm.sleeper import Sleeper

_SLEEPER = f"{Sleeper.__module__}.{Sleeper.__qualname__}"


def sleep_arguments() -> dict[str, Any]:
    """What vLLM must be told at its start so that it can sleep. A model's own `engine_args` win."""
    if current_platform.is_cpu():
        return {"worker_extension_cls": _SLEEPER}
    sleeps = current_platform.is_sleep_mode_available()
    if current_platform.is_cuda_alike():
        # Asked for without it, vLLM would not start.
        sleeps = sleeps and current_platform.is_cumem_allocator_available()
    return {"enable_sleep_mode": True} if sleeps else {}


class Levels(Protocol):
    """How one engine sleeps and wakes. Called while nothing runs and its scheduler is paused."""

    offered: tuple[int, ...]

    async def sleep(self, level: int) -> int:
        """From any lighter level; returns the bytes given back, 0 where that cannot be told."""

    async def wake(self) -> None:
        """Awake, and scheduling again."""


def levels(llm: AsyncLLM, config: VllmConfig) -> Levels:
    """Encoder-decoder models have none: they want sound or pictures, so there is no canary for them."""
    bare = config.model_config.is_encoder_decoder
    if not current_platform.is_cpu():
        return SleepMode(llm, () if bare else sleep_mode_levels(config))
    extension = config.parallel_config.worker_extension_cls
    ours = bool(extension) and issubclass(resolve_obj_by_qualname(extension), Sleeper)
    return SleeperLevels(llm, (1, 2) if ours and not bare else ())


class SleeperLevels:
    def __init__(self, llm: AsyncLLM, offered: tuple[int, ...]) -> None:
        self.offered = offered
        self._llm = llm

    async def sleep(self, level: int) -> int:
        return sum(await self._llm.collective_rpc("modelpool_sleep", args=(level,)))

    async def wake(self) -> None:
        await self._llm.collective_rpc("modelpool_wake")
        await self._llm.reset_prefix_cache()
        await self._llm.resume_generation()


class SleepMode:
    """vLLM's own. It cannot go deeper in place, so from level 1 to level 2 it wakes first."""

    def __init__(self, llm: AsyncLLM, offered: tuple[int, ...]) -> None:
        self.offered = offered
        self._llm = llm
        self._level = 0

    async def sleep(self, level: int) -> int:
        if self._level:
            await self.wake()
        await self._llm.sleep(level, mode="wait")
        self._level = level
        return 0

    async def wake(self) -> None:
        if self._level == 2:
            await self._llm.wake_up(["weights"])
            await self._llm.collective_rpc("reload_weights")
            await self._llm.wake_up(["kv_cache"])
        else:
            await self._llm.wake_up()
        await self._llm.reset_prefix_cache()
        self._level = 0


def sleep_mode_levels(config: Any) -> tuple[int, ...]:
    """Those of vLLM's sleep mode that are sound for a model. Known of 0.32:

    a draft model's weights do not come back from level 2; KV caches offloaded by vLLM itself do not survive either
    level; and an encoder that is split by data leaks at every sleep.
    """
    model = config.model_config
    multimodal = getattr(model, "multimodal_config", None)
    if (
        not model.enable_sleep_mode
        or config.cache_config.kv_offloading_size is not None
        or (multimodal is not None and multimodal.mm_encoder_tp_mode == "data")
    ):
        return ()
    return (1,) if config.speculative_config is not None else (1, 2)
