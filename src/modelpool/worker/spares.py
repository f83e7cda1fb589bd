"""Hosts that are forked ahead and wait for a model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from modelpool.worker.forked_host import EngineUnavailable, ForkedHost, ForkFailed

log = logging.getLogger(__name__)

_REFILL_S = 2.0
"""The start that took a spare host goes first; and where hosts die as they are forked, this is the pace."""


class Spares:
    """Keeps `count` of them while `keep` runs, each gone or taken replaced by another.

    They outlive their forkserver as any host does, so that a start need not wait until another one has imported.
    `fork` may wait for a forkserver, and raises EngineUnavailable, ForkFailed.
    """

    def __init__(self, count: int, fork: Callable[[], Awaitable[ForkedHost]]) -> None:
        self._count = count
        self._fork = fork
        self._waiting: list[ForkedHost] = []
        self._missing = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def pids(self) -> tuple[int, ...]:
        return tuple(host.pid for host in self._waiting)

    def take(self) -> ForkedHost | None:
        """One that lives, for the caller to own; None where there is none."""
        while self._waiting:
            self._missing.set()
            host = self._waiting.pop(0)
            if host.group.alive():
                return host
            host.close()
        return None

    async def keep(self) -> None:
        """Until cancelled; then none is left."""
        try:
            while True:
                self._missing.clear()
                await self._fill()
                await self._missing.wait()
                await asyncio.sleep(_REFILL_S)
        except EngineUnavailable:
            return
        finally:
            for host in self._waiting:
                host.group.kill()
                host.close()
            self._waiting.clear()

    async def _fill(self) -> None:
        try:
            while len(self._waiting) < self._count:
                host = await self._fork()
                self._waiting.append(host)
                host.exit.add_done_callback(partial(self._lose, host))
        except ForkFailed as error:
            log.warning("no spare host: %s", error)
            self._missing.set()

    def _lose(self, host: ForkedHost, _exit: asyncio.Future[int | None]) -> None:
        """It has ended. Where it was taken before, that is for its owner to see."""
        if host in self._waiting:
            log.warning("the spare host %d has ended", host.pid)
            self._waiting.remove(host)
            host.close()
            self._missing.set()
