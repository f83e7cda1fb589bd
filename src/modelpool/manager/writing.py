"""Changes are made one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from modelpool.manager.store import Store, StoreError


class Writing(asyncio.Lock):
    """Held while something is looked up, written, and known."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    @asynccontextmanager
    async def in_turn(self) -> AsyncIterator[None]:
        """Held for what somebody asks. Raises StoreError for who waited for it while the store proved to be silent: of
        many that ask meanwhile none waits longer than two of them would.
        """
        silences = self._store.silences
        async with self:
            if self._store.silences != silences:
                raise StoreError("The store has not answered those that asked before.")
            yield
