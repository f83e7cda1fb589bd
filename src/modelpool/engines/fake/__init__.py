"""An engine without a model: vLLM's routes and answers, with load, speed, crashes and stalls as the test wants them."""

from __future__ import annotations

import importlib

from modelpool.engines.engine import Engine, Phase
from modelpool.messages.engine import HostSpec


def preload() -> None:
    importlib.import_module("modelpool.engines.fake.engine")


def start_survivors() -> None:
    """Nothing outlives a fake host."""


def load(spec: HostSpec, phase: Phase) -> Engine:
    from modelpool.engines.fake.engine import FakeEngine

    return FakeEngine.load(spec, phase)
