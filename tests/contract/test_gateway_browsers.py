"""Web pages as clients (CORS), and a proxy in front that says a prefix."""

from __future__ import annotations

import asyncio

import pytest

from modelpool.gateway.cors import Cors
from modelpool.settings import Settings, SettingsError, load
from tests.contract.test_gateway_passing import EVENT_STREAM, Upstream
from tests.contract.test_gateway_realtime import raw, text_frame
from tests.contract.test_gateway_responses import fakes
from tests.gateway_world import API_KEY, Answer, chat, entry, gateway, request
from tests.wire import chunk, on_uvloop, read_message, response, serving

PAGE = "https://page.example"
ASKS = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type",
}


def told(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-") or name == "vary"}


@on_uvloop
async def test_without_allowed_origins_a_browser_is_told_nothing_even_by_the_engine() -> None:
    heads = []

    async def lax(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers as vLLM does."""
        while True:
            head, _ = await read_message(reader)
            heads.append(head)
            lines = ("access-control-allow-origin: *",) if b"\r\norigin:" in head else ()
            writer.write(response(b"x", *lines))

    async with serving(lax) as endpoint, gateway(entry("m", [endpoint]), api_key=API_KEY) as world:
        headers = {"Origin": PAGE, "Authorization": f"Bearer {API_KEY}"}
        assert told(await world.ask(chat(headers=headers))) == {}
        assert len(heads) == 1
        assert (await world.ask(request("OPTIONS", "/v1/chat/completions", headers=ASKS))).status == 405


@pytest.mark.parametrize("allowed", [f"http://other.example,{PAGE}", "*"])
@on_uvloop
async def test_pages_of_allowed_origins_are_told_so_in_every_answer(allowed: str) -> None:
    one = "*" if allowed == "*" else PAGE
    expected = {"access-control-allow-origin": one, "access-control-expose-headers": "*"}
    if allowed != "*":
        expected["vary"] = "Origin"
    stream = EVENT_STREAM + chunk(b"data: 1\n\n") + b"0\r\n\r\n"
    async with serving(Upstream(stream)) as endpoint:
        async with gateway(entry("m", [endpoint]), api_key=API_KEY, cors=allowed) as world:
            client = await world.connect()
            asked = await client.ask(request("OPTIONS", "/v1/chat/completions", headers=ASKS))
            assert (asked.status, asked.body) == (200, b"")
            assert told(asked) == {
                **expected,
                "access-control-allow-methods": "GET, POST, PATCH, DELETE",
                "access-control-allow-headers": "authorization, content-type",
                "access-control-max-age": "600",
            }
            key = {"Authorization": f"Bearer {API_KEY}"}
            streamed = await client.ask(chat(headers={"Origin": PAGE, **key}))
            assert (streamed.body, told(streamed)) == (b"data: 1\n\n", expected)
            for raw_request, status in [
                (chat(headers={"Origin": PAGE}), 401),
                (chat("n", headers={"Origin": PAGE, **key}), 404),
                (request("GET", "/nothing", headers={"Origin": PAGE}), 404),
                (request("GET", "/v1/models", headers={"Origin": PAGE, **key}), 200),
                (chat(version="1.0", headers={"Origin": PAGE, **key}), 200),
            ]:
                answer = await world.ask(raw_request)
                assert (answer.status, told(answer)) == (status, expected)
            # Caches are told that it depends, whoever asks.
            plain = await world.ask(request("GET", "/v1/models", headers=key))
            assert told(plain) == ({"vary": "Origin"} if allowed != "*" else {})


@on_uvloop
async def test_pages_of_other_origins_are_told_nothing() -> None:
    async with gateway(entry("m", []), api_key=API_KEY, cors=PAGE) as world:
        for origin in ("https://evil.example", f"{PAGE}.evil.example", f"{PAGE}:8443", "null"):
            asked = await world.ask(request("OPTIONS", "/v1/models", headers={**ASKS, "Origin": origin}))
            assert (asked.status, asked.code) == (403, "forbidden")
            assert told(asked) == {"vary": "Origin"}


@on_uvloop
async def test_an_open_pool_serves_allowed_pages_models_but_not_its_administration() -> None:
    async with fakes(1) as endpoints, gateway(entry("m", endpoints), cors=PAGE) as world:
        assert (await world.ask(chat(headers={"Origin": PAGE}))).status == 200
        assert (await world.ask(chat(headers={"Origin": "https://evil.example"}))).status == 403
        assert (await world.ask(chat(headers={"Origin": PAGE, "Host": "evil.example"}))).status == 403
        assert (await world.ask(request("GET", "/admin/models", headers={"Origin": PAGE}))).status == 403


@pytest.mark.parametrize("wrong", ["page.example", "https://page.example/", "https://a b", "https://", "https://a,*,b"])
def test_what_is_no_origin_is_refused_by_name(wrong: str) -> None:
    with pytest.raises(SettingsError, match="MODELPOOL_CORS_ALLOWED_ORIGINS"):
        Cors.parse(wrong)


@on_uvloop
async def test_a_prefix_is_taken_off_where_it_stands() -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint]), root_path="/pool/a") as world:
        client = await world.connect()
        for prefix in ("/pool/a", ""):
            body = b'{"model": "m"}'
            assert (await client.ask(request("POST", f"{prefix}/v1/completions?x=1", body))).status == 200
            assert upstream.heads[-1].startswith(b"POST /v1/completions?x=1 HTTP/1.1")
            assert (await client.ask(request("GET", f"{prefix}/v1/models"))).json["data"][0]["id"] == "m"
            assert (await client.ask(request("GET", f"{prefix}/"))).json["name"] == "Model Pool"
        assert (await client.ask(request("GET", "/pool/a"))).json["name"] == "Model Pool"
        for path in ("/pool/ab/v1/models", "/pool/v1/models", "/pool/a/pool/a/v1/models"):
            assert (await client.ask(request("GET", path))).code == "route_not_found"


@on_uvloop
async def test_a_websocket_has_the_prefix_too() -> None:
    async with fakes(1) as endpoints, gateway(entry("m", endpoints), root_path="/pool") as world:
        async with raw(world, prefix="/pool") as client:
            client.send(text_frame({"type": "session.update", "model": "m"}))
            await client.reader.readuntil(b"session.created")


@pytest.mark.parametrize("wrong", ["pool", "/pool/", "/", "/a b", "/a//b"])
def test_what_is_no_prefix_is_refused_by_name(wrong: str) -> None:
    with pytest.raises(SettingsError, match="MODELPOOL_ROOT_PATH"):
        load({"MODELPOOL_ROOT_PATH": wrong})
    assert load({}).gateway == Settings().gateway
