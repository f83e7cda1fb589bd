"""The fake engine: slots, a clock, and text that is known in advance."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable

from modelpool.engines.engine import ASGIApp, Facts, LoadError, Phase, Stats
from modelpool.engines.fake.app import FakeApp
from modelpool.engines.fake.behaviour import Behaviour
from modelpool.engines.fake.slots import Slots
from modelpool.messages.engine import HostSpec
from modelpool.messages.models import ModelSpec

DEFAULT_MAX_MODEL_LEN = 32768


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class FakeEngine:
    """An Engine (modelpool.engines.engine) that computes nothing."""

    def __init__(self, model: ModelSpec, crash: Callable[[], None] = _die) -> None:
        self.model = model
        self.slots = Slots(model.fake_capacity)
        self._crash = crash

    @classmethod
    def load(cls, spec: HostSpec, phase: Phase) -> FakeEngine:
        phase("load")
        # Loading blocks, as a real engine's does: there is no loop yet.
        time.sleep(spec.model.fake_load_ms / 1000)
        if spec.model.fake_load_error is not None:
            raise LoadError(spec.model.fake_load_error)
        return cls(spec.model)

    @property
    def facts(self) -> Facts:
        return Facts(
            capacity=self.model.fake_capacity,
            max_model_len=self.model.max_model_len or DEFAULT_MAX_MODEL_LEN,
            max_num_seqs=self.model.fake_capacity,
        )

    def stats(self) -> Stats:
        usage = self.slots.running / self.model.fake_capacity
        return Stats(running=self.slots.running, waiting=self.slots.waiting, kv_cache_usage=usage)

    async def start(self) -> ASGIApp:
        return FakeApp(self)

    async def dead(self) -> str:
        # A fake crash takes the whole process with it, so there is nothing to wait for but the end of the host.
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Nothing is held."""

    async def generate(self, count: int, how: Behaviour) -> AsyncGenerator[int, None]:
        """Yield 0, 1, … `count` - 1, each when that token is made, holding a slot meanwhile.

        Delay counts from the slot, not from the call: the requests before take their time first.
        """
        loop = asyncio.get_running_loop()
        async with self.slots.taken():
            due = loop.time() + how.delay_ms / 1000
            for made in range(count + 1):
                if made == count and how.crash_after_tokens != count and how.stall_after_tokens != count:
                    return
                # The token before is on its way once the loop has turned.
                await asyncio.sleep(max(0.0, due - loop.time()))
                if made == how.crash_after_tokens:
                    self._crash()
                if made == how.stall_after_tokens:
                    await asyncio.Event().wait()
                yield made
                due += how.token_ms / 1000
