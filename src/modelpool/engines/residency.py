"""How a host's engine gives its memory back and takes it again: closed to requests first, and open only when sound."""

from __future__ import annotations

import asyncio
import logging

from modelpool.engines.canary import Baseline, Unsteady, baseline, damage
from modelpool.engines.engine import Engine, ResidencyError, StillBusy
from modelpool.engines.meter import Meter
from modelpool.messages.engine import Drained, SleepFailed, SleepRefused, Slept, WakeFailed, Woken

logger = logging.getLogger(__name__)

_PAUSE_S = 2.0
"""What an engine has to come to rest once its clients are served, however little time they had."""


class Residency:
    """One engine's level: 0 awake, 1, 2. One call at a time.

    Requests in flight are never cut for a sleep: where they do not end in time, the engine stays awake.
    """

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self.level = 0
        self._engine = engine
        self._meter = meter
        self._sound: dict[str, Baseline] = {}
        self._quiet_by = 0.0

    async def drain(self, drain_s: float) -> Drained | SleepRefused:
        """Closed from now on."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._meter.closed = True
        try:
            async with asyncio.timeout_at(began + drain_s):
                await self._meter.idle()
        except TimeoutError:
            return self._stayed(f"{self._meter.inflight} requests were in flight after {drain_s:g} s")
        self._quiet_by = began + drain_s
        return Drained(loop.time() - began)

    async def sleep(self, level: int) -> Slept | SleepRefused | SleepFailed:
        if level <= self.level or level not in self._engine.facts.sleep_levels or not self._meter.closed:
            return self._stayed(f"it cannot go from level {self.level} to level {level}")
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            if not self.level:
                await self._measure()
            # Work without a client, such as an answer made in the background, may take what the drain has left.
            freed = await self._engine.sleep(level, max(self._quiet_by, loop.time() + _PAUSE_S))
        except StillBusy as error:
            return self._stayed(str(error))
        except Unsteady as error:
            return self._stayed(f"it could not be checked after waking: {error}")
        except ResidencyError as error:
            logger.exception("not asleep")
            return SleepFailed(f"it could not be put to sleep: {error}")
        self.level = level
        return Slept(level=level, seconds=loop.time() - began, freed_bytes=freed)

    def _stayed(self, reason: str) -> SleepRefused:
        self._meter.closed = self.level > 0
        logger.warning("stays at level %d: %s", self.level, reason)
        return SleepRefused(reason)

    async def _measure(self) -> None:
        """Know what the sound model makes of the canary's prompt; of adapters too that came since the last time."""
        first = await self._engine.canary()
        if first.keys() - self._sound.keys():
            second = await self._engine.canary()
            fresh = {name: baseline(reading, second[name]) for name, reading in first.items() if name in second}
            self._sound = fresh | self._sound
        self._sound = {name: sound for name, sound in self._sound.items() if name in first}

    async def wake(self) -> Woken | WakeFailed:
        loop = asyncio.get_running_loop()
        began, level = loop.time(), self.level
        try:
            await self._engine.wake()
            awake = loop.time()
            problem = damage(self._sound, await self._engine.canary())
        except ResidencyError as error:
            logger.exception("not awake")
            return WakeFailed(f"it could not be woken: {error}")
        if problem:
            logger.error("the canary: %s", problem)
            return WakeFailed(f"wrong after waking from level {level}: {problem}")
        self.level = 0
        self._meter.closed = False
        return Woken(level=level, seconds=loop.time() - began, canary_s=loop.time() - awake)
