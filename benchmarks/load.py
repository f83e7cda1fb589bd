"""A load: each connection sends its next request when the last one is answered, or `--pause` seconds after that.

Ends after `--seconds`, with the requests that are on their way by then. Prints a Measured as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from typing import cast

import httptools
import msgspec
import uvloop

from benchmarks.pace import CHUNKS, Pace


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies in microseconds, from the request's write to the answer's last byte."""

    requests: int
    seconds: float
    p50_us: float
    p99_us: float
    p999_us: float
    failures: int
    segments: int
    """How often something came: a router that is slow joins chunks."""
    cpu_s: float
    """Of the load itself."""


def request(key: str, *, stream: bool, prompt: str = "hello " * 150) -> bytes:
    """A chat request of 1 KB with the headers that the openai SDK sends."""
    body = b'{"model":"m","messages":[{"role":"user","content":"' + prompt.encode() + b'"}]'
    body += b',"stream":true}' if stream else b"}"
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
        "User-Agent: OpenAI/Python 1.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Package-Version: 1.0\r\n"
        f"X-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Tally:
    """Until when requests are sent, and how long those took that were."""

    def __init__(self, seconds: float, pause: float) -> None:
        self.until = time.perf_counter() + seconds
        self.pause = pause
        self.latencies: list[float] = []
        self.failures = 0
        self.segments = 0


class Requester(asyncio.Protocol):
    def __init__(self, request: bytes, tally: Tally, over: asyncio.Future[None]) -> None:
        self._request = request
        self._tally = tally
        self._over = over
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._over.done():
            self._tally.failures += 1
            self._over.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._tally.segments += 1
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._tally.latencies.append(time.perf_counter() - self._sent)
        if self._parser.get_status_code() != 200:
            self._tally.failures += 1
        if self._tally.pause:
            self._loop.call_later(self._tally.pause, self._next)
        else:
            self._next()

    def _next(self) -> None:
        if self._over.done():
            return
        self._sent = time.perf_counter()
        if self._sent > self._tally.until:
            self._over.set_result(None)
            self._transport.close()
            return
        self._transport.write(self._request)


async def main(port: int, connections: int, seconds: float, pause: float, raw: bytes) -> Measured:
    loop = asyncio.get_running_loop()
    since = time.perf_counter()
    tally = Tally(seconds, pause)
    ends: list[asyncio.Future[None]] = [loop.create_future() for _ in range(connections)]
    for end in ends:
        await loop.create_connection(lambda end=end: Requester(raw, tally, end), "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.gather(*ends)
    latencies = sorted(tally.latencies) or [0.0]

    def share(part: float) -> float:
        return latencies[int((len(latencies) - 1) * part)] * 1e6

    return Measured(
        requests=len(tally.latencies),
        seconds=time.perf_counter() - since,
        p50_us=share(0.5),
        p99_us=share(0.99),
        p999_us=share(0.999),
        failures=tally.failures,
        segments=tally.segments,
        cpu_s=time.process_time(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--key", default="none")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--every", type=float, default=0.0, help="a stream's chunks come so many seconds apart")
    given = parser.parse_args()
    prompt = {"prompt": Pace(0, CHUNKS, given.every).prompt()} if given.every else {}
    raw = request(given.key, stream=given.stream, **prompt)
    measured = uvloop.run(main(given.port, given.connections, given.seconds, given.pause, raw))
    sys.stdout.buffer.write(msgspec.json.encode(measured))
