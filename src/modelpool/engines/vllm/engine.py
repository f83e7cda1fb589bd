"""One AsyncLLM and vLLM's OpenAI app on it, as `vllm serve` would run them for the same arguments."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.usage.usage_lib import UsageContext
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.engine.async_llm import AsyncLLM

from modelpool.engines.canary import Reading
from modelpool.engines.engine import ASGIApp, Facts, LoadError, Phase, ResidencyError, Stats, StillBusy
from modelpool.engines.vllm import canary
from modelpool.engines.vllm.arguments import parsed
from modelpool.engines.vllm.folder import folder_problem
from modelpool.engines.vllm.inspection import register_architecture
from modelpool.engines.vllm.levels import levels, sleep_arguments
from modelpool.engines.vllm.load_stats import LoadStats
from modelpool.engines.vllm.memory import memory_arguments, weights_bytes
from modelpool.engines.vllm.reasons import RootCauses, is_generic, reason
from modelpool.engines.vllm.start_parts import StartParts
from modelpool.messages.engine import HostSpec, StartPhase

logger = logging.getLogger(__name__)

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
# Set by a user, these bind OpenMP's threads. OpenMP reads them when it is loaded, so never in a forked process.
_OPENMP_AT_LOAD = ("GOMP_", "KMP_", "OMP_PLACES", "OMP_PROC_BIND", "VLLM_CPU_OMP_THREADS_BIND")
_CLOSE_S = 5.0


class VllmEngine:
    """An Engine (modelpool.engines.engine) on vLLM."""

    def __init__(
        self, llm: AsyncLLM, arguments: argparse.Namespace, causes: RootCauses, phases: tuple[StartPhase, ...]
    ) -> None:
        self._llm = llm
        self._phases = phases
        self._arguments = arguments
        self._causes = causes
        self._levels = levels(llm, llm.vllm_config)
        self._weights_bytes = weights_bytes(Path(arguments.model))
        self._tasks: tuple[str, ...] = ()
        self._adapters: Mapping[str, LoRARequest] = {}
        self._reloads = False
        self._closed = False

    @classmethod
    def load(cls, spec: HostSpec, phase: Phase) -> VllmEngine:
        causes = RootCauses()
        with causes.collected():
            try:
                return cls._load(spec, phase, causes)
            except LoadError:
                raise
            except Exception as error:
                text = causes.first() or _reason_without_cause(error)
                raise LoadError(text) from error

    @classmethod
    def _load(cls, spec: HostSpec, phase: Phase, causes: RootCauses) -> VllmEngine:
        phase("configuration")
        path = Path(spec.model_path)
        if problem := folder_problem(path, spec.model.engine_args):
            raise LoadError(problem, permanent=True)
        # The token that guards this host is checked in front of the app; vLLM's own key would refuse the gateway.
        os.environ.pop("VLLM_API_KEY", None)
        memory = memory_arguments(
            spec,
            os.environ,
            weights=weights_bytes(path),
            device_total=current_platform.get_device_total_memory(),
            available=psutil.virtual_memory().available,
        )
        arguments = parsed(spec.model, spec.model_path, memory | sleep_arguments())
        _import_parser_plugins(arguments)
        register_architecture(path)
        engine_arguments = AsyncEngineArgs.from_cli_args(arguments)
        propagate_flash_late_interaction(arguments, engine_arguments)
        try:
            config = engine_arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        except ValueError as error:  # also pydantic's: values that do not go together, now and at every other try
            raise LoadError(reason(error), permanent=True) from error
        if current_platform.is_cpu() and config.model_config.enforce_eager:
            # Single functions (ranks of log probabilities) are compiled all the same, by a C++ compiler that a machine
            # may not have, in the first request that asks for them: 12 s here.
            torch._dynamo.config.disable = True
        _prepare_fork(config, executor=arguments.distributed_executor_backend)
        phase("processes")
        parts = StartParts()
        with parts.timed(resolve_obj_by_qualname(config.parallel_config.worker_cls)):
            llm = AsyncLLM.from_vllm_config(
                vllm_config=config,
                usage_context=UsageContext.OPENAI_API_SERVER,
                stat_loggers=[LoadStats],
                enable_log_requests=engine_arguments.enable_log_requests,
                aggregate_engine_logging=engine_arguments.aggregate_engine_logging,
                disable_log_stats=engine_arguments.disable_log_stats,
            )
        causes.first()  # what was reported and overcome says nothing about a later death
        return cls(llm, arguments, causes, parts.parts())

    @property
    def facts(self) -> Facts:
        config = self._llm.vllm_config
        return Facts(
            capacity=config.scheduler_config.max_num_seqs,
            sleep_levels=self._levels.offered,
            weights_bytes=self._weights_bytes,
            phases=self._phases,
            max_model_len=config.model_config.max_model_len,
            num_gpu_blocks=config.cache_config.num_gpu_blocks,
            block_size=config.cache_config.block_size,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        )

    def stats(self) -> Stats:
        # The scheduler reports with each step and is silent when idle: what it said last can be of requests that were
        # aborted since. The frontend's own count is never stale.
        unfinished = self._llm.get_num_unfinished_requests()
        loads = self._loads()
        running = min(unfinished, sum(load.running for load in loads))
        usage = sum(load.kv_cache_usage for load in loads) / len(loads) if loads and unfinished else 0.0
        return Stats(running=running, waiting=unfinished - running, kv_cache_usage=usage)

    def _loads(self) -> list[LoadStats]:
        manager = self._llm.logger_manager
        found = manager.stat_loggers if manager is not None else []
        return [each for each in _flattened(found) if isinstance(each, LoadStats)]

    async def start(self) -> ASGIApp:
        try:
            # As vLLM's own server does: what was made up to profile multimodal input need not stay in memory.
            await self._llm.reset_mm_cache()
            tasks = self._tasks = await self._llm.get_supported_tasks()
            app = build_app(self._arguments, tasks, self._llm.model_config)
            await init_app_state(self._llm, app.state, self._arguments, tasks)
            self._adapters = app.state.openai_serving_models.lora_requests
            # vLLM's error handler tells its server to end when the engine is dead; here the host sees to that.
            app.state.server = SimpleNamespace(should_exit=False)
        except Exception as error:
            raise LoadError(self._causes.first() or reason(error)) from error
        return cast(ASGIApp, app)

    async def sleep(self, level: int, deadline: float) -> int:
        try:
            # What runs without a client, such as a response made in the background, is waited for here.
            async with asyncio.timeout_at(deadline):
                await self._llm.pause_generation(mode="wait")
        except TimeoutError:
            await self._llm.resume_generation()
            raise StillBusy(f"{self._llm.get_num_unfinished_requests()} requests run on") from None
        try:
            freed = await self._levels.sleep(level)
        except Exception as error:
            raise ResidencyError(self._causes.first() or reason(error)) from error
        self._reloads = level == 2
        return freed

    async def wake(self) -> None:
        try:
            await self._levels.wake()
            # Loading the weights again forgets the adapters.
            for adapter in self._adapters.values() if self._reloads else ():
                await self._llm.add_lora(adapter)
        except Exception as error:
            raise ResidencyError(self._causes.first() or reason(error)) from error
        self._reloads = False

    async def canary(self) -> Mapping[str, Reading]:
        try:
            readings = {"": await canary.read(self._llm, self._tasks)}
            for name, adapter in self._adapters.items():
                readings[name] = await canary.read(self._llm, self._tasks, adapter)
        except Exception as error:
            raise ResidencyError(self._causes.first() or reason(error)) from error
        return readings

    async def dead(self) -> str:
        processes = self._llm.engine_core.resources.engine_manager.processes
        ended = await _first_ended([process.sentinel for process in processes])
        process = processes[ended]
        process.join(1)
        return self._causes.first() or f"{process.name} ended with status {process.exitcode}"

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._llm.shutdown(timeout=_CLOSE_S)


def _flattened(items: Any) -> list[Any]:
    if isinstance(items, list | tuple):
        return [each for item in items for each in _flattened(item)]
    if isinstance(inner := getattr(items, "per_engine_stat_loggers", None), dict):
        return list(inner.values())
    return [items]


def _import_parser_plugins(arguments: argparse.Namespace) -> None:
    if len(arguments.tool_parser_plugin or "") > 3:
        ToolParserManager.import_tool_parser(arguments.tool_parser_plugin)
    if len(arguments.reasoning_parser_plugin or "") > 3:
        ReasoningParserManager.import_reasoning_parser(arguments.reasoning_parser_plugin)


def _prepare_fork(config: VllmConfig, *, executor: str | None) -> None:
    """Have EngineCore and its workers forked from this process, which has imported all that they need.

    vLLM spawns them where a fork is not safe: where the accelerator is open, and, as it sets itself, on a CPU, where
    OpenMP must find its environment before it is loaded. We fork there too, unless a user binds threads by hand, and
    pass on the number of threads, all that a fork needs, through torch. Then a single worker needs no process of its
    own either, as it has none on an accelerator, unless a user asks for one (`executor`).
    """
    if not current_platform.is_cpu():
        os.environ.setdefault(_START_METHOD, "fork")
        return
    if any(name.startswith(_OPENMP_AT_LOAD) for name in os.environ):
        return
    os.environ[_START_METHOD] = "fork"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    parallel = config.parallel_config
    torch.set_num_threads(_threads(os.environ, parallel.local_world_size))
    if parallel.world_size == 1 and executor is None:
        parallel.distributed_executor_backend = "uni"


def _threads(environment: Mapping[str, str], processes: int) -> int:
    """OpenMP threads of one worker process: its part of the cores, less one that schedules and serves."""
    if (given := environment.get("OMP_NUM_THREADS", "")).isdecimal():
        return max(1, int(given))
    cores = psutil.cpu_count(logical=False) or 1
    cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, (cores - 1) // processes)


def _reason_without_cause(error: Exception) -> str:
    if not is_generic(error):
        return reason(error)
    # No process was left to say anything.
    return "A process of the engine was killed while it loaded: the machine may be out of memory. See the log."


async def _first_ended(sentinels: list[int]) -> int:
    """Wait until one of these descriptors is at its end; returns which."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def note(index: int) -> None:
        if not ended.done():
            ended.set_result(index)

    for index, sentinel in enumerate(sentinels):
        loop.add_reader(sentinel, note, index)
    try:
        return await ended
    finally:
        for sentinel in sentinels:
            loop.remove_reader(sentinel)
