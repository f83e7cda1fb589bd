"""Which instance made which response, learned from the answers that pass."""

from __future__ import annotations

import re
from collections import OrderedDict

from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.passing import PassThrough
from modelpool.gateway.request import Request
from modelpool.gateway.routes import RESPONSE_ID
from modelpool.messages.routing import Route
from modelpool.relay import ResponseHead

_LOOKED_AT_MAX = 8 << 10
# The first id in an answer is the response's own, whether it stands alone or in the event `response.created`.
_ID = re.compile(rb'"id"\s*:\s*"([^"\\]*)"')
_WELL_FORMED = re.compile(RESPONSE_ID)


class StoredResponses:
    """Response ids and where they were made, the `size` latest ones."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._routes: OrderedDict[str, Route] = OrderedDict()

    def __len__(self) -> int:
        return len(self._routes)

    def keep(self, response_id: str, route: Route) -> None:
        self._routes[response_id] = route
        self._routes.move_to_end(response_id)
        if len(self._routes) > self._size:
            self._routes.popitem(last=False)

    def route(self, response_id: str) -> Route | None:
        return self._routes.get(response_id)


class LearningPassThrough(PassThrough):
    """Learns the id of the response that it passes on."""

    __slots__ = ("_route", "_seen", "_stored")

    def __init__(
        self,
        request: Request,
        client: ClientConnection,
        *,
        hold: frozenset[int],
        route: Route,
        stored: StoredResponses,
    ) -> None:
        super().__init__(request, client, hold=hold)
        self._route = route
        self._stored = stored
        self._seen: bytes | None = None

    def head(self, head: ResponseHead, rest: bytes) -> None:
        super().head(head, rest)
        if head.status == 200:
            self._seen = b""
            self._look(rest)

    def data(self, data: bytes) -> None:
        super().data(data)
        if self._seen is not None:
            self._look(data)

    def _look(self, data: bytes) -> None:
        self._seen = (self._seen or b"") + data
        if match := _ID.search(self._seen):
            if _WELL_FORMED.fullmatch(match[1]):
                self._stored.keep(match[1].decode(), self._route)
            self._seen = None
        elif len(self._seen) > _LOOKED_AT_MAX:
            self._seen = None
