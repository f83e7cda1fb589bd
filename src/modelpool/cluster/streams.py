"""Streams that are asked for item by item, by a reader that may be gone at any moment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import msgspec

from modelpool.errors import InternalError, PoolError
from modelpool.messages.cluster import ABANDONED_S, POLL_S, Answer, End, Item, Nothing, Refusal

log = logging.getLogger(__name__)


def refusal(error: PoolError) -> Refusal:
    return Refusal(
        status=error.status,
        kind=error.type,
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after=error.retry_after,
    )


class Stream:
    """One reader's. Its source is asked for an item only when the one before has arrived."""

    def __init__(self, source: AsyncIterator[object], tasks: asyncio.TaskGroup) -> None:
        self._items: asyncio.Queue[Item] = asyncio.Queue(1)
        self._given = False
        self.asked_at = asyncio.get_running_loop().time()
        self._task = tasks.create_task(self._read(source))

    async def _read(self, source: AsyncIterator[object]) -> None:
        try:
            async with aclosing(source) as items:  # type: ignore[type-var]
                async for item in items:
                    await self._items.put(Answer(msgspec.Raw(msgspec.json.encode(item))))
                    await self._items.join()
            await self._items.put(End())
        except PoolError as error:
            await self._items.put(refusal(error))
        except Exception:
            log.exception("a stream failed")
            await self._items.put(refusal(InternalError("Something went wrong here; the manager's log says what.")))

    async def next(self) -> Item:
        """The next item; Nothing where there is none for POLL_S."""
        loop = asyncio.get_running_loop()
        self.asked_at = loop.time()
        if self._given:
            self._given = False
            self._items.task_done()
        try:
            async with asyncio.timeout(POLL_S):
                item = await self._items.get()
        except TimeoutError:
            return Nothing()
        finally:
            self.asked_at = loop.time()
        self._given = True
        return item

    def close(self) -> None:
        self._task.cancel()


class Streams:
    """All open streams, by the names that their readers gave them."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks
        self._streams: dict[str, Stream] = {}

    async def next(self, name: str, begin: Callable[[], AsyncIterator[object]]) -> Item:
        """The next item of this stream, which begins with the first call."""
        stream = self._streams.get(name)
        if stream is None:
            stream = self._streams[name] = Stream(begin(), self._tasks)
        item = await stream.next()
        if isinstance(item, End | Refusal):
            self.close(name)
        return item

    def close(self, name: str) -> None:
        if stream := self._streams.pop(name, None):
            stream.close()

    def close_all(self) -> None:
        for name in list(self._streams):
            self.close(name)

    async def keep_closing_abandoned(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(POLL_S)
            for name, stream in list(self._streams.items()):
                if loop.time() - stream.asked_at > ABANDONED_S:
                    log.info("nobody reads the stream %s any more", name)
                    self.close(name)
