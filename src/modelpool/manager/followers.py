"""The gateways that follow this manager: each has a queue of what it is still to be told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from contextlib import suppress

from modelpool.messages.routing import KEEPALIVE_S, Update

_BACKLOG = 256
_TELL_S = 0.5


class Followers:
    def __init__(self) -> None:
        self.came = asyncio.Event()
        """One has been told all that there is."""
        self._queues: dict[asyncio.Queue[Update], str] = {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._queues.values())

    def tell(self, update: Update, names: Collection[str] | None = None) -> None:
        """Tell all, or those of these names."""
        for queue, name in list(self._queues.items()):
            if names is not None and name not in names:
                continue
            try:
                queue.put_nowait(update)
            except asyncio.QueueFull:
                self._queues.pop(queue, None)  # it sees no more keepalives, and asks for a new snapshot

    async def follow(self, name: str, whole: Callable[[], Iterable[Update]]) -> AsyncGenerator[Update | None, None]:
        """The `whole` as it is now, then what is told; None where there was nothing for KEEPALIVE_S."""
        queue: asyncio.Queue[Update] = asyncio.Queue(_BACKLOG)
        self._queues[queue] = name
        try:
            keys, *models = whole()
            for update in (keys, *_taken(queue), *models):  # what it may use, before it serves anybody
                yield update
            self.came.set()
            while queue in self._queues or not queue.empty():
                try:
                    async with asyncio.timeout(KEEPALIVE_S):
                        update = await queue.get()
                except TimeoutError:
                    yield None
                else:
                    yield update
                    queue.task_done()
        finally:
            self._queues.pop(queue, None)

    async def told(self) -> None:
        """Wait until what was told is on its way to every one; not long for one that reads nothing."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_TELL_S):
                for queue in list(self._queues):
                    await queue.join()


def _taken(queue: asyncio.Queue[Update]) -> list[Update]:
    """All that is in the queue now."""
    taken = []
    while not queue.empty():
        taken.append(queue.get_nowait())
        queue.task_done()
    return taken
