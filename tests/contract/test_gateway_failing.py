"""Instances that fail slowly or again and again: deadlines and breakers."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import AsyncExitStack

import msgspec
import pytest

from modelpool.core.breaker import CLOSED, FAILURES_MAX, PAUSE_INITIAL_S
from modelpool.gateway.client_limits import Limits
from modelpool.gateway.instances import Instance
from modelpool.relay import Deadlines
from tests.contract.test_gateway_realtime import talking
from tests.contract.test_gateway_responses import fakes
from tests.gateway_world import World, chat, entry, gateway
from tests.wire import Unfinished, chunk, gone, on_uvloop, read_message, response, serving

QUICK = Limits(body_bytes=1 << 20, check_s=0.02)
EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Engine:
    """Answers well, unless it is told to do something else."""

    def __init__(self) -> None:
        self.answer = response(b'{"ok": true}')
        self.asked = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            self.asked += 1
            if not self.answer:
                return  # the connection breaks, after the request was read
            writer.write(self.answer)


@on_uvloop
async def test_an_instance_that_does_not_answer_is_given_up_and_aborts() -> None:
    upstream = Unfinished()
    deadlines = Deadlines(first_byte_s=0.2)
    async with (
        serving(upstream) as endpoint,
        gateway(entry("m", [endpoint]), limits=QUICK, deadlines=deadlines) as world,
    ):
        answer = await world.ask(chat())
        assert (answer.status, answer.code) == (504, "upstream_timeout")
        assert "0.2 s" in answer.message
        await upstream.left.wait()
        await world.until_idle()


@pytest.mark.parametrize("deadlines", [Deadlines(between_bytes_s=0.2), Deadlines(total_s=0.3)])
@on_uvloop
async def test_a_stream_that_stands_still_or_takes_too_long_ends_with_an_error_event(deadlines: Deadlines) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM)
        for number in range(5):
            writer.write(chunk(b"data: %d\n\n" % number))
            await asyncio.sleep(0.1)
        if deadlines.total_s == 0.3:
            for _ in range(100):
                writer.write(chunk(b"data: more\n\n"))
                await asyncio.sleep(0.05)
        await gone(reader)

    async with serving(handle) as endpoint, gateway(entry("m", [endpoint]), limits=QUICK, deadlines=deadlines) as world:
        events = (await world.ask(chat(stream=True))).body.split(b"\n\n")
        assert events[0] == b"data: 0"
        last = next(each for each in reversed(events) if each)
        assert msgspec.json.decode(last[6:])["error"]["code"] == "upstream_timeout"
        await world.until_idle()


@on_uvloop
async def test_a_client_that_reads_slowly_is_no_stalled_engine() -> None:
    size = 8 << 20

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(response(b"x" * size))
        await writer.drain()

    deadlines = Deadlines(between_bytes_s=0.1)
    async with serving(handle) as endpoint, gateway(entry("m", [endpoint]), limits=QUICK, deadlines=deadlines) as world:
        client = await world.connect()
        client.send(chat())
        await client.reader.read(1)
        await asyncio.sleep(0.5)
        assert len(await client.reader.readuntil(b"\r\n\r\n")) > 10
        assert len(await client.reader.readexactly(size)) == size


async def reader_of(world: World) -> socket.socket:
    """A client that asked, and has little room for the answer."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
    await loop.sock_connect(sock, world.endpoint)
    await loop.sock_sendall(sock, chat(stream=True))
    return sock


async def read_to_the_end(sock: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(sock, 1 << 20):
        pass


@on_uvloop
async def test_a_client_that_reads_a_little_now_and_then_is_let_be_and_one_that_reads_nothing_is_not() -> None:
    left = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM)
        try:
            while True:
                writer.write(chunk(b"data: %b\n\n" % (b"x" * 60_000)))
                await writer.drain()
        finally:
            left.set()

    limits = Limits(body_bytes=1 << 20, check_s=0.05, flush_s=0.5)
    async with serving(handle) as endpoint, gateway(entry("m", [endpoint]), limits=limits) as world:
        loop = asyncio.get_running_loop()
        with await reader_of(world) as sock:
            for _ in range(20):
                assert await loop.sock_recv(sock, 16 << 10)
                await asyncio.sleep(0.1)
            assert not left.is_set()
            await left.wait()
            with pytest.raises(ConnectionResetError):  # and not all that the kernel still had for it
                await read_to_the_end(sock)
        await world.until_idle()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@on_uvloop
async def test_an_answer_without_a_length_that_breaks_does_not_look_whole(version: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        framing = b"" if version == "1.1" else b"Transfer-Encoding: chunked\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n%b\r\n" % framing)
        writer.write(b"half" if version == "1.1" else chunk(b"half"))
        await gone(reader)

    deadlines = Deadlines(between_bytes_s=0.2)
    async with serving(handle) as endpoint, gateway(entry("m", [endpoint]), limits=QUICK, deadlines=deadlines) as world:
        client = await world.connect()
        client.send(chat(version=version))
        assert (await client.reader.readuntil(b"half")).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionResetError):
            await client.reader.read()


