"""How requests are read off a connection: the same however they are cut, and as another strict reader reads them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpool.errors import PoolError
from modelpool.gateway.client_limits import Limits
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.request import Request

Read = list[tuple[bytes, bytes, bytes]]
"""Method, target, body."""

BODY = b'{"model": "m"}'
LENGTH = b"Content-Length: 14"
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b"4;x=y\r\n" + BODY[:4] + b"\r\n0a\r\n" + BODY[4:] + b"\r\n0\r\nX: y\r\n\r\n"

FRAMINGS = st.sampled_from(
    [
        ([], b""),
        ([LENGTH], BODY),
        ([b"content-length:14"], BODY),
        ([b"Content-Length: 0"], b""),
        ([CHUNKED], CHUNKS),
        ([b"transfer-encoding:\tCHUNKED"], CHUNKS),
        ([CHUNKED], b"0\r\n\r\n"),
        ([LENGTH, LENGTH], BODY),
        ([LENGTH, CHUNKED], CHUNKS),
        ([CHUNKED, CHUNKED], CHUNKS),
        ([b"Transfer-Encoding: gzip, chunked"], CHUNKS),
        ([b"Content-Length: +14"], BODY),
        ([b"Transfer-Encoding : chunked"], CHUNKS),
        ([b"X: y\n" + LENGTH], BODY),
        ([b"X: y", b" " + LENGTH], BODY),
    ]
)
METHODS = st.sampled_from([b"POST", b"GET", b"HEAD", b"DELETE"])
TARGETS = st.sampled_from([b"/v1/completions", b"/health?a=b", b"/x/../y", b"http://localhost/z", b"*"])
VERSIONS = st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/1.2"])
EXTRAS = st.lists(
    st.sampled_from(
        [
            b"X-A: b",
            b"Expect: 100-continue",
            b"Connection: close",
            b"Connection: keep-alive",
            b"Connection: Upgrade\r\nUpgrade: h2c",
            b"Connection: Upgrade\r\nUpgrade: websocket",
            b"X-B: \xff",
            b"Content-Type: a/b",
        ]
    ),
    max_size=2,
)
ENDS = st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r"])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """One request, right or wrong."""
    framing, body = draw(FRAMINGS)
    first = b" ".join([draw(METHODS), draw(TARGETS), draw(VERSIONS)])
    lines = draw(st.permutations([b"Host: localhost", *framing, *draw(EXTRAS)]))
    return b"".join(line + draw(ENDS) for line in (first, *lines)) + b"\r\n" + body


STREAMS = st.lists(messages(), min_size=1, max_size=4).map(b"".join)


class Transport(asyncio.Transport):
    """Takes everything, and remembers the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = False
        self.sent = b""

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return self.ended

    def close(self) -> None:
        self.ended = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


class Taking:
    """An Application and an Owner that keep what comes."""

    ending = retiring = False

    def __init__(self) -> None:
        self.read: Read = []

    def admit(self, request: Request) -> None: ...

    def refused(self, request: Request | None, error: PoolError) -> bytes:
        return b""

    def upgrades(self, method: bytes, target: bytes) -> bool:
        return False

    async def serve(self, request: Request, client: ClientConnection) -> None:
        self.read.append((request.method, request.path + request.query, request.body))
        await asyncio.sleep(0)
        client.answer(200, b"")

    def joined(self, connection: ClientConnection) -> None: ...

    def left(self, connection: ClientConnection) -> None: ...


async def taken(pieces: list[bytes]) -> tuple[Read, bytes, bool]:
    """The requests that were served, what was answered, and whether the connection was ended."""
    app, transport = Taking(), Transport()
    connection = ClientConnection(app, app, Limits(body_bytes=1000), asyncio.get_running_loop())
    connection.connection_made(transport)
    for piece in pieces:
        if transport.ended:
            break
        connection.data_received(piece)
        await asyncio.sleep(0)
    while connection.busy:
        await asyncio.sleep(0)
    return app.read, transport.sent.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""), transport.ended


@settings(max_examples=100, deadline=None)
@given(STREAMS, st.data())
def test_requests_are_the_same_however_they_are_cut(stream: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    async def both() -> None:
        whole = await taken([stream])
        assert await taken([each for each in pieces if each]) == whole
        assert await taken([bytes([byte]) for byte in stream]) == whole

    asyncio.run(both())


def read_by_another(stream: bytes) -> Read:
    """What h11 reads, up to where it refuses or the connection ends."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(stream)
    read: Read = []
    try:
        while True:
            event = server.next_event()
            if isinstance(event, h11.Request):
                method, target, body = event.method, event.target, b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                read.append((method, target, body))
                server.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                server.send(h11.EndOfMessage())
                if server.our_state is h11.MUST_CLOSE:
                    return read
                server.start_next_cycle()
            else:
                return read
    except h11.ProtocolError:
        return read


@settings(max_examples=200, deadline=None)
@given(STREAMS)
def test_what_is_served_is_what_another_strict_reader_reads(stream: bytes) -> None:
    served, _, _ = asyncio.run(taken([stream]))
    expected = [
        (method, target.removeprefix(b"http://localhost"), body) for method, target, body in read_by_another(stream)
    ]
    assert served == expected[: len(served)]


def test_the_streams_hold_what_is_served_and_what_is_refused() -> None:
    """So that the two above say something."""

    async def counted() -> tuple[int, int]:
        served = refused = 0
        for framing, body in [([LENGTH], BODY), ([CHUNKED], CHUNKS), ([LENGTH, CHUNKED], CHUNKS)]:
            head = b"\r\n".join([b"POST / HTTP/1.1", b"Host: localhost", *framing]) + b"\r\n\r\n"
            read, _, ended = await taken([head + body] * 2)
            served += len(read)
            refused += ended
            assert cast(Any, {each[2] for each in read}) <= {BODY}
        return served, refused

    assert asyncio.run(counted()) == (4, 1)


Paced = list[tuple[bytes, bool, int]]
"""Pieces; whether the client takes answers before each of them; how many turns the loop makes then."""


@st.composite
def paced(draw: st.DrawFn) -> Paced:
    stream = draw(STREAMS)
    cuts = sorted(draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    pieces = [stream[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    return [(piece, draw(st.booleans()), draw(st.integers(0, 3))) for piece in pieces]


async def taken_at_its_pace(pieces: Paced) -> Read:
    """The requests that were served."""
    app, transport = Taking(), Transport()
    connection = ClientConnection(app, app, Limits(body_bytes=1000), asyncio.get_running_loop())
    connection.connection_made(transport)
    for piece, takes, turns in pieces:
        connection.resume_writing() if takes else connection.pause_writing()
        for _ in range(turns):
            await asyncio.sleep(0)
        if not transport.ended:
            connection.data_received(piece)
    connection.resume_writing()
    while connection.busy:
        await asyncio.sleep(0)
    return app.read


@settings(max_examples=200, deadline=None)
@given(paced())
def test_requests_keep_their_order_when_the_client_takes_no_answer_for_a_while(pieces: Paced) -> None:
    async def both() -> None:
        whole, _, _ = await taken([b"".join(piece for piece, _, _ in pieces)])
        assert await taken_at_its_pace(pieces) == whole

    asyncio.run(both())
