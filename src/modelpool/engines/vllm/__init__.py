"""vLLM, hosted in process: its AsyncLLM and its own OpenAI app. Nothing outside this package imports vLLM."""

from __future__ import annotations

from multiprocessing import resource_tracker

from modelpool.engines.engine import Engine, Phase
from modelpool.messages.engine import HostSpec


def preload() -> None:
    from modelpool.engines.vllm.imports import preload

    preload()


def start_survivors() -> None:
    """vLLM's queues are shared memory, which its creator's resource tracker removes when all its users are gone.

    The tracker is a process; killed together with the host it would leave the memory behind for good.
    """
    resource_tracker.ensure_running()


def load(spec: HostSpec, phase: Phase) -> Engine:
    from modelpool.engines.vllm.engine import VllmEngine

    return VllmEngine.load(spec, phase)
