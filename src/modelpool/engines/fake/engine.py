"""The fake engine: slots, a clock, and text that is known in advance."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable, Mapping

from modelpool.engines.canary import Reading
from modelpool.engines.engine import ASGIApp, Facts, LoadError, Phase, ResidencyError, Stats, StillBusy
from modelpool.engines.fake.app import FakeApp
from modelpool.engines.fake.behaviour import Behaviour
from modelpool.engines.fake.held import Memory, ProcessMemory, memory_of
from modelpool.engines.fake.slots import Slots
from modelpool.fake_gpus import OutOfMemory
from modelpool.messages.engine import HostSpec
from modelpool.messages.models import ModelSpec

DEFAULT_MAX_MODEL_LEN = 32768
_SOUND = Reading(vector=(1.0, 0.0))
_DAMAGED = Reading(vector=(0.0, 1.0))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class FakeEngine:
    """An Engine (modelpool.engines.engine) that computes nothing."""

    def __init__(self, model: ModelSpec, crash: Callable[[], None] = _die, memory: Memory | None = None) -> None:
        self.model = model
        self.slots = Slots(model.fake_capacity)
        self._crash = crash
        self._memory = memory or ProcessMemory(model)
        self._level = 0
        self._awake = asyncio.Event()
        self._awake.set()
        self._woken = False

    @classmethod
    def load(cls, spec: HostSpec, phase: Phase) -> FakeEngine:
        phase("load")
        # Loading blocks, as a real engine's does: there is no loop yet.
        time.sleep(spec.model.fake_load_ms / 1000)
        if spec.model.fake_load_error is not None:
            raise LoadError(spec.model.fake_load_error)
        engine = cls(spec.model, memory=memory_of(spec))
        try:
            engine._memory.hold(0)
        except OutOfMemory as error:
            raise LoadError(str(error)) from error
        return engine

    @property
    def facts(self) -> Facts:
        return Facts(
            capacity=self.model.fake_capacity,
            sleep_levels=(1, 2),
            weights_bytes=int(self.model.fake_weights_mb * 10**6),
            max_model_len=self.model.max_model_len or DEFAULT_MAX_MODEL_LEN,
            max_num_seqs=self.model.fake_capacity,
        )

    def stats(self) -> Stats:
        usage = self.slots.running / self.model.fake_capacity
        return Stats(running=self.slots.running, waiting=self.slots.waiting, kv_cache_usage=usage)

    async def start(self) -> ASGIApp:
        return FakeApp(self)

    async def sleep(self, level: int, deadline: float) -> int:
        try:
            async with asyncio.timeout_at(deadline):
                await self.slots.unused()
        except TimeoutError:
            raise StillBusy(f"{self.slots.running + self.slots.waiting} requests run on") from None
        self._awake.clear()
        await asyncio.sleep(self.model.fake_sleep_ms / 1000)
        if self.model.fake_sleep_error is not None:
            raise ResidencyError(self.model.fake_sleep_error)
        try:
            freed = self._memory.hold(level)
        except OutOfMemory as error:
            raise ResidencyError(str(error)) from error
        self._level = level
        return freed

    async def wake(self) -> None:
        reload_ms = self.model.fake_reload_ms if self._level == 2 else 0
        await asyncio.sleep((self.model.fake_wake_ms + reload_ms) / 1000)
        if self.model.fake_wake_error is not None:
            raise ResidencyError(self.model.fake_wake_error)
        try:
            self._memory.hold(0)
        except OutOfMemory as error:
            raise ResidencyError(str(error)) from error
        self._level = 0
        self._woken = True
        self._awake.set()

    async def canary(self) -> Mapping[str, Reading]:
        return {"": _DAMAGED if self._woken and self.model.fake_wrong_canary else _SOUND}

    async def dead(self) -> str:
        # A fake crash takes the whole process with it, so there is nothing to wait for but the end of the host.
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Nothing is held."""

    async def generate(self, count: int, how: Behaviour) -> AsyncGenerator[int, None]:
        """Yield 0, 1, … `count` - 1, each when that token is made, holding a slot meanwhile. Asleep, it makes none.

        Delay counts from the slot, not from the call: the requests before take their time first.
        """
        loop = asyncio.get_running_loop()
        async with self.slots.taken():
            await self._awake.wait()
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
