"""Clients and engines that misbehave in every way at once: nothing is left of them, and honest clients saw nothing."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from typing import Any

from modelpool.gateway.connection import Limits
from tests.gateway_world import World, chat, entry, gateway, request
from tests.wire import Handler, chunk, on_uvloop, read_message, response, serving

CLIENTS = 2000
AT_ONCE = 50
EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = b'{"model": "bad"}'
REQUESTS = (
    chat("bad"),
    chat("bad", stream=True),
    chat("bad", version="1.0"),
    chat("unknown"),
    request("GET", "/health"),
    request("HEAD", "/v1/models"),
    request("POST", "/v1/completions", b"{"),
    request("POST", "/v1/completions", b"x" * 300_000),
    request("POST", "/v1/completions", BODY, {"Expect": "100-continue"}),
    request("POST", "/v1/completions", BODY, {"Connection": "Upgrade", "Upgrade": "h2c"}),
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunk(BODY[:5])
    + chunk(BODY[5:])
    + b"0\r\n\r\n",
)
LIMITS = Limits(body_bytes=200_000, head_s=0.5, body_s=0.5, idle_s=1, linger_s=0.2, flush_s=1, check_s=0.05)


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


def spoilt(raw: bytes, rng: random.Random) -> bytes:
    """`raw` with a few bytes changed, left out or put in."""
    data = bytearray(raw)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data))
        noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 6)))
        data[at : at + rng.choice((0, len(noise)))] = rng.choice((noise, b"x"))
    return bytes(data)


async def misbehave(world: World, rng: random.Random, seen: Counter[bytes]) -> None:
    client = await world.connect()
    with suppress(TimeoutError, ConnectionError, RuntimeError):  # uvloop's word for a closed transport
        async with asyncio.timeout(rng.choice((0.001, 0.01, 0.1, 2))):
            for _ in range(rng.randrange(1, 4)):
                raw = b"".join(rng.choices(REQUESTS, k=rng.randrange(1, 4)))
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
                        seen[answer[9:12]] += 1
    if rng.random() < 0.5:
        client.abort()
    else:
        client.close()


async def behave(world: World, enough: asyncio.Event) -> int:
    """Ask again and again on one connection; every answer must be right."""
    client, count = await world.connect(), 0
    while not enough.is_set():
        assert (await client.ask(chat("good"))).body == b"good"
        count += 1
        await asyncio.sleep(0.001)
    return count


async def good_engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_message(reader)
        writer.write(response(b"good"))


@on_uvloop
async def test_after_abuse_of_every_kind_nothing_is_left_and_no_honest_request_failed() -> None:
    rng, seen, enough, told = random.Random(7), Counter[bytes](), asyncio.Event(), list[dict[str, Any]]()
    few = asyncio.Semaphore(AT_ONCE)
    bad = bad_engine(rng)

    async def one() -> None:
        async with few:
            await misbehave(world, rng, seen)

    async with serving(bad) as first, serving(bad) as second, serving(good_engine) as good:
        async with gateway(entry("bad", [first, second]), entry("good", [good]), limits=LIMITS) as world:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
            honest = asyncio.create_task(behave(world, enough))
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(one())
            enough.set()
            assert await honest > 10
            while world.listener.connections > 1:
                await asyncio.sleep(0.01)
            assert world.instances.inflight == 0
    # The engines of this test write to connections that are gone; that is theirs, not the gateway's.
    assert [each for each in told if "client_connected_cb" not in each["message"]] == []
    assert {b"200", b"400", b"404", b"413", b"502"} <= set(seen)
    assert b"500" not in seen
