"""Inference requests through the gateway: bytes, retries, deaths, leaving clients, leases."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import msgspec
import pytest

from modelpool.gateway.routes import INFERENCE
from modelpool.messages.routing import Delta
from modelpool.relay import Endpoint
from modelpool.relay.inference import inference_methods
from tests.gateway_world import TOKEN, chat, entry, gateway, request, snapshot_of
from tests.wire import Handler, Unfinished, chunk, gone, on_uvloop, read_message, response, serving

EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
NOT_BEGUN = b'{"error": {"message": "going", "type": "x", "param": null, "code": "%b"}}'


class Upstream:
    """An upstream that keeps what it was asked, and answers every request with the same bytes."""

    def __init__(self, answer: bytes = response(b'{"ok": true}', "Content-Type: application/json")) -> None:
        self.answer = answer
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []

    @property
    def count(self) -> int:
        return len(self.heads)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_message(reader)
            self.heads.append(head)
            self.bodies.append(body)
            writer.write(self.answer)
            await writer.drain()


async def nobody() -> Endpoint:
    """An address that refuses connections."""
    async with serving(Upstream()) as endpoint:
        return endpoint


@pytest.mark.parametrize(
    "raw",
    [
        response(b'{"x": 1}', "Content-Type: application/json", "X-Anything: y"),
        response(b'{"error": {"code": 400}}', status="400 Bad Request"),
        response(b'{"error": {"code": "unavailable"}}', status="503 Service Unavailable"),
        response(b"x" * 200_000, status="503 Service Unavailable"),
        response(b'{"error": {"code": 404}}', status="404 Not Found"),
        response(b'{"detail": "Not Found"}', status="404 Not Found"),
        EVENT_STREAM + b"".join(chunk(b"data: %d\n\n" % n) for n in range(50)) + b"0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
    ],
)
@on_uvloop
async def test_an_answer_passes_byte_for_byte(raw: bytes) -> None:
    async with serving(Upstream(raw)) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        for _ in range(3):
            assert (await client.ask(chat())).raw == raw


@on_uvloop
async def test_the_engine_gets_the_request_with_our_token_and_without_the_clients_secrets() -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint], prefix="/proxy/m")) as world:
        headers = {
            "Authorization": "Bearer client-secret",
            "X-Api-Key": "client-secret",
            "X-Mine": "1",
            "X-Request-Id": "mine",
            "Connection": "keep-alive, X-Hop",
            "X-Hop": "1",
            "TE": "trailers",
        }
        body = b'{"model": "m",  "odd":\t"spacing"}'
        await world.ask(request("POST", "/chat/completions?a=b%20c", body, headers))
        assert upstream.bodies == [body]
        assert upstream.heads[0].split(b"\r\n")[:-2] == [
            b"POST /proxy/m/v1/chat/completions?a=b%20c HTTP/1.1",
            f"Host: {endpoint}".encode(),
            f"Authorization: Bearer {TOKEN}".encode(),
            b"x-mine: 1",
            b"x-request-id: mine",
            b"Content-Length: %d" % len(body),
        ]


@on_uvloop
async def test_every_inference_route_reaches_a_path_that_engines_let_clients_use() -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--'
        for path, route in INFERENCE.items():
            body, kind = (form, "multipart/form-data; boundary=b") if b"/audio/" in path else (b'{"model": "m"}', "x")
            answer = await world.ask(request("POST", path.decode(), body, {"Content-Type": kind}))
            assert answer.status == 200
            assert upstream.heads[-1].startswith(b"POST %b HTTP/1.1" % route.path)
            assert inference_methods(route.path.decode()) == {"POST"}


@on_uvloop
async def test_each_chunk_reaches_the_client_before_the_next_is_made() -> None:
    seen = asyncio.Semaphore(0)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM)
        for number in range(100):
            writer.write(chunk(b"data: %d\n\n" % number))
            await seen.acquire()
        writer.write(b"0\r\n\r\n")
        await gone(reader)

    async with serving(handle) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(chat(stream=True))
        await client.reader.readuntil(b"\r\n\r\n")
        for number in range(100):
            expected = chunk(b"data: %d\n\n" % number)
            assert await client.reader.readexactly(len(expected)) == expected
            seen.release()
        assert await client.reader.readexactly(5) == b"0\r\n\r\n"


@on_uvloop
async def test_http_1_0_clients_get_the_bare_body_and_the_end_of_the_connection() -> None:
    raw = EVENT_STREAM + chunk(b"data: 1\n\n") + chunk(b"data: 2\n\n") + b"0\r\n\r\n"
    async with serving(Upstream(raw)) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        answer = await client.ask(chat(version="1.0"))
        assert answer.body == b"data: 1\n\ndata: 2\n\n"
        assert answer.headers == {"content-type": "text/event-stream", "connection": "close"}


@on_uvloop
async def test_a_client_that_wants_to_close_is_told_and_closed() -> None:
    async with serving(Upstream()) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        answer = await client.ask(chat(headers={"Connection": "close"}))
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await client.at_end()


@pytest.mark.parametrize(
    "raw", [response(b"x", "Connection: close"), response(b"x", "Keep-Alive: timeout=5", "Connection: Keep-Alive")]
)
@on_uvloop
async def test_what_an_upstream_says_of_its_connection_is_not_said_of_the_clients(raw: bytes) -> None:
    async with serving(Upstream(raw)) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        for _ in range(2):
            answer = await client.ask(chat())
            assert (answer.status, answer.headers) == (200, {"content-length": "1"})


@on_uvloop
async def test_a_body_that_ends_with_the_upstreams_connection_ends_the_clients_too() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello")

    async with serving(handle) as endpoint, gateway(entry("m", [endpoint])) as world:
        answer = await world.ask(chat())
        assert (answer.body, answer.headers) == (b"hello", {"connection": "close"})


@on_uvloop
async def test_idle_replicas_take_turns_and_a_busy_one_is_spared() -> None:
    first, second = Upstream(), Upstream()
    async with serving(first) as one, serving(second) as two, gateway(entry("m", [one, two])) as world:
        for _ in range(10):
            await world.ask(chat())
        assert (first.count, second.count) == (5, 5)
        busy = world.table.model("m").instances[0]
        with busy.lease():
            for _ in range(4):
                await world.ask(chat())
        assert (first.count, second.count) == (5, 9)


@on_uvloop
async def test_who_refuses_the_connection_is_passed_over() -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [await nobody(), endpoint])) as world:
        for _ in range(4):
            assert (await world.ask(chat())).status == 200
        assert upstream.count == 4
        assert world.instances.inflight == 0


@on_uvloop
async def test_when_all_refuse_the_answer_says_to_come_back() -> None:
    async with gateway(entry("m", [await nobody(), await nobody()])) as world:
        answer = await world.ask(chat())
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "model_not_ready", "1")
        assert world.instances.inflight == 0


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("503 Service Unavailable", b"instance_draining"),
        ("503 Service Unavailable", b"instance_not_ready"),
        ("404 Not Found", b"instance_not_found"),
    ],
)
@on_uvloop
async def test_an_instance_that_says_it_did_not_begin_is_passed_over(status: str, code: bytes) -> None:
    draining, ready = Upstream(response(NOT_BEGUN % code, status=status)), Upstream()
    async with serving(draining) as one, serving(ready) as two, gateway(entry("m", [one, two])) as world:
        for _ in range(4):
            assert (await world.ask(chat())).status == 200
        assert ready.count == 4
        assert draining.count > 0
    async with serving(draining) as one, gateway(entry("m", [one])) as world:
        answer = await world.ask(chat())
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "model_not_ready", "1")


@on_uvloop
async def test_a_stale_connection_costs_the_client_nothing() -> None:
    requests = 0

    async def one_each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await read_message(reader)
        requests += 1
        writer.write(response(b"x"))
        await reader.read(1)  # closes with the second request unread

    async with serving(one_each) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        for _ in range(5):
            assert (await client.ask(chat())).body == b"x"
        assert requests == 5


@on_uvloop
async def test_a_request_that_may_have_run_is_not_sent_again() -> None:
    requests = 0

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await read_message(reader)
        requests += 1

    async with serving(die) as one, serving(die) as two, gateway(entry("m", [one, two])) as world:
        client = await world.connect()
        answer = await client.ask(chat())
        assert (answer.status, answer.code, requests) == (502, "upstream_failed", 1)
        assert world.instances.inflight == 0
        assert (await client.ask(chat())).status == 502  # the client's connection goes on


@on_uvloop
async def test_a_stream_whose_instance_dies_ends_with_an_error_event() -> None:
    sent = EVENT_STREAM + chunk(b"data: 1\n\n")

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(sent)

    async with serving(die) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        answer = await client.ask(chat(stream=True))
        assert answer.raw.startswith(sent)
        events = [event for event in answer.body.split(b"\n\n") if event]
        assert events[0] == b"data: 1"
        error = msgspec.json.decode(events[1].removeprefix(b"data: "))["error"]
        assert error["code"] == "upstream_failed"
        assert len(events) == 2
        assert await client.at_end()
        assert world.instances.inflight == 0

        old = await (await world.connect()).ask(chat(stream=True, version="1.0"))
        assert b"upstream_failed" in old.body
        assert "transfer-encoding" not in old.headers


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("/v1/messages", b"event: error", "error"),
        ("/messages/count_tokens", b"event: error", "error"),
        ("/v1/responses", b"event: error", None),
        ("/v1/completions", b"", None),
    ],
)
@on_uvloop
async def test_errors_have_the_shape_of_their_api(path: str, name: bytes, kind: str | None) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))

    async with serving(die) as endpoint, gateway(entry("m", [endpoint])) as world:
        refused = await world.ask(request("POST", path, b'{"model": "x"}'))
        assert refused.json.get("type") == kind
        assert refused.code == "model_not_found"
        event = (await world.ask(request("POST", path, b'{"model": "m"}'))).body.split(b"\n\n")[-2]
        named, _, data = event.rpartition(b"data: ")
        assert named.strip() == name
        assert msgspec.json.decode(data).get("type") == kind
        assert msgspec.json.decode(data)["error"]["code"] == "upstream_failed"


@pytest.mark.parametrize(
    "sent",
    [
        EVENT_STREAM + b"10\r\ndata: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b'{"half'),
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nContent-Length: 100\r\n\r\ndata: 1\n\n",
    ],
)
@on_uvloop
async def test_an_answer_that_cannot_say_so_breaks_off(sent: bytes) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(sent)

    async with serving(die) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(chat(headers={"X-Request-Id": "mine"}))
        received = b""
        while piece := await client.reader.read(1000):
            received += piece
        assert sent.startswith(received.replace(b"X-Request-Id: mine\r\n", b""))
        assert world.instances.inflight == 0


@pytest.mark.parametrize("leaving", ["close", "half-close", "reset"])
@pytest.mark.parametrize("begun", [False, True])
@on_uvloop
async def test_a_client_that_leaves_takes_its_request_off_the_engine(leaving: str, begun: bool) -> None:
    upstream = Unfinished(EVENT_STREAM + chunk(b"data: 1\n\n") if begun else b"")
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(chat(stream=begun))
        await upstream.asked.wait()
        if begun:
            await client.reader.readuntil(b"data: 1")
        assert world.instances.inflight == 1
        if leaving == "close":
            client.close()
        elif leaving == "half-close":
            client.writer.write_eof()
        else:
            client.abort()
        since = time.monotonic()
        await upstream.left.wait()
        assert time.monotonic() - since < 1
        await world.until_idle()


@on_uvloop
async def test_a_client_that_leaves_while_we_connect_leaves_nothing_behind() -> None:
    connecting = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connecting.set()
        await gone(reader)

    async with serving(accept) as endpoint, gateway(entry("m", [endpoint])) as world:
        for _ in range(20):
            client = await world.connect()
            client.send(chat())
            client.abort()
        await world.until_idle()
        while world.listener.connections:
            await asyncio.sleep(0.001)


@on_uvloop
async def test_a_client_that_is_gone_before_its_request_was_begun_leaves_nothing_behind() -> None:
    async with gateway(entry("m", [])) as world:
        for _ in range(50):
            client = await world.connect()
            client.send(chat())
            await client.writer.drain()
            client.abort()  # both are there when the gateway looks: it reads the request and the end in one go
        while world.listener.connections:
            await asyncio.sleep(0.001)


@on_uvloop
async def test_a_client_that_reads_slowly_slows_the_engine_down_and_loses_nothing() -> None:
    total, produced = 32 << 20, 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal produced
        await read_message(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        block = bytes(range(256)) * 4096
        while produced < total:
            writer.write(block)
            await writer.drain()
            produced += len(block)
        await gone(reader)

    async with serving(handle) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(chat())
        await client.reader.readuntil(b"\r\n\r\n")
        stalled = -1
        while produced != stalled:  # until nothing moves any more
            stalled = produced
            await asyncio.sleep(0.05)
        assert produced < total // 2
        body = await client.reader.readexactly(total)
        assert body == bytes(range(256)) * (total // 256)
        await world.until_idle()


@on_uvloop
async def test_models_that_are_unknown_starting_or_without_a_worker_are_told_apart() -> None:
    known = [entry(name, []) for name in ("llama-3-8b", "llama-3-70b", "qwen", "org/mistral")]
    async with gateway(*known) as world:
        answer = await world.ask(chat("llama-3-8"))
        assert (answer.status, answer.code, answer.json["error"]["param"]) == (404, "model_not_found", "model")
        assert "`llama-3-8b`" in answer.message
        assert "qwen" not in answer.message
        answer = await world.ask(chat("qwen"))
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "model_not_ready", "7")
        assert len((await world.ask(chat("x" * 100_000))).raw) < 1000


@pytest.mark.parametrize(
    ("body", "code", "param", "names"),
    [
        (b"", "invalid_json", None, "empty"),
        (b"{", "invalid_json", None, "JSON"),
        (b'{"model": "m"', "invalid_json", None, "JSON"),
        (b"[1]", "invalid_request", None, "array"),
        (b"{}", "invalid_request", "model", "missing"),
        (b'{"model": 5}', "invalid_request", "model", "int"),
        (b'{"model": null}', "invalid_request", "model", "null"),
        (b'{"model": ""}', "invalid_request", "model", "empty string"),
        (b'{"a": ' + b"[" * 100_000, "invalid_json", None, "recursion"),
    ],
)
@on_uvloop
async def test_bodies_that_name_no_model_are_refused_by_field(
    body: bytes, code: str, param: str | None, names: str
) -> None:
    async with gateway(entry("m", [])) as world:
        raw = request("POST", "/v1/completions", body, {} if body else {"Content-Length": "0"})
        answer = await world.ask(raw)
        assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, code, param)
        assert answer.json["error"]["type"] == "invalid_request_error"
        assert names in answer.message


@on_uvloop
async def test_an_instance_that_is_routed_no_more_keeps_its_request_and_loses_its_idle_connections() -> None:
    go_on, closed = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))
        await go_on.wait()
        writer.write(b"0\r\n\r\n")
        await gone(reader)
        closed.set()

    async with serving(handle) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(chat(stream=True))
        await client.reader.readuntil(b"data: 1")
        world.table.apply(Delta(epoch="e1", sequence=2, changed={"m": entry("m", [])}))
        assert (await world.ask(chat())).status == 503
        go_on.set()
        assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(b"0\r\n\r\n")
        await closed.wait()


@on_uvloop
async def test_nothing_is_left_in_flight_after_many_requests_that_end_in_every_way() -> None:
    answers = [response(b"x"), EVENT_STREAM + chunk(b"data: 1\n\n") + b"0\r\n\r\n"]
    deaths = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", EVENT_STREAM + chunk(b"data: 1\n\n")]

    def dying(sent: bytes) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_message(reader)
            writer.write(sent)

        return handle

    async with AsyncExitStack() as stack:
        endpoints = [await stack.enter_async_context(serving(Upstream(raw))) for raw in answers]
        endpoints += [await stack.enter_async_context(serving(dying(raw))) for raw in deaths]
        world = await stack.enter_async_context(gateway(entry("m", [*endpoints, await nobody()])))

        async def one(read: int) -> None:
            client = await world.connect()
            client.send(chat(headers={"Connection": "close"}))
            await client.reader.read(read)
            client.abort()

        async with asyncio.TaskGroup() as clients:
            for number in range(150):
                clients.create_task(one((0, 10, 1_000_000)[number % 3]))
        await world.until_idle()
        world.table.apply(snapshot_of(entry("m", endpoints[:1]), sequence=9))
        assert (await world.ask(chat())).body == b"x"
