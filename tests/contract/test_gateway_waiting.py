"""Requests that wait for their model, with real sockets: what clients see, and what is left when they are gone."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

import msgspec
import openai
import pytest
from websockets.asyncio.client import ClientConnection

from modelpool.core.admission import Bounds
from modelpool.gateway.hold import Rules
from modelpool.messages.routing import KeysDelta, ModelEntry, Unavailable
from modelpool.relay import Endpoint
from tests.contract.test_gateway_passing import EVENT_STREAM, Upstream, nobody
from tests.contract.test_gateway_realtime import UPDATE, hear, say, talking, transcribed
from tests.contract.test_gateway_responses import fakes
from tests.gateway_world import Client, World, chat, entry, gateway, key, request, snapshot_of
from tests.wire import chunk, gone, on_uvloop, read_message, response, serving

BEAT_S = 0.02
COMMENT = b": waiting\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
EVENTS = b"data: 1\n\ndata: [DONE]\n\n"
CHUNKED = EVENT_STREAM + chunk(b"data: 1\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
MEASURED = response(EVENTS, "content-type: text/event-stream")
UNMEASURED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + EVENTS


def rules(**more: object) -> Rules:
    fields = {"max_ongoing": 100, "max_wait_s": 20.0, "heartbeat_s": BEAT_S, **more}
    return msgspec.convert(fields, Rules)


def away(alias: str = "m", *, coming: bool = True) -> ModelEntry:
    why = Unavailable(code="model_not_ready", message=f"`{alias}` starts.", retry_after=7.0, on_its_way=coming)
    return ModelEntry(alias=alias, created=1, unavailable=why)


class Times:
    """What the manager says, one thing after the other."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sequence = 1

    def say(self, *entries: ModelEntry) -> None:
        self._sequence += 1
        self._world.table.apply(snapshot_of(*entries, sequence=self._sequence))


async def until_waiting(world: World, count: int = 1) -> None:
    while world.room.waiting != count:
        await asyncio.sleep(0.001)


async def opened(client: Client) -> bytes:
    """Read until the first comment; what came."""
    return await client.reader.readuntil(COMMENT)


@on_uvloop
async def test_many_that_wait_for_hardly_any_time_are_all_told_so() -> None:
    async with gateway(away(), rules=rules()) as world:
        clients = [await world.connect() for _ in range(200)]
        for client in clients:
            client.send(chat(headers={"X-ModelPool-Max-Wait": "0.0004"}) * 5)
        for client in clients:
            codes = [(await client.answer()).code for _ in range(5)]
            assert codes == ["model_not_ready"] * 5
        assert world.room.waiting == 0


@on_uvloop
async def test_a_plain_request_waits_and_notices_nothing() -> None:
    raw = response(b'{"ok": true}', "Content-Type: application/json")
    upstream = Upstream(raw)
    async with serving(upstream) as endpoint, gateway(away(), rules=rules()) as world:
        client = await world.connect()
        client.send(chat())
        await until_waiting(world)
        await asyncio.sleep(3 * BEAT_S)
        Times(world).say(entry("m", [endpoint]))
        assert (await client.answer()).body == b'{"ok": true}'
        assert upstream.count == 1
        await world.until_idle()


