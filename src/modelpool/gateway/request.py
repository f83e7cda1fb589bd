"""A client's request, as the listener parsed it."""

from __future__ import annotations

from modelpool.errors import PoolError
from modelpool.gateway.keys import Caller
from modelpool.gateway.meter import Meter
from modelpool.gateway.observe.journey import Journey
from modelpool.gateway.routes import Route


class Request:
    """One request. `path` and `query` (with its question mark) are as sent; header names are in lower case.

    `by_name` holds each header's last value. Set when the head is there: `id`; `added`, header lines that the answer is
    to carry; `route` and `refusal`, what it is for, or why it is refused; `caller`, for those with a managed API key.
    `body` is whole by the time the request is served. If it is for a model it has a `journey` then, and a `meter` if
    its tokens are counted. `upgrade`: it is to become a WebSocket.
    """

    __slots__ = (
        "added",
        "body",
        "by_name",
        "caller",
        "headers",
        "http10",
        "id",
        "journey",
        "keep_alive",
        "meter",
        "method",
        "path",
        "query",
        "refusal",
        "route",
        "upgrade",
    )

    journey: Journey

    def __init__(
        self, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], *, http10: bool, keep_alive: bool
    ) -> None:
        self.method = method
        self.path, mark, query = target.partition(b"?")
        self.query = mark + query
        self.headers = headers
        self.by_name = dict(headers)
        self.http10 = http10
        self.keep_alive = keep_alive
        self.id = b""
        self.added = b""
        self.body = b""
        self.route: Route | None = None
        self.caller: Caller | None = None
        self.meter: Meter | None = None
        self.refusal: PoolError | None = None
        self.upgrade = False

    @property
    def head_only(self) -> bool:
        return self.method == b"HEAD"
