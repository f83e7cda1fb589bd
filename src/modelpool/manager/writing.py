"""Changes are made one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from modelpool.manager.store import Store, StoreError


class Silent(StoreError):
    def __init__(self) -> None:
        super().__init__("The store has not answered those that asked before.")


class Writing:
    """Held while something is looked up, written, and known.

    While the store is silent whoever holds it waits for that once, and those behind, who came meanwhile, do not wait
    for the same: what may be refused is, what may be written later will be.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def in_turn(self) -> AsyncIterator[None]:
        """Raises Silent for who waited for it while the store proved to be silent."""
        async with self.at_last() as silent:
            if silent:
                raise Silent
            yield

    @asynccontextmanager
    async def at_last(self) -> AsyncIterator[bool]:
        """For what is done in any case. True for who waited for it while the store proved to be silent."""
        silences = self._store.silences
        async with self._lock:
            yield self._store.silences != silences