@pytest.mark.parametrize("raw", [CHUNKED, MEASURED, UNMEASURED], ids=["chunked", "measured", "unmeasured"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@on_uvloop
async def test_a_stream_that_waits_hears_comments_then_its_events_under_one_head(raw: bytes, version: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        for byte in raw:  # whatever the segments
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
            await writer.drain()
        if raw is not UNMEASURED:
            await gone(reader)

    async with serving(answer) as endpoint, gateway(away(), rules=rules()) as world:
        client = await world.connect()
        client.send(chat(stream=True, version=version))
        begin = await opened(client)
        assert begin.startswith(HEAD)
        Times(world).say(entry("m", [endpoint]))
        if version == "1.0":
            assert b"\r\nConnection: close\r\n" in begin
            rest = await client.reader.read()
            body = begin.partition(b"\r\n\r\n")[2] + rest
        else:
            assert b"\r\nTransfer-Encoding: chunked\r\n" in begin
            assert b"\r\nx-request-id: " in begin.lower()
            body = COMMENT + await rest_of_chunks(client)
            assert (await client.ask(request("GET", "/health"))).status == 200  # the connection goes on
        assert body == COMMENT * body.count(COMMENT) + EVENTS
        await world.until_idle()


async def client_is_let_go(client: Client) -> bool:
    try:
        async with asyncio.timeout(0.05):
            return await client.at_end()
    except TimeoutError:
        return False


async def rest_of_chunks(client: Client) -> bytes:
    """What follows in chunks, when the data of one was just read."""
    assert await client.reader.readexactly(2) == b"\r\n"
    body = b""
    while size := int(await client.reader.readuntil(b"\r\n"), 16):
        body += (await client.reader.readexactly(size + 2))[:-2]
    assert await client.reader.readexactly(2) == b"\r\n"
    return body


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (response(b'{"error":\n {"message": "too long", "code": 400}}', status="400 Bad Request"), b'"too long"'),
        (response(b'{"error": {"message": "gone", "code": 404}}', status="404 Not Found"), b'"gone"'),
        (response(b"oops", status="500 Internal Server Error"), b'"upstream_failed"'),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b'"upstream_failed"'),
        (b"", b'"upstream_failed"'),
        (EVENT_STREAM, b'"upstream_failed"'),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nContent-Length: 9\r\n\r\ndata", b"upstream_failed"),
    ],
)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@on_uvloop
async def test_what_fails_after_comments_is_said_in_the_stream(raw: bytes, says: bytes, version: str) -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(raw)

    async with serving(fail) as endpoint, gateway(away(), rules=rules()) as world:
        client = await world.connect()
        client.send(chat(stream=True, version=version))
        await opened(client)
        Times(world).say(entry("m", [endpoint]))
        body = await rest_of_chunks(client) if version == "1.1" else await client.reader.read()
        *_, event, end = body.split(b"\n\n")
        assert event.startswith(b"data: {")
        assert says in event
        assert "error" in msgspec.json.decode(event.removeprefix(b"data: "))
        assert end == b""
        if version == "1.1" and not await client_is_let_go(client):
            assert (await client.ask(request("GET", "/health"))).status == 200
        await world.until_idle()


@on_uvloop
async def test_a_model_that_fails_meanwhile_is_an_error_or_an_event() -> None:
    async with gateway(away(), rules=rules()) as world:
        plain, stream = await world.connect(), await world.connect()
        plain.send(chat())
        stream.send(chat(stream=True))
        await opened(stream)
        Times(world).say(away(coming=False))
        answer = await plain.answer()
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "model_not_ready", "7")
        assert b'"code":"model_not_ready"' in await rest_of_chunks(stream)
        assert await stream.at_end()
        await world.until_idle()


@on_uvloop
async def test_the_openai_sdk_takes_a_stream_that_waited() -> None:
    told = b'data: {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}\n\n'
    raw = EVENT_STREAM + chunk(told) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    async with serving(Upstream(raw)) as endpoint, gateway(away(), rules=rules()) as world:
        async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="x", max_retries=0) as sdk:
            asking = asyncio.ensure_future(sdk.chat.completions.create(model="m", messages=[], stream=True))
            await until_waiting(world)
            await asyncio.sleep(3 * BEAT_S)
            Times(world).say(entry("m", [endpoint]))
            assert [each.id async for each in await asking] == ["1"]
            failing = await sdk.chat.completions.create(
                model="m", messages=[], stream=True, extra_headers={"X-ModelPool-Max-Wait": "5"}
            )
            assert [each.id async for each in failing] == ["1"]


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"X-ModelPool-Max-Wait": "0"}, 503, "model_not_ready"),
        ({"X-ModelPool-Max-Wait": "0.05"}, 503, "model_not_ready"),
        ({"X-ModelPool-No-Cold-Start": "true"}, 503, "model_not_ready"),
        ({"X-ModelPool-Max-Wait": "long"}, 400, "invalid_header"),
        ({"X-ModelPool-No-Cold-Start": "perhaps"}, 400, "invalid_header"),
    ],
)
@on_uvloop
async def test_a_request_says_whether_it_waits(headers: dict[str, str], status: int, code: str) -> None:
    async with gateway(away(), rules=rules()) as world:
        answer = await world.ask(chat(headers=headers))
        assert (answer.status, answer.code) == (status, code)
        if status == 400:
            assert answer.json["error"]["param"] in headers
        else:
            assert answer.headers["retry-after"] == "7"


