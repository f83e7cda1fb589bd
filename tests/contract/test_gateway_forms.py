"""Forms through the gateway: sound to be transcribed, and the model's name behind it."""

from __future__ import annotations

import asyncio
import os

import openai
import pytest

from modelpool.engines.fake.engine import FakeEngine
from modelpool.engines.server import Server
from modelpool.messages.models import ModelSpec
from modelpool.relay import Endpoint
from modelpool.tcp import bind_tcp
from tests.contract.test_gateway_passing import Upstream
from tests.gateway_world import entry, gateway, request
from tests.wire import on_uvloop, serving

FORM = {"Content-Type": "multipart/form-data; boundary=b0"}


def form(sound: bytes, *, model: bytes = b"m") -> bytes:
    return (
        b'--b0\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        + sound
        + b'\r\n--b0\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
        + model
        + b"\r\n--b0--\r\n"
    )


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/audio/translations"])
@on_uvloop
async def test_a_form_goes_up_byte_for_byte(path: str) -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint]), entry("n", [])) as world:
        sound = os.urandom(500_000)
        assert (await world.ask(request("POST", path, form(sound), FORM))).json == {"ok": True}
        assert upstream.bodies == [form(sound)]
        assert b"\r\ncontent-type: multipart/form-data; boundary=b0\r\n" in upstream.heads[0]
        assert (await world.ask(request("POST", path, form(sound, model=b"n"), FORM))).code == "model_not_ready"
        missing = await world.ask(request("POST", path, form(sound, model=b"mm"), FORM))
        assert (missing.status, missing.code, missing.json["error"]["param"]) == (404, "model_not_found", "model")


@on_uvloop
async def test_what_is_wrong_with_a_form_is_said_and_the_connection_goes_on() -> None:
    async with gateway(entry("m", [])) as world:
        client = await world.connect()
        for body, headers, code, param in [
            (form(b"x", model=b""), FORM, "invalid_request", "model"),
            (form(b"x")[:-20], FORM, "invalid_form", None),
            (b'{"model": "m"}', {"Content-Type": "application/json"}, "invalid_form", None),
            (b"", {}, "invalid_form", None),
        ]:
            answer = await client.ask(request("POST", "/v1/audio/transcriptions", body, headers))
            assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, code, param)


@on_uvloop
async def test_the_openai_sdk_has_sound_transcribed_and_translated() -> None:
    sock = bind_tcp("127.0.0.1", 0, flag="", variable="")
    server = Server(await FakeEngine(ModelSpec(alias="ears", fake=True)).start())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve_on(sock))
        async with gateway(entry("ears", [Endpoint(*sock.getsockname()[:2])])) as world:
            sound = ("a.wav", b"\r\n--" + os.urandom(70_000))
            async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
                heard = await client.audio.transcriptions.create(model="ears", file=sound)
                assert heard.text == "You sent 70004 bytes of sound."
                said = await client.audio.translations.create(model="ears", file=sound)
                assert said.text == heard.text
                stream = await client.audio.transcriptions.create(model="ears", file=sound, stream=True)
                events = [event.model_dump() async for event in stream]
                pieces = [event["choices"][0]["delta"]["content"] for event in events]
                assert "".join(pieces) == heard.text
                assert len(pieces) > 1
            await world.until_idle()
        server.stop.set()
