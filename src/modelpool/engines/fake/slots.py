"""Places in a batch: as many requests run as there are slots, the others wait in the order they came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Slots:
    def __init__(self, capacity: int) -> None:
        self._free = asyncio.Semaphore(capacity)
        self._unused = asyncio.Event()
        self._unused.set()
        self.running = 0
        self.waiting = 0

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """Wait for a slot and hold it. Cancelled while waiting or running, it is free at once."""
        self.waiting += 1
        self._unused.clear()
        try:
            try:
                await self._free.acquire()
            finally:
                self.waiting -= 1
            self.running += 1
            try:
                yield
            finally:
                self.running -= 1
                self._free.release()
        finally:
            if not self.running and not self.waiting:
                self._unused.set()

    async def unused(self) -> None:
        """Return once nobody holds a slot or waits for one."""
        await self._unused.wait()
