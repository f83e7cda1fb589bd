"""Managed API keys at the gateway: who is let in, to which models, and how soon a revoked key is not."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from modelpool.home import Home
from modelpool.messages.routing import KeysDelta
from tests.contract.test_gateway_control import Manager
from tests.contract.test_gateway_process import Gateway, started
from tests.contract.test_gateway_responses import fakes
from tests.gateway_world import ADMIN_KEY, Answer, World, chat, entry, gateway, key, keys_of, request, snapshot_of
from tests.wire import chunk, on_uvloop, read_message, response, serving


class Engine:
    """Answers `done`, and knows what reached it."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _ = await read_message(reader)
            self.heads.append(head)
            writer.write(response(b"done"))


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def asked(world: World, secret: str, model: str = "m") -> Answer:
    return await world.ask(chat(model, headers=bearer(secret)))


@on_uvloop
async def test_no_request_without_a_valid_key_reaches_an_engine_and_no_secret_does() -> None:
    engine = Engine()
    async with serving(engine) as endpoint:
        async with gateway(entry("m", [endpoint]), keys=[key("mp-a", id="key-a")]) as world:
            for headers in ({}, bearer("mp-b"), bearer(""), {"x-api-key": "mp-b"}, {"Authorization": "mp-a"}):
                answer = await world.ask(chat(headers=headers))
                assert (answer.status, answer.code) == (401, "invalid_api_key")
            assert engine.heads == []
            assert (await asked(world, "mp-a")).body == b"done"
            assert (await world.ask(chat(headers={"x-api-key": "mp-a"}))).body == b"done"
            assert len(engine.heads) == 2
            assert not any(b"mp-a" in head for head in engine.heads)
            assert (await world.ask(request("GET", "/admin/keys", headers=bearer("mp-a")))).status == 403


@on_uvloop
async def test_a_key_sees_and_uses_its_models_only_and_learns_of_no_other() -> None:
    engine = Engine()
    async with serving(engine) as endpoint:
        models = [entry(alias, [endpoint]) for alias in ("m", "org/n", "secret")]
        async with gateway(*models, keys=[key("mp-a", models=("m", "org/n", "later"))]) as world:
            listed = await world.ask(request("GET", "/v1/models", headers=bearer("mp-a")))
            assert [each["id"] for each in listed.json["data"]] == ["m", "org/n"]
            assert (await asked(world, "mp-a", "org/n")).body == b"done"
            assert (await asked(world, "mp-a", "later")).code == "model_not_found"
            answers = []
            for alias in ("secret", "absent"):
                shown = await world.ask(request("GET", f"/v1/models/{alias}", headers=bearer("mp-a")))
                for answer in (shown, await asked(world, "mp-a", alias)):
                    assert (answer.status, answer.code) == (403, "model_not_allowed")
                    answers.append(answer.message.replace(alias, "…"))
            assert len(set(answers)) == 1
            assert len(engine.heads) == 1
            everything = await world.ask(request("GET", "/v1/models", headers=bearer(ADMIN_KEY)))
            assert len(everything.json["data"]) == 3


@on_uvloop
async def test_a_key_reaches_no_response_of_a_model_it_may_not_use() -> None:
    async with fakes(1) as endpoints:
        keys = [key("mp-a", id="key-a"), key("mp-b", id="key-b", models=("other",))]
        async with gateway(entry("m", endpoints), entry("other", []), keys=keys) as world:

            def responses(method: str, secret: str, path: str = "", **body: object) -> bytes:
                fields = {"Content-Type": "application/json", **bearer(secret)}
                return request(method, f"/v1/responses{path}", msgspec.json.encode(body) if body else b"", fields)

            made = (await world.ask(responses("POST", "mp-a", model="m", input="x"))).json["id"]
            assert (await world.ask(responses("GET", "mp-a", f"/{made}"))).status == 200
            assert (await world.ask(responses("GET", "mp-b", f"/{made}"))).status == 404
            for body in ({"model": "m"}, {"model": "m", "previous_response_id": made}):
                refused = await world.ask(responses("POST", "mp-b", input="x", **body))
                assert (refused.status, refused.code) == (403, "model_not_allowed")


