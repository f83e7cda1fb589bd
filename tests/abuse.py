"""Ways to misbehave, for clients and for engines: the abuse test of every run uses them, and the soak."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from enum import Enum
from typing import Any, Protocol

from modelpool.errors import Draining
from tests.gateway_world import Answer, Client, chat, request
from tests.wire import Handler, chunk, gone, read_message, response

EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = b'{"model": "bad"}'
BODY_MAX = 200_000
"""What the gateway is to allow."""
REQUESTS = (
    chat("bad"),
    chat("bad", stream=True),
    chat("bad", version="1.0"),
    chat("unknown"),
    request("GET", "/health"),
    request("HEAD", "/v1/models"),
    request("POST", "/v1/completions", b"{"),
    request("POST", "/v1/completions", b"x" * (BODY_MAX + 100_000)),
    request("POST", "/v1/completions", BODY, {"Expect": "100-continue"}),
    request("POST", "/v1/completions", BODY, {"Connection": "Upgrade", "Upgrade": "h2c"}),
    request(
        "POST",
        "/v1/audio/transcriptions",
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nbad\r\n--B--\r\n',
        {"Content-Type": "multipart/form-data; boundary=B"},
    ),
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunk(BODY[:5])
    + chunk(BODY[5:])
    + b"0\r\n\r\n",
)


WEBSOCKET = request(
    "GET",
    "/v1/realtime",
    headers={
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        "Sec-WebSocket-Version": "13",
    },
)
_NAMES = b'{"type": "session.update", "model": "bad"}'
# Masked, as a client's frames are, with zeros.
WEBSOCKET_REQUESTS = (
    WEBSOCKET + bytes([0x81, 0x80 | len(_NAMES), 0, 0, 0, 0]) + _NAMES,
    WEBSOCKET.replace(b"/v1/realtime", b"/v1/realtime?model=bad"),
)
WAITING_REQUESTS = (chat("coming"), chat("coming", stream=True))
"""For a model that is on its way."""


def keyed(raw: bytes, secret: str) -> bytes:
    """This request with an API key."""
    return raw.replace(b"Host: localhost\r\n", f"Host: localhost\r\nAuthorization: Bearer {secret}\r\n".encode())


class Target(Protocol):
    """A gateway, in this process or in another."""

    async def connect(self) -> Client: ...


class Busy:
    """What engines have in hand."""

    def __init__(self) -> None:
        self.requests = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1


# Engines


def until_left(handle: Handler) -> Handler:
    """An engine that ends quietly when it writes to a gateway that is gone."""

    async def quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(RuntimeError):  # uvloop's word for a closed transport
            await handle(reader, writer)

    return quiet


def bad_engine(rng: random.Random) -> Handler:
    """Answers well, late, in part, twice, with garbage, or not at all."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            match rng.randrange(8):
                case 0:
                    return
                case 1:
                    writer.write(b"garbage")
                    return
                case 2:
                    writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))
                    return
                case 3:
                    writer.write(EVENT_STREAM[: rng.randrange(len(EVENT_STREAM))])
                    return
                case 4:
                    writer.transport.abort()
                    return
                case 5:
                    writer.write(response(b"a") + response(b"b"))
                case 6:
                    writer.write(EVENT_STREAM)
                    for _ in range(10):
                        writer.write(chunk(b"data: 1\n\n"))
                        await asyncio.sleep(rng.random() * 0.002)
                    writer.write(b"0\r\n\r\n")
                case _:
                    writer.write(response(b"x" * rng.randrange(300_000)))
                    await writer.drain()

    return handle


