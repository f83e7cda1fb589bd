"""`/v1/realtime` through the gateway: found by its first events, passed frame for frame, ended by either side."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import openai
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.typing import Subprotocol
from websockets.utils import accept_key

from tests.contract.test_gateway_passing import Upstream, nobody
from tests.contract.test_gateway_responses import fakes
from tests.gateway_world import API_KEY, TOKEN, Client, World, entry, gateway, key, request
from tests.wire import Handler, gone, on_uvloop, read_message, response, serving

UPDATE = {"type": "session.update", "model": "m"}
HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


def talking(world: World, query: str = "", **options: Any) -> connect:
    return connect(f"ws://{world.endpoint}/v1/realtime{query}", proxy=None, **options)


async def say(client: ClientConnection, **event: Any) -> None:
    await client.send(json.dumps(event))


async def hear(client: ClientConnection) -> Any:
    return json.loads(await client.recv())


async def transcribed(client: ClientConnection, sound: bytes) -> str:
    await say(client, type="input_audio_buffer.commit")
    await say(client, type="input_audio_buffer.append", audio=base64.b64encode(sound).decode())
    await say(client, type="input_audio_buffer.commit", final=True)
    text = ""
    while (event := await hear(client))["type"] == "transcription.delta":
        text += event["delta"]
    assert event["type"] == "transcription.done"
    assert event["text"] == text
    return text


def text_frame(event: Any, *, mask: bool = True) -> bytes:
    return Frame(Opcode.TEXT, json.dumps(event).encode()).serialize(mask=mask)


class Peer:
    """An upstream of one WebSocket in raw bytes: `handle` begins when the handshake is done."""

    def __init__(self, handle: Handler, *, says: bytes = text_frame({"type": "session.created"}, mask=False)) -> None:
        self._handle = handle
        self._says = says
        self.heads: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, _ = await read_message(reader)
        self.heads.append(head)
        key = next(line for line in head.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key: "))[19:].decode()
        answer = (
            f"HTTP/1.1 101 x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept_key(key)}"
        )
        writer.write(answer.encode() + b"\r\n\r\n" + self._says)
        await self._handle(reader, writer)


@asynccontextmanager
async def raw(world: World, query: str = "", *, behind: bytes = b"", prefix: str = "") -> AsyncIterator[Client]:
    """A raw client after its handshake, with `behind` in the same segment."""
    client = await world.connect()
    client.send(request("GET", f"{prefix}/v1/realtime{query}", headers=HANDSHAKE) + behind)
    assert (await client.answer()).status == 101
    try:
        yield client
    finally:
        client.abort()


@pytest.mark.parametrize("query", ["", "?model=m"])
@on_uvloop
async def test_a_session_is_vllms(query: str) -> None:
    async with fakes(2) as endpoints, gateway(entry("m", endpoints)) as world:
        async with talking(world, query) as client:
            created = await hear(client)
            assert (created["type"], created["id"][:5]) == ("session.created", "sess-")
            assert isinstance(created["created"], int)
            await say(client, **UPDATE)
            for size in (3, 200_000):
                assert await transcribed(client, os.urandom(size)) == f"You sent {size} bytes of sound."
            await say(client, type="what")
            assert (await hear(client))["code"] == "unknown_event"
            assert world.instances.inflight == 1
        await world.until_idle()
        assert client.close_code == 1000


@on_uvloop
async def test_sessions_are_spread_and_other_requests_go_on_beside_them() -> None:
    async with fakes(2) as endpoints, gateway(entry("m", endpoints)) as world, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(talking(world)) for _ in range(20)]
        for client in clients:
            assert (await hear(client))["type"] == "session.created"
            await say(client, **UPDATE)
        texts = await asyncio.gather(*(transcribed(client, b"x" * n) for n, client in enumerate(clients)))
        assert texts == [f"You sent {n} bytes of sound." for n in range(20)]
        assert [each.own for each in world.table.model("m").instances] == [10, 10]
        assert (await world.ask(request("GET", "/health"))).status == 200


@on_uvloop
async def test_what_was_sent_before_the_model_was_named_is_given_to_the_instance() -> None:
    async with fakes(1) as endpoints, gateway(entry("m", endpoints)) as world, talking(world) as client:
        sound = base64.b64encode(b"x" * 1000).decode()
        await say(client, type="input_audio_buffer.append", audio=sound)
        await (await client.ping())
        await client.send([json.dumps(UPDATE)[:9], json.dumps(UPDATE)[9:]])  # in two frames
        assert (await hear(client))["type"] == "session.created"
        assert await transcribed(client, b"x") == "You sent 1001 bytes of sound."


@on_uvloop
async def test_frames_pass_as_they_are_however_they_are_cut() -> None:
    sent = text_frame(UPDATE) + text_frame({"x": "y" * 70_000}) + Frame(Opcode.PING, b"p").serialize(mask=True)
    back = Frame(Opcode.BINARY, os.urandom(300)).serialize(mask=False)
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.set_result(await reader.readexactly(len(sent)))
        for byte in back:
            writer.write(bytes([byte]))
            await writer.drain()
        await gone(reader)

    async with serving(Peer(handle)) as endpoint, gateway(entry("m", [endpoint])) as world:
        async with raw(world, behind=sent[:10]) as client:
            for at in range(10, len(sent), 997):
                client.send(sent[at : at + 997])
                await asyncio.sleep(0)
            assert await got == sent
            first = await client.reader.readexactly(2)
            assert b"session.created" in await client.reader.readexactly(first[1])
            assert await client.reader.readexactly(len(back)) == back
        await world.until_idle()


@pytest.mark.parametrize(
    "says", [b"", text_frame({"type": "other"}, mask=False), b"\xff" * 40, b"\x81\x7f" + b"\0" * 8]
)
@on_uvloop
async def test_only_a_second_greeting_is_left_out(says: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(text_frame({"type": "session.created", "n": 2}, mask=False))
        await gone(reader)

    async with serving(Peer(handle, says=says)) as endpoint, gateway(entry("m", [endpoint])) as world:
        async with raw(world, "?model=m") as client:
            client.send(text_frame(UPDATE))
            assert (await client.reader.readuntil(b'"n": 2}')).startswith(says)
        async with raw(world) as client:
            client.send(text_frame(UPDATE))
            await client.reader.readuntil(b"}")
            if says:
                assert await client.reader.readexactly(len(says)) == says


@on_uvloop
async def test_the_instance_gets_our_token_and_nothing_of_the_clients_handshake() -> None:
    async def handle(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await gone(reader)

    peer = Peer(handle)
    async with serving(peer) as endpoint, gateway(entry("m", [endpoint], prefix="/proxy/m"), api_key=API_KEY) as world:
        protocols = ["realtime", f"openai-insecure-api-key.{API_KEY}"]
        headers = {"X-Mine": "1", "Origin": "https://page.example"}
        async with talking(
            world,
            "?model=m&a=b",
            subprotocols=[Subprotocol(each) for each in protocols],
            additional_headers=headers,
            close_timeout=0.1,
        ) as client:
            assert client.subprotocol == "realtime"
        head = peer.heads[0].decode().lower()
        assert head.startswith("get /proxy/m/v1/realtime?model=m&a=b http/1.1\r\n")
        assert f"\r\nauthorization: bearer {TOKEN}\r\n" in head
        assert "\r\nx-mine: 1\r\n" in head
        for absent in (API_KEY, "sec-websocket-protocol", "sec-websocket-extensions", "origin"):
            assert absent not in head


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({}, 401),
        ({"subprotocols": ["realtime", "openai-insecure-api-key.wrong"]}, 401),
        ({"additional_headers": {"Authorization": "Bearer wrong"}}, 401),
        ({"additional_headers": {"Authorization": f"Bearer {API_KEY}"}}, 101),
        ({"subprotocols": ["realtime", f"openai-insecure-api-key.{API_KEY}", "openai-beta.realtime-v1"]}, 101),
    ],
)
@on_uvloop
async def test_keys_are_asked_for(options: Any, status: int) -> None:
    async with fakes(1) as endpoints, gateway(entry("m", endpoints), api_key=API_KEY) as world:
        try:
            async with talking(world, **options) as client:
                assert (await hear(client))["type"] == "session.created"
                got = 101
        except InvalidStatus as refused:
            got = refused.response.status_code
        assert got == status


@on_uvloop
async def test_a_key_opens_the_models_it_is_for() -> None:
    secret = "mp-" + "k" * 40
    async with fakes(1) as endpoints:
        async with gateway(entry("m", endpoints), entry("n", endpoints), keys=[key(secret, models=("m",))]) as world:
            headers = {"Authorization": f"Bearer {secret}", "X-Request-Id": "mine"}
            async with talking(world, "?model=m", additional_headers=headers) as client:
                assert (await hear(client))["type"] == "session.created"
                assert client.response is not None
                assert client.response.headers["X-Request-Id"] == "mine"
            with pytest.raises(InvalidStatus) as refused:
                await talking(world, "?model=n", additional_headers=headers)
            assert refused.value.response.status_code == 403
            async with talking(world, additional_headers=headers) as client:
                await hear(client)
                await say(client, type="session.update", model="n")
                assert (await hear(client))["code"] == "model_not_allowed"


@on_uvloop
async def test_what_cannot_be_routed_is_said_in_the_way_that_is_left() -> None:
    mute = Upstream(response(b"", status="403 Forbidden"))
    async with serving(mute) as endpoint, gateway(entry("mute", [endpoint]), entry("starting", [])) as world:
        for model, status, close_code, code in [
            ("nobody", 404, 1008, "model_not_found"),
            ("starting", 503, 1013, "model_not_ready"),
            ("mute", 404, 1008, "route_not_found"),
        ]:
            with pytest.raises(InvalidStatus) as refused:
                await talking(world, f"?model={model}")
            assert refused.value.response.status_code == status
            assert json.loads(refused.value.response.body)["error"]["code"] == code
            async with talking(world) as client:
                await hear(client)
                await say(client, type="session.update", model=model)
                error = await hear(client)
                assert (error["type"], error["code"]) == ("error", code)
                with pytest.raises(ConnectionClosed):
                    await client.recv()
                assert (client.close_code, client.close_reason) == (close_code, code)
        assert world.instances.inflight == 0


@pytest.mark.parametrize(
    ("sent", "close_code"),
    [
        (text_frame({"type": "session.update"}), 1008),
        (text_frame({"type": "session.update", "model": 3}), 1008),
        (text_frame([1]), 1008),
        (Frame(Opcode.TEXT, b"no json").serialize(mask=True), 1008),
        (Frame(Opcode.TEXT, b"\xff").serialize(mask=True), 1008),
        (text_frame({"type": "append", "audio": "x" * 70_000}) * 20, 1008),
        (text_frame(UPDATE, mask=False), 1002),
        (b"\xf1" + text_frame(UPDATE)[1:], 1002),
        (b"\x83" + text_frame(UPDATE)[1:], 1002),
        (b"\x81\xff" + (1 << 40).to_bytes(8, "big") + b"1234", 1009),
        (Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True), 1000),
    ],
    ids=[
        "no model",
        "model is no text",
        "no object",
        "no JSON",
        "no UTF-8",
        "too long",
        "not masked",
        "reserved bits",
        "unknown opcode",
        "too large",
        "closed",
    ],
)
@on_uvloop
async def test_first_frames_that_name_no_model_end_it(sent: bytes, close_code: int) -> None:
    async with gateway(entry("m", [])) as world, raw(world) as client:
        client.send(sent)
        said = await client.reader.read()
        assert b"\x88" in said
        at = said.rindex(b"\x88")
        assert int.from_bytes(said[at + 2 : at + 4], "big") == close_code
        client.close()


@on_uvloop
async def test_who_says_nothing_is_let_go() -> None:
    async with gateway(entry("m", []), first_events_s=0.05) as world, talking(world) as client:
        assert (await hear(client))["type"] == "session.created"
        assert (await hear(client))["code"] == "request_timeout"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 426, "upgrade_required"),
        ({**HANDSHAKE, "Sec-WebSocket-Version": "12"}, 400, "invalid_http"),
        ({**HANDSHAKE, "Sec-WebSocket-Key": "short"}, 400, "invalid_http"),
        ({**HANDSHAKE, "Upgrade": "h2c"}, 400, "invalid_http"),
    ],
)
@on_uvloop
async def test_what_is_no_handshake_is_refused(headers: dict[str, str], status: int, code: str) -> None:
    async with gateway(entry("m", [])) as world:
        client = await world.connect()
        answer = await client.ask(request("GET", "/v1/realtime", headers=headers))
        assert (answer.status, answer.code) == (status, code)
        if status == 426:
            assert answer.headers["upgrade"] == "websocket"
            assert (await client.ask(request("GET", "/health"))).status == 200
        else:
            assert await client.at_end()


@pytest.mark.parametrize("named", [True, False])
@on_uvloop
async def test_a_client_that_leaves_is_gone_for_the_instance_at_once(named: bool) -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        await gone(reader)
        left.set()

    async with serving(Peer(handle)) as endpoint, gateway(entry("m", [endpoint])) as world:
        async with raw(world) as client:
            if named:
                client.send(text_frame(UPDATE))
                await asked.wait()
            client.abort()
        await world.until_idle()
        while world.listener.connections:
            await asyncio.sleep(0.001)
        if named:
            async with asyncio.timeout(1):
                await left.wait()


@on_uvloop
async def test_an_instance_that_dies_takes_the_connection_with_it() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(10)
        writer.transport.abort()

    async with serving(Peer(handle)) as endpoint, gateway(entry("m", [endpoint])) as world, raw(world) as client:
        client.send(text_frame(UPDATE))
        await client.reader.readuntil(b"}")
        assert await client.at_end()
        await world.until_idle()


@on_uvloop
async def test_instances_that_are_dead_or_drain_are_passed_over() -> None:
    drains = Upstream(response(b"", status="503 Service Unavailable"))
    async with fakes(1) as endpoints, serving(drains) as draining:
        async with gateway(entry("m", [await nobody(), draining, *endpoints])) as world:
            for _ in range(3):
                async with talking(world) as client:
                    await hear(client)
                    await say(client, **UPDATE)
                    assert await transcribed(client, b"x") == "You sent 1 bytes of sound."
            await world.until_idle()
        async with gateway(entry("m", [draining])) as world:
            with pytest.raises(InvalidStatus) as refused:
                await talking(world, "?model=m")
            assert refused.value.response.status_code == 503


async def _flood(writer: asyncio.StreamWriter, frame: bytes, count: int, sent: Callable[[], None]) -> None:
    for _ in range(count):
        writer.write(frame)
        await writer.drain()
        sent()


@pytest.mark.parametrize("downwards", [True, False])
@on_uvloop
async def test_who_reads_slowly_slows_the_other_side_down(downwards: bool) -> None:
    count, passed = 400, 0
    frame = Frame(Opcode.BINARY, os.urandom(100_000)).serialize(mask=not downwards)
    read_on = asyncio.Event()
    got: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def sent() -> None:
        nonlocal passed
        passed += 1

    async def swallow(reader: asyncio.StreamReader) -> None:
        await read_on.wait()
        for _ in range(count):
            assert await reader.readexactly(len(frame)) == frame
        got.set_result(None)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if downwards:
            await _flood(writer, frame, count, sent)
            await gone(reader)
        else:
            await swallow(reader)

    async with serving(Peer(handle, says=b"")) as endpoint, gateway(entry("m", [endpoint])) as world:
        async with raw(world, "?model=m") as client, asyncio.TaskGroup() as tasks:
            tasks.create_task(swallow(client.reader) if downwards else _flood(client.writer, frame, count, sent))
            before = -1
            while passed != before or not passed:
                before = passed
                await asyncio.sleep(0.2)
            assert passed < 200  # of 40 MB; the rest waits in the sender
            read_on.set()
            await got


@on_uvloop
async def test_the_openai_sdk_connects() -> None:
    async with fakes(1) as endpoints, gateway(entry("m", endpoints), api_key=API_KEY) as world:
        async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=API_KEY) as client:
            async with client.realtime.connect(model="m") as connection:
                assert (await connection.recv()).type == "session.created"
                assert world.instances.inflight == 1
            await world.until_idle()