@on_uvloop
async def test_a_revoked_key_is_refused_on_open_connections_and_after_its_head_but_its_stream_goes_on() -> None:
    go_on = asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"begin "))
            await go_on.wait()
            writer.write(chunk(b"end") + b"0\r\n\r\n")

    async with serving(engine) as endpoint:
        async with gateway(entry("m", [endpoint]), keys=[key("mp-a", id="key-a")]) as world:
            streaming, slow, idle = [await world.connect() for _ in range(3)]
            streaming.send(chat(headers=bearer("mp-a")))
            await streaming.reader.readuntil(b"begin")
            raw = chat(headers=bearer("mp-a"))
            slow.send(raw[:-5])
            assert (await idle.ask(request("GET", "/v1/models", headers=bearer("mp-a")))).status == 200
            world.keys.apply(KeysDelta(epoch="e1", sequence=2, revoked=("key-a",)))
            slow.send(raw[-5:])
            assert (await slow.answer()).status == 401
            assert (await idle.ask(chat(headers=bearer("mp-a")))).status == 401
            go_on.set()
            assert (await streaming.reader.readuntil(b"0\r\n\r\n")).endswith(b"end\r\n0\r\n\r\n")
            assert (await streaming.ask(chat(headers=bearer("mp-a")))).status == 401


@on_uvloop
async def test_the_first_key_closes_a_pool_that_was_open_and_revoking_the_last_does_not_open_it(
    tmp_path: Path,
) -> None:
    engine = Engine()
    manager = Manager(tmp_path)
    async with serving(engine) as endpoint, serving(manager, path=manager.path):
        manager.first = snapshot_of(entry("m", [endpoint]))
        async with gateway(home=tmp_path, follow=True) as world:
            while (await world.ask(chat())).status != 200:
                await asyncio.sleep(0.005)
            manager.say(KeysDelta(epoch="e1", sequence=2, made=(key("mp-a", id="key-a"),)))
            while (await world.ask(chat())).status != 401:
                await asyncio.sleep(0.005)
            assert (await asked(world, "mp-a")).body == b"done"
            assert (await world.ask(request("GET", "/admin/status"))).status == 401
            manager.say(KeysDelta(epoch="e1", sequence=3, revoked=("key-a",)))
            while (await asked(world, "mp-a")).status != 401:
                await asyncio.sleep(0.005)
            assert (await world.ask(chat())).status == 401
            manager.keys = keys_of(key("mp-b", id="key-b"), sequence=9)
            manager.say(KeysDelta(epoch="e1", sequence=8))  # a gap: it asks for everything
            while (await asked(world, "mp-b")).status != 200:
                await asyncio.sleep(0.005)


@pytest.mark.parametrize("required", ["", "true"])
@on_uvloop
async def test_a_gateway_whose_manager_died_keeps_the_keys_it_knew_and_a_new_one_lets_nobody_in(
    tmp_path: Path, required: str
) -> None:
    engine = Engine()
    home = Home(tmp_path)
    manager = Manager(tmp_path)
    environ = {"MODELPOOL_REQUIRE_KEY": required}
    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(serving(engine))
        manager.first = snapshot_of(entry("m", [endpoint]))
        manager.keys = keys_of(key("mp-a", id="key-a"), key("mp-b", id="key-b"))
        async with serving(manager, path=home.control_socket):
            running = await stack.enter_async_context(started(tmp_path, **environ))
            while (await ask(running, "mp-a")).status != 200:
                await asyncio.sleep(0.01)
            manager.say(KeysDelta(epoch="e1", sequence=2, revoked=("key-a",)))
            async with asyncio.timeout(1):
                while (await ask(running, "mp-a")).status != 401:
                    await asyncio.sleep(0.01)
        assert [(await ask(running, f"mp-{name}")).status for name in "abc"] == [401, 200, 401]
        fresh = await stack.enter_async_context(started(tmp_path, **environ))
        assert (await ask(fresh, "mp-b")).code == "manager_away"
        assert (await (await fresh.connect()).ask(chat())).status == (401 if required else 503)


async def ask(running: Gateway, secret: str) -> Answer:
    """On a connection of its own: a refused request with a body ends it."""
    client = await running.connect()
    try:
        return await client.ask(chat(headers=bearer(secret)))
    finally:
        client.close()
