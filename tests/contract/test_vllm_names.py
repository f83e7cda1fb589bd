"""Every name of vLLM that is used and that another version might move, tried in a process of its own."""

from __future__ import annotations

import subprocess
import sys

CHECKS = """
import argparse, inspect, logging

from modelpool.engines.vllm.imports import preload
preload()

# What an engine reaches into.
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import BackgroundResources, MPClient
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter, StatLoggerManager
parameters = inspect.signature(AsyncLLM.from_vllm_config).parameters
assert {"vllm_config", "usage_context", "stat_loggers", "enable_log_requests", "disable_log_stats"} <= set(parameters)
assert "timeout" in inspect.signature(AsyncLLM.shutdown).parameters
assert callable(AsyncLLM.get_num_unfinished_requests) and callable(AsyncLLM.reset_mm_cache)
assert "engine_manager" in BackgroundResources.__annotations__
assert "self.processes" in inspect.getsource(CoreEngineProcManager.__init__)
assert "self.logger_manager" in inspect.getsource(AsyncLLM.__init__)
assert "self.stat_loggers" in inspect.getsource(StatLoggerManager.__init__)
assert "self.per_engine_stat_loggers" in inspect.getsource(PerEngineStatLoggerAdapter.__init__)

# What sleep levels are made of.
from vllm.config import CacheConfig, ModelConfig, MultiModalConfig, ParallelConfig, VllmConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker
assert "mode" in inspect.signature(AsyncLLM.sleep).parameters
assert {"mode", "clear_cache"} <= set(inspect.signature(AsyncLLM.pause_generation).parameters)
for name in ("wake_up", "resume_generation", "collective_rpc", "reset_prefix_cache", "add_lora", "generate", "encode"):
    assert callable(getattr(AsyncLLM, name)), name
for name in ("reload_weights", "load_model", "determine_available_memory", "initialize_from_config",
             "compile_or_warm_up_model"):
    assert callable(getattr(CPUWorker, name)) and callable(getattr(Worker, name)), name
assert callable(CPUModelRunner.get_model) and "self.kv_caches" in inspect.getsource(CPUModelRunner.__mro__[1].__init__)
assert hasattr(ParallelConfig, "worker_extension_cls") and hasattr(ParallelConfig, "worker_cls")
from vllm.platforms import current_platform
assert callable(current_platform.is_sleep_mode_available) and callable(current_platform.is_cumem_allocator_available)
assert hasattr(ModelConfig, "enable_sleep_mode") and hasattr(ModelConfig, "is_encoder_decoder")
assert hasattr(CacheConfig, "kv_offloading_size") and hasattr(MultiModalConfig, "mm_encoder_tp_mode")
assert "speculative_config" in VllmConfig.__dataclass_fields__
from vllm.model_executor.layers import utils as layers
assert "layer.cpu_linear" in inspect.getsource(layers.dispatch_cpu_unquantized_gemm)
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
assert "self.lora_requests" in inspect.getsource(OpenAIServingModels.__init__)
from vllm import PoolingParams, SamplingParams
SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=2, logprobs=2, detokenize=False)
PoolingParams(task="embed")

# vLLM's sleep mode, which needs an accelerator: at least the order of its calls, and for whom they are made.
import asyncio
from types import SimpleNamespace as Namespace
from modelpool.engines.vllm.levels import SleepMode, sleep_mode_levels
called = []
class Recorder:
    def __getattr__(self, name):
        async def call(*args, **kwargs):
            inspect.signature(getattr(AsyncLLM, name)).bind(self, *args, **kwargs)
            called.append((name, *args, *kwargs.values()))
        return call
async def ladder(*levels):
    called.clear()
    mode = SleepMode(Recorder(), (1, 2))
    for level in levels:
        await mode.sleep(level)
    await mode.wake()
    return [*called]
shallow = [("wake_up",), ("reset_prefix_cache",)]
deep = [("wake_up", ["weights"]), ("collective_rpc", "reload_weights"), ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache",)]
assert asyncio.run(ladder(1)) == [("sleep", 1, "wait"), *shallow]
assert asyncio.run(ladder(2)) == [("sleep", 2, "wait"), *deep]
assert asyncio.run(ladder(1, 2)) == [("sleep", 1, "wait"), *shallow, ("sleep", 2, "wait"), *deep]
def config(sleeps=True, offload=None, draft=None, split=None):
    multimodal = split and Namespace(mm_encoder_tp_mode=split)
    return Namespace(
        model_config=Namespace(enable_sleep_mode=sleeps, multimodal_config=multimodal),
        cache_config=Namespace(kv_offloading_size=offload),
        speculative_config=draft,
    )
assert sleep_mode_levels(config()) == sleep_mode_levels(config(split="weights")) == (1, 2)
assert sleep_mode_levels(config(draft="a draft model")) == (1,)
for without in (config(sleeps=False), config(offload=1.0), config(split="data")):
    assert sleep_mode_levels(without) == ()

# The scheduler's figures.
from vllm.v1.metrics.stats import SchedulerStats
stats = SchedulerStats()
assert (stats.num_running_reqs, stats.kv_cache_usage) == (0, 0.0)

# Where vLLM logs the exception that ends a process.
import vllm.v1.engine.core, vllm.v1.executor.multiproc_executor
from modelpool.engines.vllm import reasons
for name in reasons._LOGGERS:
    __import__(name)
    assert name in logging.root.manager.loggerDict, name
assert "failed to start" in inspect.getsource(vllm.v1.executor.multiproc_executor)

# That the start method is the environment's, read when a process is started.
import os
from vllm.utils.system_utils import get_mp_context
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
assert get_mp_context().get_start_method() == "fork"

# The parser: names with dashes, flags with their opposites, lists.
from modelpool.engines.vllm.arguments import new_parser, rendered
parser = new_parser()
assert rendered(parser, "enforce_eager", True) == ["--enforce-eager"]
assert rendered(parser, "enable_prefix_caching", False) == ["--no-enable-prefix-caching"]
assert rendered(parser, "max_num_seqs", 4) == ["--max-num-seqs=4"]
assert rendered(parser, "served_model_name", ["a", "b"]) == ["--served-model-name", "a", "b"]
assert rendered(parser, "allowed_origins", ["*"]) == ['--allowed-origins=["*"]']
assert rendered(parser, "hf_overrides", {"a": 1}) == ['--hf-overrides={"a": 1}']
assert rendered(parser, "max_model_len", None) == []
assert rendered(parser, "middleware", ["a.b", "c.d"]) == ["--middleware=a.b", "--middleware=c.d"]

# A single worker on a CPU has no process of its own: the executor is chosen by the configuration, after it was made.
from vllm.config import ParallelConfig
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
assert "Executor.get_class(vllm_config)" in inspect.getsource(AsyncLLM.from_vllm_config)
assert "distributed_executor_backend" in inspect.getsource(Executor.get_class)
assert "uni" in inspect.getsource(Executor.get_class)

# What was done ahead is not done again: C++ in the place of Triton kernels, levels of loggers.
from vllm.triton_utils import HAS_TRITON
from vllm.triton_utils.dispatcher import _registry
from vllm.v1.worker.worker_base import WorkerWrapperBase
assert "current_platform.register_triton_kernel_overrides()" in inspect.getsource(WorkerWrapperBase.init_worker)
assert HAS_TRITON or not current_platform.is_cpu() or _registry
registered = dict(_registry)
current_platform.register_triton_kernel_overrides()
assert _registry == registered
assert logging.getLogger("vllm.v1.engine.core").setLevel.__module__ == "modelpool.engines.vllm.imports"

# The registry of architectures.
from vllm.model_executor.models.registry import ModelRegistry
known = ModelRegistry.models["Qwen3ForCausalLM"]
ModelRegistry.register_model("Qwen3ForCausalLM", known.load_model_cls())
assert ModelRegistry.models["Qwen3ForCausalLM"].inspect_model_cls().is_text_generation_model

# Every route is for clients, or is kept from them on purpose. Pooling's are added only with a model.
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.cohere import api_router as cohere
from vllm.entrypoints.pooling.classify import api_router as classify
from vllm.entrypoints.pooling.embed import api_router as embed
from vllm.entrypoints.pooling.pooling import api_router as pooling
from vllm.entrypoints.pooling.scoring import api_router as scoring
from modelpool.relay.inference import FORM_PATHS, JSON_PATHS, WEBSOCKET_PATHS, inference_methods
def served(routes):
    for route in routes:
        if hasattr(route, "original_router"):
            yield from served(route.original_router.routes)
        elif hasattr(route, "path"):
            yield from ((route.path, method) for method in getattr(route, "methods", None) or {"WebSocket"})
app = build_app(parser.parse_args(["--model", "x"]), ("generate", "transcription", "realtime"), None)
theirs = set(served(app.routes))
for module in (classify, embed, pooling, scoring):
    theirs |= set(served(module.router.routes))
cohere_paths = {path for path in JSON_PATHS if path.startswith("/cohere/")}
assert all(f'"{path}"' in inspect.getsource(cohere) for path in cohere_paths)
kept = {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/load", "/metrics", "/ping", "/invocations"}
kept |= {"/kv_event_sources", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/abort_requests"}
wrong = {(path, method) for path, method in theirs if path not in kept
    and method not in inference_methods(path.replace("{response_id}", "resp_1"))}
assert wrong == {(path, "WebSocket") for path in WEBSOCKET_PATHS}, wrong
assert not [path for path in kept if inference_methods(path)]
assert JSON_PATHS | FORM_PATHS <= {path for path, method in theirs if method == "POST"} | cohere_paths

# What the fake engine answers is what vLLM's own classes take.
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicStreamEvent
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse, ChatCompletionStreamResponse
from vllm.entrypoints.openai.completion.protocol import CompletionResponse
from vllm.entrypoints.pooling.classify.protocol import ClassificationResponse
from vllm.entrypoints.pooling.embed.protocol import EmbeddingResponse
from vllm.entrypoints.pooling.pooling.protocol import PoolingResponse
from vllm.entrypoints.pooling.scoring.protocol import RerankResponse, ScoreResponse
from modelpool.engines.fake.engine import FakeEngine
from modelpool.messages.models import ModelSpec
from modelpool.testing.asgi import post
from modelpool.testing.virtual_time import run_virtual
async def asked(path, body):
    return await post(path, body).run(await FakeEngine(ModelSpec(alias="m", fake=True)).start())
chat = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
for path, body, type_ in [
    ("/v1/chat/completions", chat, ChatCompletionResponse),
    ("/v1/completions", {"prompt": "hi"}, CompletionResponse),
    ("/v1/messages", chat, AnthropicMessagesResponse),
    ("/v1/embeddings", {"input": "hi"}, EmbeddingResponse),
    ("/classify", {"input": "hi"}, ClassificationResponse),
    ("/pooling", {"input": "hi"}, PoolingResponse),
    ("/score", {"text_1": "a", "text_2": "b"}, ScoreResponse),
    ("/rerank", {"query": "a", "documents": ["b"]}, RerankResponse),
]:
    answer = run_virtual(asked(path, body))
    assert answer.status == 200, (path, answer.body)
    type_.model_validate(answer.json)
for path, type_ in [("/v1/chat/completions", ChatCompletionStreamResponse), ("/v1/messages", AnthropicStreamEvent)]:
    for event in run_virtual(asked(path, {**chat, "stream": True})).events:
        assert event == "[DONE]" or type_.model_validate(event)
from vllm.entrypoints.speech_to_text.realtime import protocol as realtime
from vllm.entrypoints.speech_to_text.realtime.connection import RealtimeConnection
taken = inspect.getsource(RealtimeConnection)
for name in ("session.update", "input_audio_buffer.append", "input_audio_buffer.commit"):
    assert f'"{name}"' in taken
sent = (realtime.SessionCreated(), realtime.TranscriptionDelta(delta=""), realtime.TranscriptionDone(text=""))
assert [each.type for each in sent] == ["session.created", "transcription.delta", "transcription.done"]
assert set(realtime.ErrorEvent.model_fields) == {"type", "error", "code"}
assert 'event.get("model")' in taken  # at its top, where the gateway looks for it

# What the preload leaves behind is safe to fork.
assert len(os.listdir("/proc/self/task")) == 1
print("all there")
"""


def test_the_names_of_vllm_that_are_used_are_there() -> None:
    result = subprocess.run([sys.executable, "-c", CHECKS], capture_output=True, text=True, timeout=240)
    assert result.stdout.endswith("all there\n"), result.stderr[-3000:]
