"""Traces, received by an OTLP receiver of this test; and what passes when there are none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from modelpool.settings import GatewaySettings
from tests.contract.test_gateway_passing import Upstream, nobody
from tests.gateway_world import chat, entry, gateway
from tests.wire import on_uvloop, read_message, response, serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Receiver:
    """Takes what is exported."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.spans: list[Any] = []
        self.resource: dict[str, str] = {}

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_message(reader)
            self.paths.append(head.split(b" ")[1].decode())
            for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resource = {each.key: each.value.string_value for each in part.resource.attributes}
                for scope in part.scope_spans:
                    self.spans.extend(scope.spans)
            writer.write(response(b"", "Content-Type: application/x-protobuf"))


@asynccontextmanager
async def receiving() -> AsyncIterator[tuple[Receiver, GatewaySettings]]:
    """A receiver, and the settings of a gateway that exports to it. What there is comes when the gateway ends."""
    receiver = Receiver()
    async with serving(receiver) as endpoint:
        yield receiver, GatewaySettings(otlp_endpoint=f"http://{endpoint}")


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def told(upstream: Upstream) -> str:
    lines = [line for line in upstream.heads[-1].decode().split("\r\n") if line.startswith("traceparent: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("traceparent: ")


@on_uvloop
async def test_a_span_joins_the_clients_trace_and_the_engine_is_told_of_it() -> None:
    upstream = Upstream()
    async with receiving() as (receiver, observed), serving(upstream) as endpoint:
        async with gateway(entry("m", [endpoint]), observed=observed) as world:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1", "X-Request-Id": "mine"}
            assert (await world.ask(chat(headers=headers))).status == 200
        (span,) = receiver.spans
        assert receiver.paths == ["/v1/traces"]
        assert receiver.resource["service.name"] == "modelpool-gateway"
        assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (
            TRACE,
            PARENT,
            "POST /v1/chat/completions",
        )
        assert told(upstream) == f"00-{TRACE}-{span.span_id.hex()}-01"
        assert b"tracestate: vendor=1\r\n" in upstream.heads[-1]
        said = attributes(span)
        assert (said["gen_ai.request.model"], said["gen_ai.request.id"]) == ("m", "mine")
        assert (said["http.response.status_code"], said["modelpool.instance"]) == (200, "m")
        assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"] < 5
        assert [event.name for event in span.events] == ["sent to the instance", "first byte"]
        moments = [event.time_unix_nano for event in span.events]
        assert span.start_time_unix_nano <= moments[0] <= moments[1] <= span.end_time_unix_nano


@on_uvloop
async def test_without_a_clients_trace_a_new_one_begins() -> None:
    upstream = Upstream()
    async with receiving() as (receiver, observed), serving(upstream) as endpoint:
        async with gateway(entry("m", [endpoint]), observed=observed) as world:
            await world.ask(chat())
            await world.ask(chat(headers={"traceparent": "nonsense"}))
        assert [span.parent_span_id for span in receiver.spans] == [b"", b""]
        version, trace, span, flags = told(upstream).split("-")
        assert (version, trace, span) == ("00", receiver.spans[1].trace_id.hex(), receiver.spans[1].span_id.hex())
        assert int(flags, 16) & 1


@on_uvloop
async def test_what_the_client_did_not_sample_is_not_traced_and_passes_as_it_came() -> None:
    upstream = Upstream()
    async with receiving() as (receiver, observed), serving(upstream) as endpoint:
        async with gateway(entry("m", [endpoint]), observed=observed) as world:
            await world.ask(chat(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}))
        assert told(upstream) == f"00-{TRACE}-{PARENT}-00"
        assert receiver.spans == []


@on_uvloop
async def test_a_failure_is_an_error_of_its_span() -> None:
    async with receiving() as (receiver, observed):
        async with gateway(entry("m", [await nobody()]), observed=observed) as world:
            assert (await world.ask(chat(headers={"X-ModelPool-Max-Wait": "0"}))).status == 503
        (span,) = receiver.spans
        said = attributes(span)
        assert span.status.code == span.status.STATUS_CODE_ERROR
        assert span.status.message == said["error.type"]
        assert said["modelpool.retries"].values[0].string_value == "m: upstream_failed"


@on_uvloop
async def test_a_receiver_that_is_away_costs_requests_and_the_end_nothing() -> None:
    observed = GatewaySettings(otlp_endpoint=f"http://{await nobody()}")
    async with serving(Upstream()) as endpoint:
        loop = asyncio.get_running_loop()
        async with gateway(entry("m", [endpoint]), observed=observed) as world:
            for _ in range(10):
                assert (await world.ask(chat())).status == 200
            ending = loop.time()
        assert loop.time() - ending < 5


@pytest.mark.parametrize("told_by_client", [None, f"00-{TRACE}-{PARENT}-01"])
@on_uvloop
async def test_without_traces_the_clients_header_just_passes(told_by_client: str | None) -> None:
    upstream = Upstream()
    async with serving(upstream) as endpoint, gateway(entry("m", [endpoint])) as world:
        await world.ask(chat(headers={"traceparent": told_by_client} if told_by_client else {}))
        assert (b"traceparent" in upstream.heads[0]) is (told_by_client is not None)
        if told_by_client:
            assert told(upstream) == told_by_client