@on_uvloop
async def test_where_nobody_may_wait_the_answer_comes_at_once() -> None:
    async with gateway(away(), rules=rules(max_wait_s=0.0)) as world:
        answer = await world.ask(chat(headers={"X-ModelPool-Max-Wait": "5"}))
        assert (answer.status, answer.code) == (503, "model_not_ready")


@on_uvloop
async def test_a_full_room_is_a_429() -> None:
    async with gateway(away(), rules=rules(bounds=Bounds(tickets=1, bytes=1000))) as world:
        first = await world.connect()
        first.send(chat())
        await until_waiting(world)
        answer = await world.ask(chat())
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (429, "waiting_room_full", "7")


@pytest.mark.parametrize("leaving", ["close", "half-close", "reset"])
@pytest.mark.parametrize("hears", [False, True])
@on_uvloop
async def test_a_client_that_leaves_waits_no_more_and_reaches_no_engine(leaving: str, hears: bool) -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(away(), rules=rules()) as world:
        client = await world.connect()
        client.send(chat(stream=hears))
        await until_waiting(world)
        if hears:
            await opened(client)
        if leaving == "close":
            client.close()
        elif leaving == "half-close":
            client.writer.write_eof()
        else:
            client.abort()
        async with asyncio.timeout(1):
            await until_waiting(world, 0)
        Times(world).say(entry("m", [endpoint]))
        assert (await world.ask(chat())).status == 200
        assert upstream.count == 1
        await world.until_idle()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@on_uvloop
async def test_a_key_that_is_revoked_while_its_request_waits_reaches_no_engine(path: str) -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(away(), keys=[key("secret", id="key-a")], rules=rules()) as world:
        client = await world.connect()
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        client.send(request("POST", path, b'{"model": "m"}', headers))
        await until_waiting(world)
        world.keys.apply(KeysDelta(epoch="e1", sequence=2, revoked=("key-a",)))
        Times(world).say(entry("m", [endpoint]))
        answer = await client.answer()
        assert (answer.status, answer.code, upstream.count) == (401, "invalid_api_key", 0)
        await world.until_idle()


@on_uvloop
async def test_never_more_than_so_many_are_ongoing_and_each_has_its_turn() -> None:
    running, most, order, all_are_there = 0, 0, [], asyncio.Event()

    async def work(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        while True:
            _, body = await read_message(reader)
            running += 1
            most = max(most, running)
            order.append(msgspec.json.decode(body)["number"])
            await all_are_there.wait()
            await asyncio.sleep(0.002)
            running -= 1
            writer.write(response(b"done"))

    async with serving(work) as endpoint, gateway(entry("m", [endpoint]), rules=rules(max_ongoing=3)) as world:
        clients = [await world.connect() for _ in range(40)]
        for number, client in enumerate(clients):
            client.send(chat(number=number))
            while world.room.ongoing + world.room.waiting <= number:
                await asyncio.sleep(0)
        all_are_there.set()
        assert [(await client.answer()).body for client in clients] == [b"done"] * 40
        assert most == 3
        assert order == sorted(order)
        await world.until_idle()
        assert (await world.ask(chat(number=40, headers={"X-ModelPool-Max-Wait": "0"}))).status == 200


@on_uvloop
async def test_when_too_many_are_ongoing_one_that_will_not_wait_is_told_so() -> None:
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone(reader)

    async with serving(never) as endpoint, gateway(entry("m", [endpoint]), rules=rules(max_ongoing=1)) as world:
        busy = await world.connect()
        busy.send(chat())
        while not world.room.ongoing:
            await asyncio.sleep(0.001)
        answer = await world.ask(chat(headers={"X-ModelPool-Max-Wait": "0"}))
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "too_many_ongoing", "1")
        busy.abort()
        await world.until_idle()


