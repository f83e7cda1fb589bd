"""Which manager a worker obeys: the latest of its cluster that it has heard of."""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from modelpool.control_http import error_response
from modelpool.core.epoch import cluster_of, is_foreign, is_older
from modelpool.errors import Conflict
from modelpool.messages.workers import EPOCH_HEADER

log = logging.getLogger(__name__)


class Fence:
    """`busy` says whether anything runs here. Where nothing does, a manager of another cluster may come."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self.epoch = ""
        """What a manager of its cluster must be as late as."""

    def hear(self, epoch: str) -> None:
        """A manager has spoken. Raises Conflict for one that is not to be obeyed."""
        if self._busy() and is_foreign(epoch, self.epoch):
            raise Conflict(
                f"This worker runs instances of the cluster `{cluster_of(self.epoch)}`; the manager is that of "
                f"`{cluster_of(epoch)}`.",
                code="other_cluster",
            )
        if is_older(epoch, self.epoch):
            raise Conflict(f"A later manager has taken over: {self.epoch} is later than {epoch}.", code="stale_epoch")
        if epoch and epoch != self.epoch:
            log.info("obeying the manager of epoch %s", epoch)
            self.epoch = epoch


class FenceGuard:
    """ASGI middleware: 409 for what a manager says that is not to be obeyed."""

    def __init__(self, app: ASGIApp, fence: Fence) -> None:
        self._app = app
        self._fence = fence
        self._header = EPOCH_HEADER.lower().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                for name, value in scope["headers"]:
                    if name == self._header:
                        self._fence.hear(value.decode("latin-1"))
            except Conflict as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
