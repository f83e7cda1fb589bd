"""A client that calls an ASGI app by hand, in the same loop: each message and each disconnect when the test says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]


class Call:
    """One request to an app. `sent` holds all that the app sent, `times` when (loop time)."""

    def __init__(
        self, method: str, path: str, body: bytes = b"", headers: Iterable[tuple[str, str]] = (), type_: str = "http"
    ) -> None:
        self.scope: dict[str, Any] = {
            "type": type_,
            "method": method,
            "path": path,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        }
        self.sent: list[Message] = []
        self.times: list[float] = []
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})

    def disconnect(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        return await self._incoming.get()

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self.times.append(asyncio.get_running_loop().time())

    async def run(self, app: App) -> Call:
        await app(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of each server-sent event, decoded where it is JSON."""
        lines = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


def post(path: str, body: Any, **headers: str) -> Call:
    """A POST of JSON. Header names have underscores for dashes."""
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return Call("POST", path, json.dumps(body).encode(), pairs)
