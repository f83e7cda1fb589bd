"""`GET /admin/explain/{request_id}`: what was decided for a recent request, asked of any process, and of the dead."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest

from modelpool.messages.explain import Explanation, Outcome, Role
from modelpool.messages.requests import Finished, FinishedRequests
from tests.contract.test_gateway_metrics import node, until, value
from tests.contract.test_gateway_passing import EVENT_STREAM, NOT_BEGUN, Upstream
from tests.contract.test_gateway_process import Gateway
from tests.contract.test_gateway_waiting import Times, away, rules, until_waiting
from tests.gateway_world import ADMIN_KEY, API_KEY, World, chat, entry, gateway, request
from tests.wire import chunk, gone, on_uvloop, read_message, response, serving


async def explained(of: World | Gateway, request_id: str, *, ended: bool = True) -> Explanation:
    """With `ended`, what is told once it has: its record is complete just after its last byte has left."""
    async with asyncio.timeout(5):
        while True:
            client = await of.connect()
            answer = await client.ask(request("GET", f"/admin/explain/{quote(request_id, safe='')}"))
            client.close()
            assert answer.status == 200
            explanation = msgspec.json.decode(answer.body, type=Explanation)
            if not ended or explanation.outcome is not Outcome.RUNNING:
                return explanation
            await asyncio.sleep(0.01)


@on_uvloop
async def test_an_answered_request_is_told_with_choice_loads_and_times() -> None:
    async with (
        serving(Upstream()) as one,
        serving(Upstream()) as two,
        gateway(entry("m", [one, two], capacity=4)) as world,
    ):
        with world.table.model("m").instances[0].lease():
            answer = await world.ask(chat())
        told = await explained(world, answer.request_id)
        assert (told.outcome, told.status, told.model, told.instance) == (Outcome.ANSWERED, 200, "m", "m-r2")
        assert (told.reason, told.runner_up, told.path) == ("least_loaded", "m", "/v1/chat/completions")
        assert {each.instance: (each.inflight, each.role) for each in told.considered} == {
            "m": (1, Role.RUNNER_UP),
            "m-r2": (0, Role.CHOSEN),
        }
        assert told.sent_s is not None
        assert told.first_byte_s is not None
        assert told.ended_s is not None
        assert 0 < told.sent_s <= told.first_byte_s <= told.ended_s < 5
        assert (told.bytes_out, told.pieces, told.streamed) == (len(b'{"ok": true}'), 1, False)
        assert any("the least loaded; runner-up m (1 of 4 in flight)" in sentence for sentence in told.words)


@on_uvloop
async def test_retries_are_told_with_their_reasons() -> None:
    draining = Upstream(response(NOT_BEGUN % b"instance_draining", status="503 Service Unavailable"))
    async with serving(draining) as one, serving(Upstream()) as two, gateway(entry("m", [one, two])) as world:
        while not draining.count:
            answer = await world.ask(chat())
        retried = await explained(world, answer.request_id)
        assert [(each.instance, each.why) for each in retried.retries] == [("m", "instance_draining")]
        assert (retried.instance, retried.runner_up, retried.status) == ("m-r2", "", 200)


@on_uvloop
async def test_requests_without_an_instance_and_with_odd_ids_are_told_too() -> None:
    async with gateway(entry("m", [])) as world:
        for odd in ("a/b?c#d%20e", "%", "../x", "x" * 128):
            answer = await world.ask(chat(headers={"X-Request-Id": odd}))
            told = await explained(world, odd)
            assert answer.request_id == told.request_id == odd
            assert (told.outcome, told.code, told.status) == (Outcome.FAILED, "model_not_ready", 503)
        answer = await world.ask(chat("n" * 100_000))
        told = await explained(world, answer.request_id)
        assert (told.code, len(told.model)) == ("model_not_found", 128)


@on_uvloop
async def test_what_is_not_known_is_said_with_how_far_back_it_goes() -> None:
    async with gateway(entry("m", [])) as world:
        asked = request("GET", "/admin/explain/nobody")
        answer = await world.ask(asked)
        assert (answer.status, answer.code) == (404, "request_not_known")
        assert "none was served yet" in answer.message
        await world.ask(chat())
        assert "the last 4096 requests each, now back to" in (await world.ask(asked)).message


@on_uvloop
async def test_explaining_is_for_the_admin() -> None:
    async with gateway(entry("m", []), api_key=API_KEY) as world:
        answer = await world.ask(chat(headers={"X-Api-Key": API_KEY}))
        target = f"/admin/explain/{answer.request_id}"
        assert (await world.ask(request("GET", target))).status == 401
        assert (await world.ask(request("GET", target, headers={"X-Api-Key": API_KEY}))).status == 403
        assert (await world.ask(request("GET", target, headers={"X-Api-Key": ADMIN_KEY}))).status == 200
        assert (await world.ask(request("POST", target, headers={"X-Api-Key": ADMIN_KEY}))).status == 405


@on_uvloop
async def test_a_request_that_waits_is_seen_to_wait_and_for_how_long_afterwards() -> None:
    waiting = {"name": "modelpool_requests_waiting", "model": "m"}
    async with serving(Upstream()) as endpoint, gateway(away(), rules=rules()) as world:
        client = await world.connect()
        client.send(chat(headers={"X-Request-Id": "mine"}))
        await until_waiting(world)
        await until(world, 1, **waiting)
        told = await explained(world, "mine", ended=False)
        assert (told.outcome, told.instance, told.words[-1]) == (Outcome.RUNNING, "", "It waits still.")
        await asyncio.sleep(0.05)
        Times(world).say(entry("m", [endpoint]))
        assert (await client.answer()).status == 200
        told = await explained(world, "mine")
        assert (told.outcome, told.instance) == (Outcome.ANSWERED, "m")
        assert 0.05 <= told.waited_s < 5
        samples = await until(world, 0, **waiting)
        assert value(samples, "modelpool_request_queue_time_seconds_sum", model="m") == pytest.approx(told.waited_s)

        Times(world).say(away())
        leaving = await world.connect()
        leaving.send(chat())
        await until(world, 1, **waiting)
        leaving.abort()
        samples = await until(world, 1, name="modelpool_client_disconnects_total", model="m")
        assert value(samples, "modelpool_requests_waiting", model="m") == 0
        assert value(samples, "modelpool_requests_total", model="m", status="499", reason="client_left") == 1


@on_uvloop
async def test_another_process_tells_of_what_runs_and_of_what_died_with_its_process(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        writer.write(EVENT_STREAM + chunk(b"data: 1\n\n"))
        asked.set()
        await gone(reader)

    async with serving(handle) as endpoint, node(tmp_path, endpoint) as (one, two):
        client = await one.connect()
        client.send(chat(stream=True, headers={"X-Request-Id": "mine"}))
        await asked.wait()
        told = await explained(two, "mine", ended=False)
        assert (told.outcome, told.instance, told.gateway) == (Outcome.RUNNING, "m", 0)
        one.process.send_signal(signal.SIGKILL)
        await one.process.wait()
        told = await explained(two, "mine")
        assert (told.outcome, told.instance) == (Outcome.LOST, "m")


async def finished(world: World, after: str) -> FinishedRequests:
    client = await world.connect()
    answer = await client.ask(request("GET", f"/admin/requests?ended_after={after}"))
    client.close()
    assert answer.status == 200
    return msgspec.json.decode(answer.body, type=FinishedRequests)


@on_uvloop
async def test_what_became_of_the_latest_requests_can_be_asked_for_again_and_again_without_a_gap() -> None:
    async with serving(Upstream()) as one, gateway(entry("m", [one])) as world:
        until = (await finished(world, "inf")).until
        seen: list[Finished] = []
        for _ in range(5):
            assert (await world.ask(chat())).status == 200
            news = await finished(world, repr(until))
            assert news.complete_since <= until
            seen, until = [*seen, *news.requests], news.until
        async with asyncio.timeout(5):
            while len(seen) < 5:
                news = await finished(world, repr(until))
                seen, until = [*seen, *news.requests], news.until
        assert [(each.model, each.status) for each in seen] == [("m", 200)] * 5
        assert [each.ended for each in seen] == sorted({each.ended for each in seen})
        assert all(each.service_s and each.first_byte_s and each.first_byte_s <= each.service_s < 5 for each in seen)

        client = await world.connect()
        answer = await client.ask(request("GET", "/admin/requests?ended_after=soon"))
        client.close()
        assert answer.status == 422
        assert b"`ended_after`: must be a number of seconds, got 'soon'" in answer.body