@on_uvloop
async def test_an_instance_that_keeps_failing_is_left_alone_and_comes_back() -> None:
    good, bad = Engine(), Engine()
    bad.answer = b""
    async with serving(good) as first, serving(bad) as second, gateway(entry("m", [first, second])) as world:
        statuses = [(await world.ask(chat())).status for _ in range(60)]
        assert statuses.count(502) == FAILURES_MAX
        assert bad.asked == FAILURES_MAX
        bad.answer = good.answer
        before, deadline = bad.asked, asyncio.get_running_loop().time() + 5
        while bad.asked < before + 3:
            assert (await world.ask(chat())).status == 200
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)


@on_uvloop
async def test_what_clients_do_wrong_opens_no_breaker() -> None:
    good, other = Engine(), Engine()
    other.answer = response(b"{}", status="400 Bad Request")
    async with serving(good) as first, serving(other) as second, gateway(entry("m", [first, second])) as world:
        for _ in range(40):
            await world.ask(chat())
        assert (good.asked, other.asked) == (20, 20)


@on_uvloop
async def test_a_model_with_one_instance_is_tried_however_often_it_failed() -> None:
    engine = Engine()
    engine.answer = b""
    async with serving(engine) as endpoint, gateway(entry("m", [endpoint])) as world:
        for _ in range(20):
            assert (await world.ask(chat())).status == 502
        engine.answer = response(b"{}")
        assert (await world.ask(chat())).status == 200


def on_trial(instance: Instance) -> None:
    """It failed, and its pause is over: the next request shows whether it is well again."""
    for _ in range(FAILURES_MAX):
        instance.judge(False)
    instance.breaker = instance.breaker._replace(until=time.monotonic())


@on_uvloop
async def test_an_instance_that_begins_to_answer_is_trusted_however_long_that_lasts() -> None:
    begun = EVENT_STREAM + chunk(b"data: 1\n\n")
    async with serving(Unfinished(begun)) as first, serving(Unfinished(begun)) as second:
        async with gateway(entry("m", [first, second], capacity=2)) as world:
            on_trial(world.table.model("m").instances[0])
            clients = [await world.connect() for _ in range(4)]
            for client in clients:
                client.send(chat(stream=True))
                assert (await client.reader.readuntil(b"data: 1")).startswith(b"HTTP/1.1 200")
            assert [each.own for each in world.table.model("m").instances] == [2, 2]
            assert not world.instances.suspects
            for client in clients:
                client.abort()
            await world.until_idle()


@on_uvloop
async def test_an_instance_that_takes_a_websocket_is_trusted_while_it_is_open() -> None:
    async with fakes(2) as endpoints, gateway(entry("m", endpoints, capacity=2)) as world, AsyncExitStack() as stack:
        on_trial(world.table.model("m").instances[0])
        for _ in range(4):
            await stack.enter_async_context(talking(world, "?model=m"))
        assert [each.own for each in world.table.model("m").instances] == [2, 2]


@on_uvloop
async def test_a_websocket_that_was_open_ends_a_row_of_failures() -> None:
    async with fakes(1) as endpoints, gateway(entry("m", endpoints)) as world:
        (instance,) = world.table.model("m").instances
        instance.judge(False)
        async with talking(world, "?model=m"):
            pass
        await world.until_idle()
        assert instance.breaker is CLOSED


@on_uvloop
async def test_the_head_of_a_stream_alone_does_not_show_that_an_instance_works() -> None:
    async with serving(Unfinished(EVENT_STREAM)) as endpoint, gateway(entry("m", [endpoint])) as world:
        (instance,) = world.table.model("m").instances
        on_trial(instance)
        client = await world.connect()
        client.send(chat(stream=True))
        await client.reader.readuntil(b"\r\n\r\n")
        assert instance.breaker.trying
        client.abort()
        await world.until_idle()
        assert not instance.breaker.trying
        assert world.instances.suspects == {instance}


@pytest.mark.parametrize(
    "answer",
    [
        response(b"{}", status="500 Internal Server Error"),
        response(b'{"error": {"code": "instance_not_found"}}', status="404 Not Found"),
    ],
)
@on_uvloop
async def test_an_answer_that_does_not_show_that_it_works_leaves_an_instance_under_suspicion(answer: bytes) -> None:
    engine = Engine()
    engine.answer = answer
    async with serving(engine) as endpoint, gateway(entry("m", [endpoint])) as world:
        (instance,) = world.table.model("m").instances
        on_trial(instance)
        assert (await world.ask(chat())).status >= 500
        assert world.instances.suspects == {instance}
        assert not instance.breaker.trying


@on_uvloop
async def test_an_instance_whose_streams_all_break_is_left_alone_for_longer_and_longer() -> None:
    async def breaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))

    async with serving(breaks) as endpoint, gateway(entry("m", [endpoint])) as world:
        (instance,) = world.table.model("m").instances
        pauses = []
        for _ in range(3):
            on_trial(instance)
            await world.ask(chat(stream=True))
            assert not instance.breaker.closed
            pauses.append(instance.breaker.pause_s)
        assert pauses == [2 * PAUSE_INITIAL_S, 4 * PAUSE_INITIAL_S, 8 * PAUSE_INITIAL_S]