@on_uvloop
async def test_a_request_outlives_the_death_of_the_only_instance() -> None:
    """Nobody listens any more; the manager says so, and then that it is back: the client sees a pause."""
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [await nobody()]), rules=rules()) as world:
        times, client = Times(world), await world.connect()
        client.send(chat())
        while not world.room._news:
            await asyncio.sleep(0.001)
        assert world.room.ongoing == 1
        times.say(away())
        await until_waiting(world)
        assert world.room.ongoing == 0
        times.say(entry("m", [endpoint]))
        assert (await client.answer()).status == 200
        assert upstream.count == 1
        await world.until_idle()


@on_uvloop
async def test_an_instance_that_is_back_before_the_manager_noticed_is_tried_again() -> None:
    endpoint = await nobody()
    async with gateway(entry("m", [endpoint]), rules=rules()) as world:
        client = await world.connect()
        client.send(chat())
        while not world.room._news:
            await asyncio.sleep(0.001)
        async with serving(Upstream(), port=endpoint.port):
            assert (await client.answer()).status == 200
        await world.until_idle()


@pytest.mark.parametrize("query", ["", "?model=m"])
@on_uvloop
async def test_a_websocket_that_no_instance_takes_tries_again_until_one_does(query: str) -> None:
    """One drains and the other is full; then both are away, and one is back."""
    draining = Upstream(response(b"", status="503 Service Unavailable"))
    async with serving(draining) as drains, fakes(1) as (takes,), AsyncExitStack() as stack:
        world = await stack.enter_async_context(gateway(entry("m", [drains, takes], capacity=1), rules=rules()))
        times, first = Times(world), await stack.enter_async_context(talking(world, "?model=m"))
        second, third = [asyncio.ensure_future(session(world, query)) for _ in range(2)]
        while len(world.room._news) != 2:
            await asyncio.sleep(0.001)
        await first.close()
        done, (left,) = await asyncio.wait([second, third], return_when=asyncio.FIRST_COMPLETED)
        async with done.pop().result():
            times.say(away())
            await until_waiting(world)
        times.say(entry("m", [takes], capacity=1))
        async with await left as last:
            assert await transcribed(last, b"x") == "You sent 1 bytes of sound."
        await world.until_idle()


async def session(world: World, query: str) -> ClientConnection:
    """A client that has been taken to an instance: it heard its first answer."""
    client = await talking(world, query)
    assert (await hear(client))["type"] == "session.created"
    await say(client, **UPDATE)
    await say(client, type="what")
    assert (await hear(client))["code"] == "unknown_event"
    return client


@on_uvloop
async def test_nothing_is_left_after_a_storm_of_clients_models_and_deaths() -> None:
    chance, statuses = random.Random(5), dict[int, int]()

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)

    async with AsyncExitStack() as stack:
        good: list[Endpoint] = [await stack.enter_async_context(serving(Upstream(CHUNKED))) for _ in range(2)]
        bad = await stack.enter_async_context(serving(die))
        few = rules(max_ongoing=4, max_wait_s=0.3, bounds=Bounds(tickets=20, bytes=4000))
        world = await stack.enter_async_context(gateway(away("a"), away("b"), rules=few))
        times = Times(world)

        async def one() -> None:
            client = await world.connect()
            headers = chance.choice([{}, {"X-ModelPool-Max-Wait": "0.05"}, {"X-ModelPool-No-Cold-Start": "1"}])
            client.send(chat(chance.choice("ab"), stream=chance.random() < 0.5, headers=headers))
            if chance.random() < 0.4:
                await asyncio.sleep(chance.random() * 0.1)
            else:
                line = await client.reader.readline()
                status = int(line.split()[1])
                statuses[status] = statuses.get(status, 0) + 1
            client.abort()

        async def manage() -> None:
            choices = [away, away, lambda alias: away(alias, coming=False)]
            choices += [lambda alias: entry(alias, good), lambda alias: entry(alias, [bad, good[0]])] * 2
            while True:
                times.say(chance.choice(choices)("a"), chance.choice(choices)("b"))
                await asyncio.sleep(chance.random() * 0.05)

        managing = asyncio.ensure_future(manage())
        for _ in range(20):
            await asyncio.gather(*(one() for _ in range(30)))
        managing.cancel()
        await world.until_idle()
        assert set(statuses) <= {200, 429, 502, 503}
        assert statuses[200] > 20
        times.say(entry("a", good), entry("b", good))
        assert (await world.ask(chat("a"))).status == (await world.ask(chat("b"))).status == 200
