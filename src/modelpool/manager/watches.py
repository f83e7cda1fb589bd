"""A connection is held to each worker, by which its end is seen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from modelpool.manager.worker_client import WorkerClient, WorkerUnreachable
from modelpool.messages.workers import WorkerInfo

log = logging.getLogger(__name__)

_RETRY_S = 1.0
"""From one try to the next at least; at once where it was watched for longer than that."""


class Watches:
    """`own` begins a task, and ends it with its owner; `gone` takes a worker whose process has ended."""

    def __init__(
        self,
        client: WorkerClient,
        *,
        own: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        gone: Callable[[WorkerInfo], None],
    ) -> None:
        self._client = client
        self._own = own
        self._gone = gone
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, info: WorkerInfo, *, anew: bool = False) -> None:
        """Unless it is watched already; `anew`: in the place of that."""
        task = self._tasks.get(info.worker_id)
        if task is not None and not task.done():
            if not anew:
                return
            task.cancel()
        self._tasks[info.worker_id] = self._own(self._watch(info))

    def end(self, worker_id: str) -> None:
        if task := self._tasks.pop(worker_id, None):
            task.cancel()

    async def _watch(self, info: WorkerInfo) -> None:
        """Until nothing listens there any more: then its instances are gone too.

        A port forward takes connections where nothing listens at its other end too, and closes them.
        """
        loop = asyncio.get_running_loop()
        while True:
            again_at = loop.time() + _RETRY_S
            try:
                await self._client.watch(info.url)
            except WorkerUnreachable as error:
                if error.refused:
                    log.warning("worker %s is gone: %s", info.worker_id, error)
                    self._gone(info)
                    return
                log.info("worker %s cannot be watched: %s", info.worker_id, error)
            except Exception:
                log.exception("watching worker %s failed", info.worker_id)
            await asyncio.sleep(again_at - loop.time())
