"""What the forkserver imports, so that no host has to."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

from modelpool.engines.engine import NotForkable, NotInstalled

# Read by libraries when they are loaded, so before the first import. A user's own setting wins.
_ENVIRONMENT = {
    # Otherwise numpy starts threads, and a process with threads cannot be forked safely.
    "OPENBLAS_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Models are local folders by the time a host sees them.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# In the order of a start: configuration, engine, worker, HTTP surface. What no import statement of these reaches is
# imported late, inside functions; the contract test over cold starts finds it.
_MODULES = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.entrypoints.launchers.app",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.structured_output.backend_xgrammar",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.pooling.factories",
    "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.factories",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.serve.instrumentator.offline_docs",
    "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    # Sets the level of the log handlers that it finds, so it must not find a host's.
    "model_hosting_container_standards.sagemaker",
    "modelpool.engines.vllm.engine",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.auto",
)
_CPU_MODULES = (
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.attention.backends.cpu_attn",
)
_GPU_MODULES = (
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.attention.backends.flash_attn",
)


class _Logger(logging.Logger):
    """Told its level again, it does nothing.

    vLLM configures logging anew in each of its processes. That tells a thousand loggers their level, and each of them
    would then clear the caches of all: 0.1 s a process.
    """

    def setLevel(self, level: int | str) -> None:
        if level != self.level:
            super().setLevel(level)


def preload() -> None:
    """Raises NotInstalled, NotForkable, and whatever a broken installation raises."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.setLoggerClass(_Logger)
    try:
        importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise NotInstalled(
            "vLLM is not installed: pip install 'modelpool[gpu]', or 'modelpool[cpu]' without an accelerator"
        ) from error
    for name in _MODULES:
        importlib.import_module(name)
    platform = importlib.import_module("vllm.platforms").current_platform
    for name in _CPU_MODULES if platform.is_cpu() else _GPU_MODULES if platform.is_cuda_alike() else ():
        importlib.import_module(name)
    _override_kernels(platform)
    sys.modules["modelpool.engines.vllm.arguments"].new_parser()
    if sys.modules["torch"].cuda.is_initialized():
        raise NotForkable("its imports opened the accelerator")


def _override_kernels(platform: Any) -> None:
    """Do once what each worker would do: on a CPU, vLLM puts C++ in the place of Triton kernels, which it looks for
    under every name of every module. That is a third of all work at a start.
    """
    platform.register_triton_kernel_overrides()
    platform.register_triton_kernel_overrides = lambda: None
