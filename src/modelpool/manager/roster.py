"""The workers as the store has them: those for whom the next manager waits."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from modelpool.manager.store import Store, StoreError

log = logging.getLogger(__name__)


class Roster:
    """Workers come and go while the store is out too; it is told of that later. Not from two tasks at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._left: set[str] = set()
        """Of whom the store still knows, and that they were being drained."""

    async def enter(self, worker_id: str, url: str) -> None:
        """Raises StoreError; the worker may be there all the same."""
        await self.settle()
        await self._store.remember_worker(worker_id, url)

    async def leave(self, worker_id: str, *, later: bool) -> None:
        """`later`: it is not tried now to write it down."""
        self._left.add(worker_id)
        if later:
            return
        try:
            await self.settle()
        except StoreError as error:
            log.warning("that worker %s has left is written down later: %s", worker_id, error)

    async def settle(self) -> None:
        """The store knows nothing any more of those who left. Raises StoreError."""
        for worker_id in sorted(self._left):
            await self._store.forget_worker(worker_id)
            self._left.discard(worker_id)

    async def catch_up(self, there: Mapping[str, str]) -> None:
        """The store knows of those who are there, by their names, where they are. Raises StoreError."""
        await self.settle()
        known = await self._store.workers()
        for worker_id, url in there.items():
            if known.get(worker_id) != url:
                await self._store.remember_worker(worker_id, url)
