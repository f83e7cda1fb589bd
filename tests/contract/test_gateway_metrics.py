"""What the gateway counts and names: request ids, and metrics over all gateway processes of a node."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from modelpool.home import Home
from modelpool.relay import Endpoint
from modelpool.settings import GatewaySettings
from tests.contract.test_gateway_control import Manager
from tests.contract.test_gateway_passing import EVENT_STREAM, NOT_BEGUN, Upstream, nobody
from tests.contract.test_gateway_process import Gateway, started
from tests.gateway_world import ADMIN_KEY, API_KEY, Client, World, chat, entry, gateway, request, snapshot_of
from tests.wire import Unfinished, chunk, gone, on_uvloop, read_message, response, serving

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def scrape(of: World | Gateway) -> Samples:
    client = await of.connect()
    answer = await client.ask(request("GET", "/metrics"))
    client.close()
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(answer.body.decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    """0 for what is not there."""
    return samples.get((name, frozenset(labels.items())), 0.0)


async def until(of: World | Gateway, expected: float, name: str = "modelpool_requests_total", **labels: str) -> Samples:
    """What is read once this number is there: a request is counted just after its last byte has left."""
    async with asyncio.timeout(5):
        while value(samples := await scrape(of), name, **labels) != expected:
            await asyncio.sleep(0.01)
    return samples


def names_of(samples: Samples, label: str) -> set[str]:
    return {text for _, labels in samples for name, text in labels if name == label}


@on_uvloop
async def test_a_request_keeps_its_id_on_all_sides() -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        answer = await world.ask(chat(headers={"X-Request-Id": "from-the-client"}))
        assert answer.request_id == "from-the-client"
        assert b"x-request-id: from-the-client\r\n" in upstream.heads[0]
        ids = {(await world.ask(chat())).request_id for _ in range(20)}
        assert len(ids) == 20
        assert all(f"x-request-id: {each}\r\n".encode() in b"".join(upstream.heads) for each in ids)


@pytest.mark.parametrize("given", ["x" * 129, "a b", "näh", ""])
@on_uvloop
async def test_an_id_that_is_not_sane_is_replaced(given: str) -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        answer = await world.ask(chat(headers={"X-Request-Id": given}))
        assert re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", answer.request_id)
        assert upstream.heads[0].count(b"x-request-id") == 1
        assert f"x-request-id: {answer.request_id}\r\n".encode() in upstream.heads[0]


@on_uvloop
async def test_the_engines_own_word_of_the_id_is_not_doubled() -> None:
    upstream = Upstream(response(b"x", "X-Request-Id: the-engines"))
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        answer = await world.ask(chat(headers={"X-Request-Id": "mine"}))
        assert (answer.request_id, answer.raw.lower().count(b"x-request-id")) == ("mine", 0)


@pytest.mark.parametrize(
    "raw",
    [
        chat("unknown"),
        request("GET", "/nowhere"),
        request("POST", "/nowhere", b"body"),
        request("POST", "/v1/chat/completions", b"{"),
        b"garbage\r\n\r\n",
        request("GET", "/health", version="2.0"),
        request("GET", "/health"),
        request("GET", "/admin/status"),
    ],
)
@on_uvloop
async def test_every_answer_has_an_id(raw: bytes) -> None:
    async with gateway(entry("m", [])) as world:
        assert (await world.ask(raw)).request_id


@on_uvloop
async def test_a_request_is_counted_with_what_came_of_it() -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        body_bytes = 0
        for _ in range(3):
            await world.ask(chat())
            body_bytes += len(upstream.bodies[-1])
        samples = await until(world, 3, model="m", status="200", reason="only")
        assert value(samples, "modelpool_request_bytes_total", model="m") == body_bytes
        assert value(samples, "modelpool_response_bytes_total", model="m") == 3 * len(b'{"ok": true}')
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert value(samples, f"modelpool_{name}_seconds_count", model="m") == 3
            assert value(samples, f"modelpool_{name}_seconds_bucket", model="m", le="+Inf") == 3
        assert value(samples, "modelpool_time_per_output_token_seconds_count", model="m") == 0
        assert value(samples, "modelpool_requests_in_flight", model="m", instance="m") == 0
        assert value(samples, "modelpool_instance_breaker_state", gateway="0", instance="m") == 0
        assert value(samples, "process_resident_memory_bytes", gateway="0") > 1 << 20


@on_uvloop
async def test_a_streams_time_between_tokens_is_its_time_by_its_pieces() -> None:
    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM)
        for number in range(6):
            writer.write(chunk(b"data: %d\n\n" % number))
            await asyncio.sleep(0.03)
        writer.write(b"0\r\n\r\n")
        await gone(reader)

    async with serving(slowly) as endpoint, gateway(entry("m", [endpoint])) as world:
        assert (await world.ask(chat(stream=True))).status == 200
        samples = await until(world, 1, model="m", status="200", reason="only")
        name = "modelpool_time_per_output_token_seconds"
        assert value(samples, f"{name}_count", model="m") == 1
        assert 0.025 < value(samples, f"{name}_sum", model="m") < 0.1
        assert value(samples, "modelpool_time_to_first_token_seconds_sum", model="m") < 0.1
        assert value(samples, "modelpool_e2e_request_latency_seconds_sum", model="m") > 0.17


@on_uvloop
async def test_failures_are_counted_by_what_they_are_and_no_unknown_name_is_a_label() -> None:
    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))

    async with serving(die) as endpoint:
        async with gateway(entry("m", [endpoint]), entry("starting", []), api_key=API_KEY) as world:
            key = {"Authorization": f"Bearer {API_KEY}"}
            for model in ("made-up-1", "made-up-2"):
                assert (await world.ask(chat(model, headers=key))).status == 404
            assert (await world.ask(chat("starting", headers=key))).status == 503
            assert b"upstream_failed" in (await world.ask(chat(stream=True, headers=key))).body
            assert (await world.ask(chat())).status == 401
            await world.until_idle()
            answer = await world.ask(request("GET", "/metrics", headers={"Authorization": f"Bearer {ADMIN_KEY}"}))
            samples = parsed(answer.body.decode())
            name = "modelpool_requests_total"
            assert value(samples, name, model="", status="404", reason="model_not_found") == 2
            assert value(samples, name, model="starting", status="503", reason="model_not_ready") == 1
            assert value(samples, name, model="m", status="200", reason="only") == 1
            assert value(samples, name, model="", status="401", reason="invalid_api_key") == 1
            assert value(samples, "modelpool_broken_answers_total", model="m") == 1
            assert names_of(samples, "model") == {"", "m", "starting"}


@on_uvloop
async def test_a_retry_is_counted_with_its_reason() -> None:
    draining = Upstream(response(NOT_BEGUN % b"instance_draining", status="503 Service Unavailable"))
    async with serving(draining) as one, serving(Upstream()) as two, gateway(entry("m", [one, two])) as world:
        for _ in range(2):
            assert (await world.ask(chat())).status == 200
        await world.until_idle()
        samples = await scrape(world)
        assert value(samples, "modelpool_retries_total", model="m", reason="instance_draining") == draining.count > 0
        assert value(samples, "modelpool_requests_in_flight", model="m", instance="m") == 0
        assert value(samples, "modelpool_requests_in_flight", model="m", instance="m-r2") == 0
    async with gateway(entry("m", [await nobody()])) as world:
        assert (await world.ask(chat())).status == 503
        samples = await until(world, 1, model="m", status="503", reason="model_not_ready")
        assert value(samples, "modelpool_retries_total", model="m", reason="upstream_failed") == 1


@pytest.mark.parametrize("begun", [False, True])
@on_uvloop
async def test_a_client_that_leaves_is_counted_once_and_is_in_flight_no_more(begun: bool) -> None:
    upstream = Unfinished(EVENT_STREAM + chunk(b"data: 1\n\n") if begun else b"")
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        client = await world.connect()
        client.send(chat(stream=True))
        await upstream.asked.wait()
        if begun:
            await client.reader.readuntil(b"data: 1")
        assert value(await scrape(world), "modelpool_requests_in_flight", model="m", instance="m") == 1
        client.close()
        await world.until_idle()
        samples = await until(world, 1, model="m", status="200" if begun else "499", reason="only")
        assert value(samples, "modelpool_requests_in_flight", model="m", instance="m") == 0
        assert value(samples, "modelpool_client_disconnects_total", model="m") == 1


@on_uvloop
async def test_metrics_are_for_the_admin_where_keys_are_set_unless_they_are_said_to_be_open() -> None:
    plain = request("GET", "/metrics")
    async with gateway(entry("m", []), api_key=API_KEY) as world:
        assert (await world.ask(plain)).status == 401
        assert (await world.ask(request("GET", "/metrics", headers={"X-Api-Key": API_KEY}))).status == 403
        assert (await world.ask(request("GET", "/metrics", headers={"X-Api-Key": ADMIN_KEY}))).status == 200
    async with gateway(entry("m", []), api_key=API_KEY, observed=GatewaySettings(metrics_open=True)) as world:
        assert (await world.ask(plain)).status == 200
    async with gateway(entry("m", [])) as world:
        assert (await world.ask(plain)).status == 200
        assert (await world.ask(request("GET", "/metrics", headers={"Host": "evil.example"}))).status == 403


@on_uvloop
async def test_openmetrics_is_spoken_to_who_asks_for_it() -> None:
    async with gateway(entry("m", [])) as world:
        headers = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
        answer = await world.ask(request("GET", "/metrics", headers=headers))
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert answer.body.endswith(b"# EOF\n")


@asynccontextmanager
async def node(home: Path, endpoint: Endpoint) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """Two gateway processes of one home that know the model `m`."""
    async with AsyncExitStack() as stack:
        manager = Manager(home)
        manager.first = snapshot_of(entry("m", [endpoint]))
        await stack.enter_async_context(serving(manager, path=Home(home).control_socket))
        one = await stack.enter_async_context(started(home, MODELPOOL_GATEWAY_PROCESSES="2"))
        two = await stack.enter_async_context(started(home, MODELPOOL_GATEWAY_PROCESSES="2"))
        for each in (one, two):
            client = await each.connect()
            while (await client.ask(request("GET", "/v1/models"))).status != 200:
                await asyncio.sleep(0.01)
            client.close()
        yield one, two


@on_uvloop
async def test_each_process_answers_for_all_and_what_a_killed_one_counted_is_kept(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_message(reader)
            if b"hang" in body:
                asked.set()
                await gone(reader)
                return
            writer.write(response(b"x"))

    async def counted(requests: int, *by: Gateway) -> None:
        for each in by:
            await until(each, requests, model="m", status="200", reason="only")

    async with serving(handle) as endpoint, node(tmp_path, endpoint) as (one, two):
        clients: list[Client] = [await one.connect(), await two.connect()]
        for client in (clients[0], *clients):
            assert (await client.ask(chat())).status == 200
        await counted(3, one, two)
        clients[0].send(chat(stop="hang"))
        await asked.wait()
        assert value(await scrape(two), "modelpool_requests_in_flight", model="m", instance="m") == 1
        assert names_of(await scrape(two), "gateway") >= {"0", "1"}

        one.process.send_signal(signal.SIGKILL)
        await one.process.wait()
        await counted(3, two)
        samples = await scrape(two)
        assert value(samples, "modelpool_requests_in_flight", model="m", instance="m") == 0
        assert value(samples, "process_resident_memory_bytes", gateway="0") == 0

        async with started(tmp_path, MODELPOOL_GATEWAY_PROCESSES="2") as three:
            client = await three.connect()
            while (await client.ask(chat())).status != 200:
                await asyncio.sleep(0.01)
            await counted(4, two, three)
            for each in (two, three):
                while not value(await scrape(each), "modelpool_client_connections", gateway="0"):
                    await asyncio.sleep(0.05)  # it says so once a second
