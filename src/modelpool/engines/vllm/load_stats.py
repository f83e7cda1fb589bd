"""vLLM's scheduler figures, as they come with each step."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase


class LoadStats(StatLoggerBase):
    """The last figures of one engine core."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.running = 0
        self.kv_cache_usage = 0.0

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.kv_cache_usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
