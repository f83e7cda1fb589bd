"""The right to give orders: as long as the store says that nobody else is the manager."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from modelpool.manager.store import NotHeld, Store, StoreError

log = logging.getLogger(__name__)

_MARGIN = 0.1
"""Of a lease: what two clocks may differ by while it lasts."""
_RETRY_S = 0.5


class Lease:
    """Not valid once the store has been out of reach for longer than it lasts, or this process has been stopped.

    `alone`: valid until another manager shows in the store all the same (Holder). `back` is awaited when the store can
    be used again after it could not: what it was sent last may have been done.
    """

    def __init__(self, store: Store, lease_s: float, *, alone: bool, back: Callable[[], Awaitable[None]]) -> None:
        self._store = store
        self._lease_s = lease_s
        self._alone = alone
        self._back = back
        self._until = 0.0

    @property
    def valid(self) -> bool:
        return self._alone or _now() < self._until

    async def begin(self) -> None:
        """Raises NotHeld, and StoreError where nobody could be sure of it."""
        try:
            await self.renew()
        except NotHeld:
            raise
        except StoreError:
            if not self._alone:
                raise

    async def renew(self) -> None:
        """Raises NotHeld, StoreError."""
        asked = _now()
        await self._store.renew()
        self._until = asked + self._lease_s * (1 - _MARGIN)

    async def keep(self) -> None:
        """Renew it, until cancelled. Raises NotHeld."""
        while True:
            try:
                async with asyncio.timeout(self._lease_s / 3):
                    await self._store.trouble.wait()
            except TimeoutError:
                pass
            await self._renew_at_last()

    async def _renew_at_last(self) -> None:
        """Return once it is renewed, and what came of the trouble is known. Raises NotHeld."""
        told = False
        while True:
            doubtful = self._store.trouble.is_set()
            self._store.trouble.clear()
            try:
                await self.renew()
                if doubtful:
                    await self._back()
                if told:
                    log.info("the store can be used again")
                return
            except NotHeld:
                raise
            except StoreError as error:
                if not told:
                    without = "nothing is kept" if self._alone else "no orders"
                    log.warning("%s while the store is out: %s", without, error)
                told = True
                self._store.trouble.set()
                await asyncio.sleep(_RETRY_S)


def _now() -> float:
    """Time that passes while this process is stopped, and while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
