"""Responses that the fake engine keeps, and those that it makes in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from modelpool.engines.fake.exchange import Refused, bad_request

KEPT_MAX = 1000

Body = dict[str, Any]


class Stored:
    """As with vLLM: any of them can be had by id, only those made in the background can be cancelled."""

    def __init__(self) -> None:
        self._bodies: dict[str, Body] = {}
        self._making: dict[str, asyncio.Task[None]] = {}

    def keep(self, body: Body) -> None:
        self._bodies[body["id"]] = body
        while len(self._bodies) > KEPT_MAX:
            del self._bodies[next(iter(self._bodies))]

    def body(self, response_id: str) -> Body:
        """Raises Refused."""
        body = self._bodies.get(response_id)
        if body is None:
            raise Refused(404, "invalid_request_error", f"Response with id '{response_id}' not found.", "response_id")
        return body

    def begin(self, queued: Body, making: Awaitable[Body]) -> None:
        """Go on with a response when its request has been answered with `queued`."""

        async def make() -> None:
            self.keep(await making)

        self.keep(queued)
        task = self._making[queued["id"]] = asyncio.ensure_future(make())
        task.add_done_callback(lambda _: self._making.pop(queued["id"], None))

    def cancel(self, response_id: str) -> Body:
        """Raises Refused."""
        body = self.body(response_id)
        if (task := self._making.get(response_id)) is None:
            raise bad_request("Cannot cancel a synchronous response.", "response_id")
        task.cancel()
        self.keep({**body, "status": "cancelled"})
        return self.body(response_id)

    async def close(self) -> None:
        """End what is made in the background."""
        making = list(self._making.values())
        for task in making:
            task.cancel()
        await asyncio.gather(*making, return_exceptions=True)
