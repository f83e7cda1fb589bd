"""The access log and the request log of a gateway that is asked for them."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from modelpool.gateway.observe.log_file import log_file
from modelpool.settings import GatewaySettings
from tests.contract.test_gateway_passing import EVENT_STREAM, Upstream, nobody
from tests.gateway_world import API_KEY, chat, entry, gateway, request
from tests.wire import chunk, on_uvloop, read_message, serving


def lines(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


@on_uvloop
async def test_each_request_is_a_line_with_what_came_of_it(tmp_path: Path) -> None:
    observed = GatewaySettings(access_log_sample=1)
    async with serving(Upstream()) as endpoint:
        async with gateway(entry("m", [endpoint]), home=tmp_path, api_key=API_KEY, observed=observed) as world:
            key = {"X-Api-Key": API_KEY}
            ids = [(await world.ask(chat(headers=key))).request_id for _ in range(3)]
            ids.append((await world.ask(chat("unknown", headers=key))).request_id)
            ids.append((await world.ask(chat())).request_id)
    log = tmp_path / "access.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    written = lines(log)
    assert sorted(each["request_id"] for each in written) == sorted(ids)
    by_id = {each["request_id"]: each for each in written}
    one = by_id[ids[0]]
    assert (one["model"], one["instance"], one["status"], one["reason"]) == ("m", "m", 200, "only")
    assert one["time"].endswith("+00:00")
    assert 0 < one["first_byte_s"] <= one["total_s"]
    assert (by_id[ids[3]]["status"], by_id[ids[3]]["code"]) == (404, "model_not_found")
    assert (by_id[ids[4]]["status"], by_id[ids[4]]["code"]) == (401, "invalid_api_key")


@on_uvloop
async def test_of_a_sample_the_failures_are_all_there(tmp_path: Path) -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_message(reader)
        if b'"stream"' in body:
            writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))

    observed = GatewaySettings(access_log_sample=1e-9)
    async with serving(die) as endpoint, serving(Upstream()) as fine:
        async with gateway(entry("bad", [endpoint]), entry("m", [fine]), home=tmp_path, observed=observed) as world:
            for _ in range(20):
                await world.ask(chat())
            await world.ask(chat("unknown"))
            assert (await world.ask(chat("bad"))).status == 502
            await world.ask(chat("bad", stream=True))
    assert sorted((each["status"], each["code"]) for each in lines(tmp_path / "access.log")) == [
        (200, "upstream_failed"),
        (502, "upstream_failed"),
    ]


@on_uvloop
async def test_nothing_is_written_where_nothing_was_asked_for(tmp_path: Path) -> None:
    async with gateway(entry("m", [await nobody()]), home=tmp_path) as world:
        await world.ask(chat(headers={"X-ModelPool-Max-Wait": "0"}))
    assert os.listdir(tmp_path) == []


SECRETS = ("client-secret", "tool-secret", "url-secret", "header-secret")


def body() -> bytes:
    return msgspec.json.encode(
        {
            "model": "m",
            "temperature": 0.5,
            "messages": [{"role": "user", "content": "what was said"}],
            "prompt": [1, 2, 3],
            "tools": [{"type": "mcp", "authorization": "tool-secret", "headers": {"X-Key": "header-secret"}}],
            "image_url": {"url": "https://user:url-secret@host/x?api_key=url-secret"},
        }
    )


@pytest.mark.parametrize("content", [False, True])
@on_uvloop
async def test_the_request_log_has_no_credential_and_texts_only_where_they_are_asked_for(
    tmp_path: Path, content: bool
) -> None:
    observed = GatewaySettings(request_log_sample=1, request_log_content=content)
    async with serving(Upstream()) as endpoint, gateway(entry("m", [endpoint]), home=tmp_path, observed=observed) as w:
        headers = {"Authorization": "Bearer client-secret", "Content-Type": "application/json"}
        answer = await w.ask(request("POST", "/v1/chat/completions?api_key=client-secret", body(), headers))
        await w.ask(request("POST", "/v1/chat/completions", b"{broken client-secret", headers))
    text = (tmp_path / "requests.log").read_text()
    assert not any(secret in text for secret in SECRETS)
    assert ("what was said" in text) is content
    first, broken = lines(tmp_path / "requests.log")
    assert (first["request_id"], first["path"]) == (answer.request_id, "/v1/chat/completions")
    assert first["bytes"] == len(body())
    logged = first["body"]
    assert (logged["model"], logged["temperature"], logged["messages"][0]["role"]) == ("m", 0.5, "user")
    if not content:
        assert logged["messages"][0]["content"] == "[13 characters]"
        assert logged["prompt"] == "[3 numbers]"
    assert "body" not in broken


@on_uvloop
async def test_a_log_that_is_full_or_was_moved_is_begun_anew(tmp_path: Path) -> None:
    path, old = tmp_path / "x.log", tmp_path / "x.log.1"
    async with log_file(path, str.encode, max_bytes=100) as one, log_file(path, str.encode, max_bytes=100) as two:
        for number in range(30):
            for file in (one, two):
                file.put(f"line {number}")
                await file.flush()
        sizes = path.stat().st_size, old.stat().st_size
        assert max(sizes) <= 100 < sum(sizes)
        written = (old.read_text() + path.read_text()).splitlines()
        last = [f"line {number}" for number in range(30) for _ in range(2)]
        assert written == last[-len(written) :]
        os.replace(path, tmp_path / "moved")
        one.put("after")
        await one.flush()
        two.put("after")
    assert path.read_text() == "after\nafter\n"


@on_uvloop
async def test_a_disk_that_takes_nothing_costs_lines_and_no_request(tmp_path: Path) -> None:
    observed = GatewaySettings(access_log_sample=1)
    (tmp_path / "access.log").mkdir()
    async with serving(Upstream()) as endpoint, gateway(entry("m", [endpoint]), home=tmp_path, observed=observed) as w:
        assert (await w.ask(chat())).status == 200
