"""The gateway's listener as an HTTP/1.1 server: framing, order, limits, refusals."""

from __future__ import annotations

import asyncio
import gc
import socket

import pytest

from modelpool.gateway.client_limits import Limits
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.listener import ACCEPTED
from modelpool.relay.upstream import _Connection as Connection
from tests.gateway_world import Client, World, chat, entry, gateway, request
from tests.wire import Unfinished, chunk, gone, on_uvloop, read_message, response, serving

HEALTH = request("GET", "/health")
BODY = b'{"model": "m", "messages": []}'
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the body it got."""
    while True:
        _, body = await read_message(reader)
        writer.write(response(body))
        await writer.drain()


@on_uvloop
async def test_a_connection_serves_request_after_request() -> None:
    async with gateway() as world:
        client = await world.connect()
        for _ in range(3):
            answer = await client.ask(HEALTH)
            assert (answer.status, answer.json["status"]) == (200, "ok")
            assert answer.json["snapshot"]["epoch"] == "e1"


@on_uvloop
async def test_many_clients_that_come_at_once_are_taken_within_a_few_turns_of_the_loop() -> None:
    async with gateway() as world:
        clients = [socket.create_connection(world.endpoint) for _ in range(2 * ACCEPTED)]
        for _ in range(8):
            await asyncio.sleep(0)
        taken = world.listener.connections
        for client in clients:
            client.close()
    assert taken == len(clients)


@on_uvloop
async def test_closed_connections_leave_nothing_for_the_garbage_collector() -> None:
    kinds = ClientConnection, Connection

    def alive() -> int:
        return sum(type(each) in kinds for each in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()
    try:
        async with serving(echo) as endpoint, gateway(entry("m", [endpoint])) as world:
            for _ in range(5):
                assert (await world.ask(chat())).status == 200
                assert (await world.ask(b"GET / HTTP/9\r\n\r\n")).status == 400
            await world.until_idle()
            while world.listener.connections:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        assert alive() == before
    finally:
        gc.enable()


@on_uvloop
async def test_pipelined_requests_are_answered_in_order() -> None:
    order: list[int] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_message(reader)
            order.append(body.count(b"x"))
            for _ in range(20 - order[-1]):
                await asyncio.sleep(0)  # the first takes longest
            writer.write(response(b"%d" % order[-1]))

    async with serving(handle) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        count = 20
        client.send(b"".join(chat(filler="x" * number) + HEALTH for number in range(count)))
        for number in range(count):
            assert (await client.answer()).body == b"%d" % number
            assert (await client.answer()).json["status"] == "ok"
        assert order == list(range(count))


@on_uvloop
async def test_pipelined_requests_that_come_while_one_is_served_wait_and_a_client_that_left_is_seen() -> None:
    upstream = Unfinished()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(chat())
        await upstream.asked.wait()
        client.send(HEALTH * 10)
        client.close()
        async with asyncio.timeout(1):
            await upstream.left.wait()


@on_uvloop
async def test_a_client_that_sent_far_ahead_and_left_is_seen_too() -> None:
    upstream = Unfinished()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(chat())
        await upstream.asked.wait()
        client.send(HEALTH * 3000)
        await asyncio.sleep(0.2)  # until the gateway has stopped reading: what is in its socket hides the end
        client.close()
        async with asyncio.timeout(2):
            await upstream.left.wait()


@pytest.mark.parametrize("headers", [{}, {"Connection": "Upgrade", "Upgrade": "h2c"}])
@on_uvloop
async def test_thousands_of_small_requests_in_a_row_are_all_answered(headers: dict[str, str]) -> None:
    async with gateway() as world:
        client = await world.connect()
        count = 8000
        client.send(request("GET", "/v1/models", headers=headers) * count)
        for _ in range(count):
            assert (await client.answer()).status == 200


@on_uvloop
async def test_a_request_in_crumbs_is_the_same_request() -> None:
    async with serving(echo) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in CHUNKED + chunk(BODY[:5]) + chunk(BODY[5:]) + b"0\r\n\r\n":
            client.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await client.answer()).body == BODY


@pytest.mark.parametrize("trailers", [b"", b"X-Trailer: 1\r\nHost: evil\r\n"])
@on_uvloop
async def test_chunked_bodies_go_up_in_one_piece(trailers: bytes) -> None:
    heads = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await read_message(reader)
        heads.append(head.lower())
        writer.write(response(body))
        await gone(reader)

    async with serving(handle) as endpoint, gateway(entry("m", [endpoint])) as world:
        answer = await world.ask(CHUNKED + chunk(BODY[:9]) + chunk(BODY[9:]) + b"0\r\n" + trailers + b"\r\n")
        assert answer.body == BODY
        assert b"content-length: %d\r\n" % len(BODY) in heads[0]
        assert b"trailer" not in heads[0]
        assert b"transfer-encoding" not in heads[0]


@on_uvloop
async def test_who_expects_100_continue_gets_it_before_the_body() -> None:
    async with serving(echo) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        for _ in range(2):
            whole = request("POST", "/v1/completions", BODY, {"Expect": "100-continue"})
            client.send(whole[: -len(BODY)])
            assert (await client.answer()).status == 100
            client.send(BODY)
            assert (await client.answer()).body == BODY


@on_uvloop
async def test_who_expects_100_continue_and_sends_a_broken_body_at_once_is_told_what_is_wrong() -> None:
    async with gateway() as world:
        loop, told = asyncio.get_running_loop(), list[object]()
        loop.set_exception_handler(lambda _, context: told.append(context))
        head = request("POST", "/v1/completions", headers={"Expect": "100-continue", "Transfer-Encoding": "chunked"})
        answer = await world.ask(head + b"no chunk\r\n")
        assert (answer.status, answer.code) == (400, "invalid_http")
        assert told == []


@on_uvloop
async def test_who_expects_100_continue_for_a_refused_request_gets_the_refusal_instead() -> None:
    async with gateway(api_key="key") as world:
        client = await world.connect()
        client.send(request("POST", "/v1/completions", BODY, {"Expect": "100-continue"})[: -len(BODY)])
        assert (await client.answer()).status == 401
        assert await client.at_end()


@on_uvloop
async def test_head_has_the_head_of_get() -> None:
    async with gateway(entry("m", [])) as world:
        client = await world.connect()
        for path in ("/v1/models", "/v1/models/m", "/models", "/"):
            full = await client.ask(request("GET", path))
            bare = await client.ask(request("HEAD", path))
            assert bare.raw == full.raw[: -len(full.body)]
        missing = await client.ask(request("HEAD", "/v1/models/nothing"))
        assert (missing.status, missing.body) == (404, b"")
        assert (await client.ask(HEALTH)).status == 200


@on_uvloop
async def test_http_1_0_is_answered_and_closed() -> None:
    async with gateway() as world:
        client = await world.connect()
        answer = await client.ask(b"GET /health HTTP/1.0\r\n\r\n")
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await client.at_end()


@on_uvloop
async def test_an_upgrade_is_ignored_and_its_body_read() -> None:
    async with serving(echo) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        h2c = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAM"}
        for _ in range(2):
            assert (await client.ask(request("POST", "/v1/completions", BODY, h2c))).body == BODY
        websocket = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x"}
        assert (await client.ask(request("GET", "/v1/other", headers=websocket))).code == "route_not_found"
        assert (await client.ask(request("GET", "/health", headers=websocket))).status == 200


@on_uvloop
async def test_an_upgrade_in_http_1_0_is_answered_and_closed() -> None:
    async with serving(echo) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        h2c = {"Connection": "Upgrade", "Upgrade": "h2c"}
        client.send(request("POST", "/v1/completions", BODY, h2c, version="1.0") + HEALTH)
        assert (await client.answer()).body == BODY
        assert await client.at_end()


@on_uvloop
async def test_an_absolute_target_is_its_path_and_its_host() -> None:
    async with gateway() as world:
        assert (await world.ask(request("GET", "http://localhost:1/health"))).status == 200
        assert (await world.ask(request("GET", "http://evil.example/v1/models"))).status == 403


async def refused(world: World, raw: bytes, status: int, code: str) -> None:
    """The answer is this error in our envelope, and the connection ends with it."""
    client = await world.connect()
    answer = await client.ask(raw)
    assert (answer.status, answer.code) == (status, code)
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["connection"] == "close"
    assert await client.at_end()


def post(*lines: bytes, body: bytes = b"0\r\n\r\n") -> bytes:
    return b"\r\n".join([b"POST /v1/completions HTTP/1.1", b"Host: localhost", *lines]) + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "raw",
    [
        post(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        post(b"Transfer-Encoding: chunked", b"Content-Length: 5"),
        post(b"Content-Length: 5", b"Content-Length: 6"),
        post(b"Content-Length: 5", b"Content-Length: 5"),
        post(b"Content-Length: 5, 5"),
        post(b"Content-Length: +5"),
        post(b"Content-Length: 0x5"),
        post(b"Content-Length: -5"),
        post(b"Content-Length : 5"),
        post(b"Content-Length: 99999999999999999999999"),
        post(b"Transfer-Encoding: gzip, chunked"),
        post(b"Transfer-Encoding: chunked, identity"),
        post(b"Transfer-Encoding: xchunked"),
        post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
        post(b"Transfer-Encoding: chunked", body=b"5;\r\nabc\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"-1\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"5\r\nabcdeXX0\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"5\nabcde\n0\n\n"),
        post(b"Transfer-Encoding: chunked", body=b"5 \r\nabcde\r\n0\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"0x5\r\nabcde\r\n0\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"\r\nabcde\r\n0\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"10000000000000005\r\nabcde\r\n0\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"5;a\nb\r\nabcde\r\n0\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"5;a\rb\r\nabcde\r\n0\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"5\r\nabcde\n0\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"5\r\nabcde\r\n0\r\nX: y\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"5\r\nabcde\r\n0\r\nX: y\r\n z\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b"5\r\nabcde\r\n0\r\nContent-Length: 5\r\n\r\n"),
        post(b"Transfer-Encoding: \x0bchunked"),
        post(b'Transfer-Encoding: "chunked"'),
        post(b"Transfer-Encoding: chunked,"),
        post(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"),
        post(b"Transfer-Encoding: identity", body=b""),
        post(b"Transfer-Encoding:", b"Content-Length: 5", body=b"abcde"),
        post(b"Transfer-Encoding:\r\n chunked"),
        post(b"Transfer-Encoding: chunked\x00"),
        post(b" Transfer-Encoding: chunked"),
        post(b"Content-Length:", body=b""),
        post(b"Content-Length: 1_0"),
        post(b"Content-Length: 5.0"),
        post(b"Content-Length: 5 5"),
        post(b"Content-Length: 18446744073709551621", body=b"abcde"),
        post(b"X-A: a\rb"),
        post(b"X-A: a\x01"),
        post(b"X-A\x01: a"),
        post(b"X-A"),
        b"POST /v1/completions HTTP/1.1\rHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.2\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/01.1\r\nHost: localhost\r\n\r\n",
        b"GET /health http/1.1\r\nHost: localhost\r\n\r\n",
        b"GET\t/health\tHTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /h\xc3\xa4lth HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b" GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        post(b"Host: other"),
        post(b"Authorization: Bearer a", b"Authorization: Bearer b"),
        post(b"X-A: a\x00b"),
        post(b"X-A: a\nX-B: b"),
        post(b"X-A: a", b" folded"),
        post(b"X A: a"),
        post(b": a"),
        b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: localhost\n\n",
        b"GET /health\r\nHost: localhost\r\n\r\n",
        b"GET /he alth HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"get /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
    ],
)
@on_uvloop
async def test_what_two_readers_could_read_differently_is_refused_and_the_connection_closed(raw: bytes) -> None:
    asked = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await read_message(reader)
        asked += 1
        writer.write(response(b"x"))

    async with serving(count) as endpoint, gateway(entry("m", [endpoint])) as world:
        await refused(world, raw + HEALTH, 400, "invalid_http")
        assert asked == 0
        assert (await world.ask(HEALTH)).status == 200


@pytest.mark.parametrize(
    "raw",
    [
        post(b"Content-Length: 000%d" % len(BODY), body=BODY),
        post(b"Content-Length:  %d  " % len(BODY), body=BODY),
        post(b"Content-Length: %d" % len(BODY), b"Transfer_Encoding: chunked", body=BODY),
        post(b"Content-Length: %d" % len(BODY), b"Connection: Content-Length, Host", body=BODY),
        post(b"Content-Length: %d" % len(BODY), b"Connection: Upgrade", b"Upgrade: h2c", body=BODY),
        post(b"Content-Length: %d" % len(BODY), b"Expect: something-else", body=BODY),
        b"\r\n\r\n" + post(b"Content-Length: %d" % len(BODY), body=BODY),
        post(b"Transfer-Encoding:\tChunked", body=chunk(BODY) + b"0\r\n\r\n"),
        post(b"Transfer-Encoding: chunked", body=b'%X;a=1;b="2;3"\r\n%b\r\n000\r\n\r\n' % (len(BODY), BODY)),
        post(b"Transfer-Encoding: chunked", body=b"0000000000000000000000%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
        post(b"Transfer-Encoding: chunked", b"Connection: Upgrade", b"Upgrade: h2c", body=chunk(BODY) + b"0\r\n\r\n"),
    ],
)
@on_uvloop
async def test_unusual_but_clear_framing_brings_the_body_and_nothing_else_to_the_engine(raw: bytes) -> None:
    got = []

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            got.append(await read_message(reader))
            writer.write(response(b"x"))

    async with serving(keep) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(raw + HEALTH + raw)
        assert (await client.answer()).body == b"x"
        assert (await client.answer()).json["status"] == "ok"
        assert (await client.answer()).body == b"x"
        for head, body in got:
            assert body == BODY
            assert head.lower().count(b"\r\ncontent-length:") == 1
            assert b"\r\ntransfer-encoding:" not in head.lower()
            assert head.lower().count(b"\r\nhost:") == 1
        assert len(got) == 2


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
@on_uvloop
async def test_a_body_that_nobody_asked_for_is_read_and_is_no_request(method: str) -> None:
    hidden = request("GET", "/v1/models")
    async with gateway(entry("m", [])) as world:
        client = await world.connect()
        for path in ("/health", "/v1/chat/completions"):
            for framed in (
                request(method, path, hidden),
                request(method, path, headers={"Transfer-Encoding": "chunked"}) + chunk(hidden) + b"0\r\n\r\n",
            ):
                client.send(framed + HEALTH)
                first = await client.answer(head_only=method == "HEAD")
                if first.headers.get("connection") == "close":  # refused with its body unread
                    assert first.status == 405
                    assert await client.at_end()
                    client = await world.connect()
                else:
                    assert (await client.answer()).json["status"] == "ok"


@on_uvloop
async def test_a_refusal_waits_for_its_turn() -> None:
    async with serving(echo) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(request("POST", "/v1/completions", BODY) + HEALTH + b"garbage\r\n\r\n" + HEALTH)
        assert (await client.answer()).body == BODY
        assert (await client.answer()).status == 200
        assert (await client.answer()).code == "invalid_http"
        assert await client.at_end()


@on_uvloop
async def test_a_head_that_is_too_long_is_refused_whether_it_comes_whole_or_never_ends() -> None:
    async with gateway() as world:
        long = request("GET", "/health", headers={"X-Long": "x" * 70_000})
        await refused(world, long, 431, "headers_too_large")
        many = request("GET", "/health", headers={f"X-{number}": "x" for number in range(10_000)})
        await refused(world, many, 431, "headers_too_large")
        await refused(world, b"GET /" + b"x" * 70_000, 431, "headers_too_large")
        assert (await world.ask(request("GET", "/health", headers={"X-Long": "x" * 60_000}))).status == 200


@on_uvloop
async def test_a_body_that_is_too_long_is_refused_and_the_refusal_can_be_read() -> None:
    async with serving(echo) as endpoint, gateway(entry("m", [endpoint]), limits=Limits(body_bytes=100_000)) as world:
        announced = request("POST", "/v1/completions", b"x" * 100_001)
        await refused(world, announced, 413, "body_too_large")
        await refused(world, CHUNKED + chunk(b"x" * 60_000) * 2, 413, "body_too_large")
        # A client that sends all of it before it reads.
        client = await world.connect()
        client.send(request("POST", "/v1/completions", b"x" * (8 << 20)))
        await client.writer.drain()
        assert (await client.answer()).code == "body_too_large"
        fits = b'{"model": "m", "x": "' + b"x" * 50_000 + b'"}'
        assert (await world.ask(request("POST", "/v1/completions", fits))).body == fits


@pytest.mark.parametrize("half", [b"GET /hea", HEALTH[:-2], request("POST", "/v1/completions", BODY)[:-3]])
@on_uvloop
async def test_half_a_request_has_a_deadline(half: bytes) -> None:
    limits = Limits(body_bytes=1000, head_s=0.05, body_s=0.05, check_s=0.01)
    async with gateway(limits=limits) as world:
        await refused(world, half, 408, "request_timeout")


@on_uvloop
async def test_a_body_that_trickles_has_a_deadline_and_one_that_flows_has_none() -> None:
    limits = Limits(body_bytes=1 << 20, body_s=0.3, body_rate=1000, check_s=0.01)
    async with serving(echo) as endpoint, gateway(entry("m", [endpoint]), limits=limits) as world:
        trickle = await world.connect()
        trickle.send(CHUNKED)

        async def drip(client: Client, data: bytes) -> None:
            while not client.writer.is_closing():
                client.send(data)
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip(trickle, chunk(b" ")))
        async with asyncio.timeout(5):
            assert (await trickle.answer()).code == "request_timeout"
        dripping.cancel()

        flow = await world.connect()
        flow.send(CHUNKED)
        for _ in range(30):  # five times as long as the deadline
            flow.send(chunk(b" " * 200))
            await asyncio.sleep(0.05)
        flow.send(chunk(BODY) + b"0\r\n\r\n")
        assert (await flow.answer()).body.strip() == BODY


@on_uvloop
async def test_an_idle_connection_is_closed_in_the_end_without_a_word() -> None:
    async with gateway(limits=Limits(body_bytes=1000, idle_s=0.05, check_s=0.01)) as world:
        client = await world.connect()
        assert (await client.ask(HEALTH)).status == 200
        assert await client.at_end()
        silent = await world.connect()
        assert await silent.at_end()


@on_uvloop
async def test_wrong_methods_name_the_right_ones_and_unknown_paths_themselves() -> None:
    async with gateway(entry("m", [])) as world:
        client = await world.connect()
        for method, path, allowed in [
            ("GET", "/v1/chat/completions", "POST"),
            ("DELETE", "/completions", "POST"),
            ("POST", "/v1/models", "GET, HEAD"),
            ("OPTIONS", "/health", "GET, HEAD"),
            ("PUT", "/v1/models/register", "POST"),
        ]:
            answer = await client.ask(request(method, path))
            assert (answer.status, answer.code, answer.headers["allow"]) == (405, "method_not_allowed", allowed)
        for path in ("/v1/nothing", "/v2/models", "/admin", "/workersx", "/v1/responses/r.1", "/v1//models", "/sleep"):
            answer = await client.ask(request("GET", path))
            assert (answer.status, answer.code) == (404, "route_not_found")
            assert path in answer.message


@on_uvloop
async def test_models_are_listed_whatever_their_state_and_found_by_name() -> None:
    async with serving(echo) as endpoint, gateway(entry("m", [endpoint]), entry("org/n", [])) as world:
        client = await world.connect()
        for path in ("/v1/models", "/models"):
            listed = (await client.ask(request("GET", path))).json
            assert listed["object"] == "list"
            assert [(model["id"], model["object"], model["root"]) for model in listed["data"]] == [
                ("m", "model", "m"),
                ("org/n", "model", "org/n"),
            ]
        for path in ("/v1/models/org/n", "/models/org%2Fn"):
            assert (await client.ask(request("GET", path))).json["id"] == "org/n"
        answer = await client.ask(request("GET", "/v1/models/org/m"))
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert "`org/n`" in answer.message


@on_uvloop
async def test_a_client_that_pipelines_faster_than_it_reads_gets_every_answer() -> None:
    async with gateway(*(entry(f"model-{number}", []) for number in range(500))) as world:
        client = await world.connect()
        models = request("GET", "/v1/models")
        count = 2000
        client.send(models * count)
        one = await client.answer()
        for _ in range(count - 1):
            assert (await client.answer()).raw == one.raw


@on_uvloop
async def test_ending_lets_what_is_served_finish_and_closes_the_rest() -> None:
    go_on = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        await go_on.wait()
        writer.write(response(b"done"))

    async with serving(handle) as endpoint:
        async with gateway(entry("m", [endpoint]), grace_s=5) as world:
            idle, busy = await world.connect(), await world.connect()
            assert (await idle.ask(HEALTH)).status == 200
            busy.send(chat())
            while not world.instances.inflight:
                await asyncio.sleep(0)
            answering = asyncio.create_task(busy.answer())
            asyncio.get_running_loop().call_later(0.05, go_on.set)
        answer = await answering
        assert (answer.body, answer.headers["connection"]) == (b"done", "close")
        assert await idle.at_end()


@on_uvloop
async def test_ending_cuts_what_does_not_finish() -> None:
    upstream = Unfinished()
    async with serving(upstream) as endpoint:
        async with gateway(entry("m", [endpoint]), grace_s=0.01) as world:
            client = await world.connect()
            client.send(chat())
            while not world.instances.inflight:
                await asyncio.sleep(0)
        await upstream.left.wait()
        assert await client.at_end()
