"""A load: each connection sends its next request when the last one is answered. Prints a Measured as JSON."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import cast

import httptools
import msgspec
import uvloop


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies in microseconds, from the request's write to the answer's last byte."""

    requests: int
    seconds: float
    p50_us: float
    p99_us: float
    failures: int


def request(key: str, *, stream: bool) -> bytes:
    """A chat request of 1 KB with the headers that the openai SDK sends."""
    body = b'{"model":"m","messages":[{"role":"user","content":"' + b"hello " * 150 + b'"}]'
    body += b',"stream":true}' if stream else b"}"
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
        "User-Agent: OpenAI/Python 1.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Package-Version: 1.0\r\n"
        f"X-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Budget:
    """How many requests are still to be sent, and how long those took that were."""

    def __init__(self, requests: int) -> None:
        self.left = requests
        self.latencies: list[float] = []
        self.failures = 0


class Requester(asyncio.Protocol):
    def __init__(self, request: bytes, budget: Budget, over: asyncio.Future[None]) -> None:
        self._request = request
        self._budget = budget
        self._over = over
        self._parser = httptools.HttpResponseParser(self)
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over.done():
            self._budget.failures += 1
            self._over.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._budget.latencies.append(time.perf_counter() - self._sent)
        if self._parser.get_status_code() != 200:
            self._budget.failures += 1
        self._next()

    def _next(self) -> None:
        if self._budget.left <= 0:
            self._over.set_result(None)
            self._transport.close()
            return
        self._budget.left -= 1
        self._sent = time.perf_counter()
        self._transport.write(self._request)


async def main(port: int, connections: int, requests: int, raw: bytes) -> Measured:
    loop = asyncio.get_running_loop()
    budget = Budget(requests)
    since = time.perf_counter()
    ends: list[asyncio.Future[None]] = [loop.create_future() for _ in range(connections)]
    for end in ends:
        await loop.create_connection(lambda end=end: Requester(raw, budget, end), "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.gather(*ends)
    latencies = sorted(budget.latencies)
    return Measured(
        requests=len(latencies),
        seconds=time.perf_counter() - since,
        p50_us=latencies[len(latencies) // 2] * 1e6,
        p99_us=latencies[len(latencies) * 99 // 100] * 1e6,
        failures=budget.failures,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--key", default="none")
    parser.add_argument("--stream", action="store_true")
    given = parser.parse_args()
    measured = uvloop.run(main(given.port, given.connections, given.requests, request(given.key, stream=given.stream)))
    sys.stdout.buffer.write(msgspec.json.encode(measured))
