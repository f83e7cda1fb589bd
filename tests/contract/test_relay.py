"""The upstream client over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from modelpool.errors import EngineError, UpstreamFailed, UpstreamTimeout
from modelpool.relay import Endpoint, Exchange, Pool, ResponseHead, encode_request, fetch, fixed_headers
from tests.wire import Unfinished, chunk, gone, on_uvloop, read_message, response, serving

GET = encode_request(b"GET", b"/", [], fixed=b"Host: x\r\n")
EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Recorder:
    """A sink that keeps what it is given; `news` is set with every call."""

    def __init__(self) -> None:
        self.heads: list[ResponseHead] = []
        self.segments: list[bytes] = []
        self.news = asyncio.Event()

    def head(self, head: ResponseHead, rest: bytes) -> None:
        self.heads.append(head)
        if rest:
            self.segments.append(rest)
        self.news.set()

    def data(self, data: bytes) -> None:
        self.segments.append(data)
        self.news.set()

    async def until(self, segments: int) -> None:
        while len(self.segments) < segments:
            self.news.clear()
            await self.news.wait()

    @property
    def raw(self) -> bytes:
        return self.heads[0].raw + b"".join(self.segments)


def pool_of(endpoint: Endpoint) -> Pool:
    return Pool(endpoint, connect_timeout_s=1.0)


async def exchange_with(pool: Pool, request: bytes = GET, *, head_only: bool = False) -> Recorder:
    sink = Recorder()
    await (await pool.send(request, sink, head_only=head_only)).ended()
    return sink


def answering(*parts: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Answers every request with the same bytes, part by part, and closes when it has none left."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            for part in parts:
                writer.write(part)
                await writer.drain()

    return handle


@pytest.mark.parametrize(
    "raw",
    [
        response(b'{"a": 1}'),
        response(b""),
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
        EVENT_STREAM + chunk(b"data: 1\n\n") + chunk(b"data: 2\n\n") + b"0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nTrailer: t\r\n\r\n",
    ],
)
@on_uvloop
async def test_bytes_pass_as_they_are_and_the_connection_is_used_again(raw: bytes) -> None:
    connections = 0
    answer = answering(raw)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answer(reader, writer)

    async with serving(handle) as endpoint:
        pool = pool_of(endpoint)
        for _ in range(3):
            assert (await exchange_with(pool)).raw == raw
        assert (connections, pool.idle) == (1, 1)


@pytest.mark.parametrize("size", [1, 7])
@on_uvloop
async def test_a_response_that_comes_in_crumbs_is_the_same_response(size: int) -> None:
    raw = EVENT_STREAM + chunk(b"data: 1\n\n") + b"0\r\n\r\n"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        for start in range(0, len(raw), size):
            writer.write(raw[start : start + size])
            await asyncio.sleep(0)  # each crumb in a segment of its own

    async with serving(handle) as endpoint:
        sink = await exchange_with(pool_of(endpoint))
        assert sink.raw == raw
        assert sink.heads[0].status == 200
        assert sink.heads[0].event_stream


@on_uvloop
async def test_each_segment_arrives_before_the_next_is_made() -> None:
    seen = asyncio.Semaphore(0)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM)
        for number in range(20):
            writer.write(chunk(b"data: %d\n\n" % number))
            await seen.acquire()
        writer.write(b"0\r\n\r\n")
        await gone(reader)

    async with serving(handle) as endpoint:
        sink = Recorder()
        exchange = await pool_of(endpoint).send(GET, sink)
        for number in range(20):
            await sink.until(number + 1)
            assert sink.segments[number] == chunk(b"data: %d\n\n" % number)
            seen.release()
        await exchange.ended()


@pytest.mark.parametrize("pauses", [False, True])
@on_uvloop
async def test_pieces_that_come_faster_than_any_engine_are_gathered(pauses: bool) -> None:
    """Each in a segment of its own would cost two system calls."""
    pieces = [chunk(b"data: %d\n\n" % number) for number in range(400)]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM)
        for piece in pieces:
            await asyncio.sleep(0)
            writer.write(piece)
        await gone(reader)

    async with serving(handle) as endpoint:
        sink = Recorder()
        exchange = await pool_of(endpoint).send(GET, sink)
        await sink.until(3)
        if pauses:
            exchange.pause()
            seen = len(sink.segments)
            await asyncio.sleep(0.02)
            assert len(sink.segments) == seen
            exchange.resume()
        while not sink.raw.endswith(pieces[-1]):
            sink.news.clear()
            await sink.news.wait()
        assert sink.raw == EVENT_STREAM + b"".join(pieces)
        assert len(sink.segments) < 200
        exchange.close()


@on_uvloop
async def test_interim_responses_are_left_out() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n" + b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    async with serving(answering(interim + response(b"x"))) as endpoint:
        assert (await exchange_with(pool_of(endpoint))).raw == response(b"x")
    async with serving(answering(interim, response(b"x"))) as endpoint:
        assert (await exchange_with(pool_of(endpoint))).raw == response(b"x")


@on_uvloop
async def test_the_answer_to_head_has_no_body_whatever_length_it_names() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    async with serving(answering(head)) as endpoint:
        pool = pool_of(endpoint)
        for _ in range(2):
            assert (await exchange_with(pool, head_only=True)).raw == head
        assert pool.idle == 1


@on_uvloop
async def test_a_body_that_ends_with_the_connection_is_complete_and_the_connection_not_used_again() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nhello ")
        writer.write(b"world")

    async with serving(handle) as endpoint:
        pool = pool_of(endpoint)
        sink = await exchange_with(pool)
        assert b"".join(sink.segments) == b"hello world"
        assert sink.heads[0].ends_with_connection
        assert pool.idle == 0


async def failure_of(pool: Pool) -> EngineError:
    with pytest.raises(EngineError) as caught:
        await exchange_with(pool)
    return caught.value


@on_uvloop
async def test_who_takes_no_connections_cannot_have_run_the_request(tmp_path: Path) -> None:
    async with serving(answering(response(b""))) as endpoint:
        pass
    assert not (await failure_of(pool_of(endpoint))).may_have_run
    assert not (await failure_of(pool_of(Endpoint.unix(tmp_path / "nobody")))).may_have_run


@on_uvloop
async def test_a_connect_has_a_deadline() -> None:
    pool = Pool(Endpoint("192.0.2.1", 9), connect_timeout_s=0.01)  # TEST-NET-1: answers nobody
    error = await failure_of(pool)
    # Where there is no network at all, the connect is refused at once.
    assert isinstance(error, UpstreamTimeout | UpstreamFailed)
    assert not error.may_have_run


@on_uvloop
async def test_who_closes_as_soon_as_it_accepts_is_a_failure_like_any() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with serving(handle) as endpoint:
        for _ in range(50):
            assert isinstance(await failure_of(pool_of(endpoint)), UpstreamFailed)


@on_uvloop
async def test_a_new_connection_that_dies_before_an_answer_may_have_run_the_request() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)

    async with serving(handle) as endpoint:
        error = await failure_of(pool_of(endpoint))
        assert isinstance(error, UpstreamFailed)
        assert error.may_have_run


@on_uvloop
async def test_an_idle_connection_that_its_peer_closed_is_dropped_at_once() -> None:
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(response(b"x"))
        await closed.wait()

    async with serving(handle) as endpoint:
        pool = pool_of(endpoint)
        await exchange_with(pool)
        assert pool.idle == 1
        closed.set()
        while pool.idle:
            await asyncio.sleep(0)
        assert (await exchange_with(pool)).raw == response(b"x")


def closing_at_its_second_request() -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A server that answers one request a connection, and closes when it sees a second one."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(response(b"x"))
        await reader.read(1)

    return handle


@on_uvloop
async def test_a_request_that_met_a_stale_connection_cannot_have_run() -> None:
    async with serving(closing_at_its_second_request()) as endpoint:
        pool = pool_of(endpoint)
        await exchange_with(pool)
        assert not (await failure_of(pool)).may_have_run


@on_uvloop
async def test_fetch_sends_again_what_met_a_stale_connection() -> None:
    async with serving(closing_at_its_second_request()) as endpoint:
        pool = pool_of(endpoint)
        for _ in range(3):
            async with fetch(pool, GET) as answer:
                assert await answer.read() == b"x"


@pytest.mark.parametrize(
    ("sent", "takes_chunk"),
    [
        (EVENT_STREAM, True),
        (EVENT_STREAM + chunk(b"data: 1\n\n"), True),
        (EVENT_STREAM + b"10\r\ndata: 1", False),
        (EVENT_STREAM + b"10\r\n", False),
        (EVENT_STREAM + chunk(b"data: 1\n\n") + b"1", False),
        (EVENT_STREAM + chunk(b"data: 1\n\n")[:-2], False),
        (EVENT_STREAM[:-2] + b"Trailer: x-trailer\r\n\r\n" + chunk(b"data: 1\n\n") + b"0\r\nx-trailer: 1", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345", False),
    ],
)
@on_uvloop
async def test_death_in_the_middle_is_a_failure_and_it_is_known_whether_a_chunk_may_follow(
    sent: bytes, takes_chunk: bool
) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(sent)

    async with serving(handle) as endpoint:
        sink = Recorder()
        exchange = await pool_of(endpoint).send(GET, sink)
        over = asyncio.Event()
        exchange.when_over(over.set)
        await over.wait()
        assert exchange.takes_chunk is takes_chunk
        with pytest.raises(UpstreamFailed) as caught:
            await exchange.ended()
        assert caught.value.may_have_run
        assert sink.raw == sent


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na" + response(b"again"),
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000,
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)
@on_uvloop
async def test_what_is_not_one_http_response_is_a_failure(garbage: bytes) -> None:
    async with serving(answering(garbage)) as endpoint:
        pool = pool_of(endpoint)
        assert isinstance(await failure_of(pool), UpstreamFailed)
        assert pool.idle == 0


@pytest.mark.parametrize("begun", [False, True])
@on_uvloop
async def test_leaving_early_closes_the_connection_at_once(begun: bool) -> None:
    upstream = Unfinished(EVENT_STREAM + chunk(b"data: 1\n\n") if begun else b"")
    async with serving(upstream) as endpoint:
        sink = Recorder()
        exchange = await pool_of(endpoint).send(GET, sink)
        waiting = asyncio.create_task(exchange.ended())
        if begun:
            await sink.until(1)
        else:
            await asyncio.sleep(0)
        waiting.cancel()
        async with asyncio.timeout(1):
            await upstream.left.wait()


@on_uvloop
async def test_a_slow_reader_slows_the_upstream_down() -> None:
    produced = 0
    total = 64 << 20

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal produced
        await read_message(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while produced < total:
            writer.write(bytes(1 << 20))
            await writer.drain()
            produced += 1 << 20

    async with serving(handle) as endpoint:
        async with fetch(pool_of(endpoint), GET) as answer:
            pieces = aiter(answer)
            received = len(await anext(pieces))
            for _ in range(1000):
                await asyncio.sleep(0)
            assert produced < total // 2
            async for piece in pieces:
                received += len(piece)
        assert received == total


@on_uvloop
async def test_fetch_takes_the_framing_off_and_raises_where_the_answer_breaks_off() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n") + chunk(b"data: 2\n\n"))

    async with serving(handle) as endpoint:
        async with fetch(pool_of(endpoint), GET) as answer:
            assert answer.status == 200
            assert answer.headers == [(b"content-type", b"text/event-stream")]
            pieces = aiter(answer)
            received = b""
            while len(received) < 18:
                received += await anext(pieces)
            assert received == b"data: 1\n\ndata: 2\n\n"
            with pytest.raises(UpstreamFailed):
                await anext(pieces)


@on_uvloop
async def test_big_bodies_go_up_whole_and_unix_sockets_work(tmp_path: Path) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await read_message(reader)
        writer.write(response(head + body))
        await writer.drain()
        await gone(reader)

    body = bytes(range(256)) * (16 << 10)
    async with serving(echo, path=tmp_path / "socket") as endpoint:
        request = encode_request(
            b"POST",
            b"/a?b=c",
            [(b"x-mine", b"1"), (b"connection", b"keep-alive, X-Hop"), (b"x-hop", b"1"), (b"authorization", b"secret")],
            fixed=fixed_headers(endpoint, "token"),
            body=body,
        )
        async with fetch(pool_of(endpoint), request) as answer:
            head, _, echoed = (await answer.read()).partition(b"\r\n\r\n")
        assert echoed == body
        assert head.split(b"\r\n") == [
            b"POST /a?b=c HTTP/1.1",
            b"Host: localhost",
            b"Authorization: Bearer token",
            b"x-mine: 1",
            b"Content-Length: %d" % len(body),
        ]


@on_uvloop
async def test_a_closed_pool_closes_what_is_idle_and_then_what_was_busy() -> None:
    go_on = asyncio.Event()
    closed = asyncio.Semaphore(0)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        await go_on.wait()
        writer.write(response(b"x"))
        await gone(reader)
        closed.release()

    async with serving(handle) as endpoint:
        pool = pool_of(endpoint)
        busy: Exchange = await pool.send(GET, Recorder())
        pool.close()
        go_on.set()
        await busy.ended()
        assert pool.idle == 0
        await closed.acquire()


@on_uvloop
async def test_where_several_are_busy_a_connection_is_opened_ahead() -> None:
    connections, let_go = 0, asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_message(reader)
        await let_go.wait()
        writer.write(response(b""))
        await gone(reader)

    async with serving(handle) as endpoint:
        pool = pool_of(endpoint)
        exchanges = [await pool.send(GET, Recorder()) for _ in range(2)]
        while not pool.idle:
            await asyncio.sleep(0)
        assert (connections, pool.busy, pool.idle) == (3, 2, 1)
        exchanges.append(await pool.send(GET, Recorder()))
        assert (connections, pool.busy, pool.idle) == (3, 3, 0)
        let_go.set()
        for each in exchanges:
            await each.ended()
        assert (pool.busy, pool.idle) == (0, 3)
        pool.close()
