"""Responses that instances keep: what is asked about one goes to the instance that made it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote

import msgspec
import openai
import pytest

from modelpool.engines.fake.engine import FakeEngine
from modelpool.engines.server import Server
from modelpool.gateway.hold import Rules
from modelpool.messages.models import ModelSpec
from modelpool.messages.routing import Delta, ModelEntry, Unavailable
from modelpool.relay import Endpoint
from modelpool.tcp import bind_tcp
from tests.contract.test_gateway_passing import EVENT_STREAM, Upstream, nobody
from tests.gateway_world import Answer, World, entry, gateway, request, snapshot_of
from tests.wire import chunk, gone, on_uvloop, read_message, response, serving

MISSING = b'{"error": {"message": "not here", "type": "x", "param": "response_id", "code": 404}}'


@asynccontextmanager
async def fakes(count: int, **settings: Any) -> AsyncIterator[list[Endpoint]]:
    """Fake engines of the model `m`, each with its own memory."""
    endpoints, servers = [], []
    async with asyncio.TaskGroup() as tasks:
        for _ in range(count):
            sock = bind_tcp("127.0.0.1", 0, flag="", variable="")
            server = Server(await FakeEngine(ModelSpec(alias="m", fake=True, **settings)).start())
            tasks.create_task(server.serve_on(sock))
            endpoints.append(Endpoint(*sock.getsockname()[:2]))
            servers.append(server)
        try:
            yield endpoints
        finally:
            for server in servers:
                server.stop.set()


def create(**fields: Any) -> bytes:
    body = msgspec.json.encode({"model": "m", "input": "hello", **fields})
    return request("POST", "/v1/responses", body, {"Content-Type": "application/json"})


async def made(world: World, count: int, **fields: Any) -> list[str]:
    return [(await world.ask(create(**fields))).json["id"] for _ in range(count)]


def last_event(answer: Answer) -> Any:
    return msgspec.json.decode(answer.body.split(b"data: ")[-1])


@on_uvloop
async def test_every_question_about_a_response_reaches_the_instance_that_made_it() -> None:
    async with fakes(3) as endpoints, gateway(entry("m", endpoints)) as world:
        ids = await made(world, 6)
        ids += [last_event(await world.ask(create(stream=True)))["response"]["id"] for _ in range(6)]
        for response_id in ids * 2:
            for prefix in ("/v1", ""):
                answer = await world.ask(request("GET", f"{prefix}/responses/{response_id}"))
                assert (answer.status, answer.json["id"]) == (200, response_id)
            follow = await world.ask(create(previous_response_id=response_id))
            assert follow.status == 200
            assert follow.json["usage"]["input_tokens"] > 4
            cancel = await world.ask(request("POST", f"/v1/responses/{response_id}/cancel"))
            assert (cancel.status, cancel.json["error"]["param"]) == (400, "response_id")  # the engine's own
        assert world.instances.inflight == 0


@on_uvloop
async def test_another_gateway_finds_what_the_first_one_made() -> None:
    async with fakes(3) as endpoints, AsyncExitStack() as stack:
        # A second model whose instances do not know the routes at all, and one that nobody serves.
        mute = await stack.enter_async_context(serving(Upstream(response(b"{}", status="501 Not Implemented"))))
        entries = (entry("other", [mute]), entry("m", endpoints), entry("starting", []))
        first = await stack.enter_async_context(gateway(*entries))
        second = await stack.enter_async_context(gateway(*entries))
        for response_id in await made(first, 4):
            assert (await second.ask(request("GET", f"/v1/responses/{response_id}"))).json["id"] == response_id
        for response_id in await made(first, 4):
            assert (await second.ask(create(previous_response_id=response_id))).status == 200


@on_uvloop
async def test_what_is_forgotten_is_found_again() -> None:
    async with fakes(3) as endpoints, gateway(entry("m", endpoints), remembered=2) as world:
        for response_id in await made(world, 8):
            assert (await world.ask(create(previous_response_id=response_id))).status == 200


@on_uvloop
async def test_when_its_instance_is_gone_a_response_is_not_found_and_the_answer_says_why() -> None:
    async with fakes(2) as endpoints, gateway(entry("m", endpoints)) as world:
        ids = await made(world, 2)
        world.table.apply(Delta(epoch="e1", sequence=2, changed={"m": entry("m", endpoints[:1])}))
        statuses = []
        for response_id in ids:
            for raw, param in [
                (request("GET", f"/v1/responses/{response_id}"), "response_id"),
                (create(previous_response_id=response_id), "previous_response_id"),
            ]:
                answer = await world.ask(raw)
                statuses.append(answer.status)
                if answer.status != 200:
                    assert (answer.code, answer.json["error"]["param"]) == ("response_not_found", param)
                    assert "m-r2, which is gone" in answer.message
        assert sorted(statuses) == [200, 200, 404, 404]


@pytest.mark.parametrize("remembered", [0, 100])
@on_uvloop
async def test_what_goes_on_from_a_response_of_a_model_that_sleeps_waits_for_it(remembered: int) -> None:
    asleep = ModelEntry(
        alias="m",
        created=1,
        unavailable=Unavailable(code="model_not_ready", message="`m` sleeps.", retry_after=7.0, on_its_way=True),
    )
    rules = Rules(max_ongoing=10, max_wait_s=20.0)
    async with fakes(2) as endpoints, gateway(entry("m", endpoints), remembered=remembered, rules=rules) as world:
        ids = await made(world, 2)
        world.table.apply(snapshot_of(asleep, sequence=2))
        clients = [await world.connect() for _ in ids]
        for client, response_id in zip(clients, ids, strict=True):
            client.send(create(previous_response_id=response_id))
        while world.room.waiting_for("m") != 2:
            await asyncio.sleep(0.001)
        assert world.room.wanted.is_set()  # so that its wake is ordered
        refused = await world.ask(create(previous_response_id=ids[0], model="n"))
        assert (refused.status, refused.code) == (404, "model_not_found")
        world.table.apply(snapshot_of(entry("m", endpoints), sequence=3))
        for client in clients:
            answer = await client.answer()
            assert answer.status == 200
            assert answer.json["usage"]["input_tokens"] > 4
        await world.until_idle()


@on_uvloop
async def test_an_id_that_nobody_knows_is_not_found() -> None:
    async with fakes(2) as endpoints, gateway(entry("m", endpoints)) as world:
        answer = await world.ask(create(previous_response_id="x" * 256))
        assert (answer.status, answer.code) == (404, "response_not_found")
        assert "not stored, or the one that made it is gone" in answer.message
        assert len(answer.message) < 300


@pytest.mark.parametrize("response_id", ["", "../../v1/models", "a b\r\nX: y", "ü", "x" * 257])
@on_uvloop
async def test_what_cannot_be_an_id_is_not_asked_of_any_engine(response_id: str) -> None:
    async with gateway(entry("m", [await nobody()])) as world:
        answer = await world.ask(create(previous_response_id=response_id))
        assert (answer.status, answer.json["error"]["param"]) == (400, "previous_response_id")
        assert len(answer.message) < 300
        in_path = await world.ask(request("GET", f"/v1/responses/{quote(response_id, safe='')}"))
        assert (in_path.status, in_path.code) == (404, "route_not_found")


@on_uvloop
async def test_what_was_not_to_be_stored_is_not_remembered() -> None:
    upstream = Upstream(response(b'{"id": "resp_1"}'))
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        await world.ask(create(store=False))
        assert len(world.stored) == 0
        await world.ask(create())
        assert len(world.stored) == 1
        upstream.answer = response(b'{"id": "resp_2"}', status="400 Bad Request")
        await world.ask(create())
        assert len(world.stored) == 1


@on_uvloop
async def test_the_id_is_learned_however_the_answer_is_cut() -> None:
    raw = (
        EVENT_STREAM + chunk(b'event: response.created\ndata: {"response":{"id":"resp_x","object"') + chunk(b":1}}\n\n")
    )

    async def crumbs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        for byte in raw:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        await gone(reader)

    async with serving(crumbs) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(create(stream=True))
        await client.reader.readuntil(b":1}}")
        assert world.stored.route("resp_x") is not None
        client.abort()
        await world.until_idle()


@on_uvloop
async def test_an_instance_that_does_not_say_makes_it_a_503() -> None:
    missing = Upstream(response(MISSING, status="404 Not Found"))
    async with serving(missing) as one, gateway(entry("m", [one, await nobody()])) as world:
        answer = await world.ask(request("GET", "/v1/responses/resp_0"))
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "model_not_ready", "1")
        assert "m-r2 does not say" in answer.message
        world.table.apply(snapshot_of(entry("m", [one]), sequence=2))
        for _ in range(3):
            answer = await world.ask(request("GET", "/v1/responses/resp_0"))
            assert (answer.status, answer.code) == (404, "response_not_found")


@on_uvloop
async def test_wrong_types_and_methods_are_named() -> None:
    async with gateway(entry("m", [])) as world:
        for fields, param in [({"previous_response_id": 3}, "previous_response_id"), ({"model": 3}, "model")]:
            answer = await world.ask(create(**fields))
            assert (answer.status, answer.json["error"]["param"]) == (400, param)
        answer = await world.ask(request("DELETE", "/v1/responses/resp_0"))
        assert (answer.status, answer.headers["allow"]) == (405, "GET")
        answer = await world.ask(request("GET", "/responses/resp_0/cancel"))
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert (await world.ask(create(previous_response_id="resp_0"))).code == "model_not_ready"


@on_uvloop
async def test_the_openai_sdk_makes_a_response_in_the_background_and_cancels_it() -> None:
    async with fakes(2, fake_token_ms=10_000) as endpoints, gateway(entry("m", endpoints)) as world:
        async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
            queued = await client.responses.create(model="m", input="hello", background=True)
            assert queued.status == "queued"
            assert (await client.responses.retrieve(queued.id)).status == "queued"
            assert (await client.responses.cancel(queued.id)).status == "cancelled"
            with pytest.raises(openai.NotFoundError) as missing:
                await client.responses.retrieve("resp_0")
            assert missing.value.code == "response_not_found"
