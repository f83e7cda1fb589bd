"""One manager's time in the actor's process: the calls that it carries, and that it makes way for another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from modelpool.cluster.streams import Streams
from modelpool.errors import ManagerAway
from modelpool.manager.manager import Manager

T = TypeVar("T")

_FINISH_S = 1.0
"""What is being done when a manager makes way has this long to be done."""


class Term:
    """It lasts as long as the task that makes it. No call outlives it."""

    def __init__(self, manager: Manager, streams: Streams) -> None:
        self.manager = manager
        self.streams = streams
        self._task = asyncio.current_task()
        self._calls: set[asyncio.Task[Any]] = set()
        self._lasting: set[asyncio.Task[Any]] = set()
        self._making_way: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._ended = False

    async def carry(self, call: Callable[[Term], Coroutine[Any, Any, T]], *, lasting: bool = False) -> T:
        """The result of a call; a `lasting` one waits for news. Raises what the call raises, and ManagerAway where the
        manager ends meanwhile.
        """
        task, among = asyncio.current_task(), self._lasting if lasting else self._calls
        assert task is not None
        among.add(task)
        try:
            return await call(self)
        except asyncio.CancelledError:
            if not self._ended:
                raise
            away = "The manager is ending. It may have been carried out all the same."
            raise ManagerAway(away, retry_after=1.0) from None
        finally:
            among.discard(task)

    def make_way(self, for_s: float) -> None:
        if not self._making_way.done():
            self._making_way.set_result(for_s)

    async def asked_to_make_way(self) -> float:
        """For how long."""
        return await self._making_way

    async def finish(self) -> None:
        """Have the calls done that will be soon."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=_FINISH_S)

    def end(self) -> None:
        """The calls that are left are answered so."""
        self._ended = True
        self.streams.close_all()
        for task in self._calls | self._lasting:
            task.cancel()

    async def over(self) -> None:
        """Return when its task has ended, in whichever way."""
        assert self._task is not None
        await asyncio.wait({self._task})