_OVERLOADED = b'{"error": {"code": "overloaded"}}'
ANSWERS = {
    "plain": response(b'{"answer": "plain"}', "Content-Type: application/json"),
    "events": EVENT_STREAM + chunk(b"data: 1\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n",
    "trailers": EVENT_STREAM[:-2]
    + b"Trailer: x-trailer\r\n\r\n"
    + chunk(b"data: [DONE]\n\n")
    + b"0\r\nx-trailer: 1\r\n\r\n",
    "interim": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + response(b"after hints"),
    "held back": response(_OVERLOADED, status="503 Service Unavailable"),
    "nothing": b"HTTP/1.1 204 No Content\r\n\r\n",
}


class Stop(Enum):
    """What an engine does behind the part of its answer that it sends."""

    CLOSE = "close"
    RESET = "reset"
    STALL = "stall"
    GARBAGE = "garbage"
    """Bytes that can be taken for nothing, and then it closes."""
    GO_ON = "go on"
    """The rest follows, byte by byte."""
    LATE = "late"
    """All of it follows, after a while."""


def script(answer: str, at: int, stop: Stop) -> dict[str, str]:
    """Headers that have a `ScriptedEngine` send `at` bytes of an answer and then do this."""
    return {"X-Answer": answer, "X-At": str(at), "X-Stop": stop.value}


class ScriptedEngine:
    """Does what the request's headers say."""

    def __init__(self, busy: Busy, *, late_s: float = 0.5) -> None:
        self._busy = busy
        self._late_s = late_s

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        more = True
        while more:
            head, _ = await read_message(reader)
            fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if line.startswith("x-"))
            with self._busy.one_more():
                raw = ANSWERS[fields["x-answer"]]
                more = await self._answer(raw, int(fields["x-at"]), Stop(fields["x-stop"]), reader, writer)

    async def _answer(
        self, raw: bytes, at: int, stop: Stop, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection goes on."""
        writer.write(raw[:at])
        match stop:
            case Stop.RESET:
                reset(writer)
            case Stop.STALL:
                await gone(reader)
            case Stop.GARBAGE:
                writer.write(b"\xff\x00}{\r\n" * 20)
            case Stop.GO_ON:
                for index in range(at, len(raw)):
                    writer.write(raw[index : index + 1])
                    await asyncio.sleep(0)
                return True
            case Stop.LATE:
                await asyncio.sleep(self._late_s)
                writer.write(raw[at:])
                return True
            case Stop.CLOSE:
                pass
        return False


async def draining_engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Takes nothing, and says so."""
    while True:
        await read_message(reader)
        writer.write(response(b'{"error": {"code": "%b"}}' % Draining.code.encode(), status="503 Service Unavailable"))


def hasty_engine(rng: random.Random) -> Handler:
    """Answers well, and closes the connection a moment later, whether or not another request is on its way."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_message(reader)
        writer.write(honest_answer(body))
        await asyncio.sleep(rng.random() * 0.003)

    return handle


def honest_engine(busy: Busy) -> Handler:
    """Answers every request by what it got."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_message(reader)
            with busy.one_more():
                answer = honest_answer(body)
                for at in range(0, len(answer), 8192):
                    writer.write(answer[at : at + 8192])
                    await writer.drain()
                    await asyncio.sleep(0)

    return handle


def honest_answer(body: bytes) -> bytes:
    """What is answered to this request: the same body, as a stream if it asks for one."""
    if not _streams(body):
        return response(body)
    return EVENT_STREAM + b"".join(map(chunk, _events(body))) + b"0\r\n\r\n"


def honest_body(body: bytes) -> bytes:
    """The same without the framing."""
    return b"".join(_events(body)) if _streams(body) else body


def _streams(body: bytes) -> bool:
    return b'"stream":true' in body


def _events(body: bytes) -> list[bytes]:
    return [*(b"data: %d\n\n" % number for number in range(20)), b"data: %b\n\n" % body, b"data: [DONE]\n\n"]


# Clients


class Leave(Enum):
    CLOSE = "close"
    RESET = "reset"
    HALF = "half-close"
    """Sends no more, but goes on reading."""


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a RST, whatever is unread or unsent."""
    if (sock := writer.get_extra_info("socket")) is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def leave(client: Client, how: Leave) -> None:
    match how:
        case Leave.CLOSE:
            client.close()
        case Leave.RESET:
            reset(client.writer)
        case Leave.HALF:
            with suppress(ConnectionError, OSError):
                client.writer.write_eof()
                async with asyncio.timeout(5):  # whoever sends no more has left: the gateway closes
                    await client.reader.read()
            client.close()


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[Client]:
    client = await target.connect()
    try:
        yield client
    finally:
        client.close()


async def leave_within(target: Target, raw: bytes, at: int, how: Leave) -> None:
    """Send the first `at` bytes of a request, and leave."""
    client = await target.connect()
    client.send(raw[:at])
    await leave(client, how)


async def leave_within_answer(target: Target, raw: bytes, at: int, how: Leave) -> None:
    """Ask, read `at` bytes of the answer, and leave."""
    client = await target.connect()
    client.send(raw)
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        await client.reader.readexactly(at)
    await leave(client, how)


async def leave_after(target: Target, raw: bytes, delay_s: float, how: Leave) -> None:
    """Ask, read nothing, and leave."""
    client = await target.connect()
    client.send(raw)
    await asyncio.sleep(delay_s)
    await leave(client, how)


def spoilt(raw: bytes, rng: random.Random) -> bytes:
    """`raw` with a few bytes changed, left out or put in."""
    data = bytearray(raw)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data))
        noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 6)))
        data[at : at + rng.choice((0, len(noise)))] = rng.choice((noise, b"x"))
    return bytes(data)


async def misbehave(target: Target, requests: Sequence[bytes], rng: random.Random, seen: Counter[str]) -> None:
    """Whole, half, spoilt and pipelined requests in pieces of any size, read or not, left at any moment."""
    client = await target.connect()
    with suppress(TimeoutError, ConnectionError, RuntimeError):  # uvloop's word for a closed transport
        async with asyncio.timeout(rng.choice((0.001, 0.01, 0.1, 2))):
            for _ in range(rng.randrange(1, 4)):
                raw = b"".join(rng.choices(requests, k=rng.randrange(1, 4)))
                raw = spoilt(raw, rng) if rng.random() < 0.5 else raw
                raw = raw[: rng.randrange(1, len(raw) + 1)] if rng.random() < 0.3 else raw
                while raw:
                    size = rng.randrange(1, len(raw) + 1)
                    client.send(raw[:size])
                    raw = raw[size:]
                    await asyncio.sleep(0)
                if rng.random() < 0.5:
                    answer = await client.reader.read(rng.randrange(1, 100_000))
                    if answer.startswith(b"HTTP/1.1 "):
                        seen[answer[9:12].decode()] += 1
    if rng.random() < 0.5:
        reset(client.writer)
    else:
        client.close()


async def outcome(target: Target, raw: bytes) -> str:
    """What becomes of a request whose engine may break off: never an answer that only looks whole."""
    async with connected(target) as client:
        client.send(raw)
        try:
            answer = await client.answer()
        except (asyncio.IncompleteReadError, ConnectionError):
            return "broken off"
    if b'\n\ndata: {"error":' in answer.body:
        return "error event"
    return "whole" if answer.status < 500 or answer.body == _OVERLOADED else f"{answer.status} {answer.code}"


async def behave(target: Target, model: str, secret: str, enough: asyncio.Event, rng: random.Random) -> int:
    """Ask again and again on one connection; every answer must be right. How many there were."""
    count = 0
    async with connected(target) as client:
        while not enough.is_set():
            raws = [
                keyed(chat(model, stream=rng.random() < 0.5, pad="x" * rng.choice((0, 100, 100_000))), secret)
                for _ in range(rng.choice((1, 1, 1, 3)))
            ]
            client.send(b"".join(raws))
            for raw in raws:
                check(raw, await client.answer())
            count += len(raws)
            await asyncio.sleep(0.001)
    return count


def check(raw: bytes, answer: Answer) -> None:
    """The answer of an honest engine, but for the comments that a stream gets while it waits."""
    assert answer.status == 200, answer.raw[:500]
    events = [each for each in answer.body.split(b"\n\n") if not each.startswith(b":")]
    body = raw.partition(b"\r\n\r\n")[2]
    assert b"\n\n".join(events) == honest_body(body), answer.raw[:500]


Job = Callable[[], Coroutine[Any, Any, None]]


async def at_once(jobs: Sequence[Job], number: int = 50) -> None:
    """Do all of these, so many at a time."""
    left = iter(jobs)

    async def worker() -> None:
        for job in left:
            await job()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(number):
            tasks.create_task(worker())
