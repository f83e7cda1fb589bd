"""A key's limits at the gateway: in one process and over several of one node, which share them."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from websockets.exceptions import InvalidStatus

from modelpool.errors import InternalError, RateLimitExceeded
from modelpool.gateway import limiter as limiting
from modelpool.gateway.keys import Caller
from modelpool.gateway.limiter import Limiter
from modelpool.gateway.request import Request
from modelpool.gateway.routes import Route, match
from modelpool.gateway.shared import joined
from modelpool.home import Home
from modelpool.messages.routing import KeyEntry, KeysDelta
from modelpool.relay import Endpoint
from tests.contract.test_gateway_control import Manager
from tests.contract.test_gateway_process import Gateway, started
from tests.contract.test_gateway_realtime import hear, talking
from tests.contract.test_gateway_responses import fakes
from tests.contract.test_gateway_waiting import away, rules, until_waiting
from tests.gateway_world import ADMIN_KEY, Answer, Client, chat, entry, gateway, key, keys_of, request, snapshot_of
from tests.wire import chunk, gone, on_uvloop, read_message, response, serving

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def asking(secret: str = "mp-a", *, max_tokens: int | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {secret}"}
    return chat(headers=headers) if max_tokens is None else chat(headers=headers, max_tokens=max_tokens)


def limits(answer: Answer, what: str) -> list[str]:
    return [answer.headers[f"x-ratelimit-{each}-{what}"] for each in ("limit", "remaining", "reset")]


async def done(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_message(reader)
        writer.write(response(b"done"))


class Holding:
    """An engine that begins a stream for each request and ends it when told."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.running = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            self.running += 1
            try:
                writer.write(STREAM + chunk(b"data: {}\n\n"))
                await asyncio.wait(
                    [asyncio.ensure_future(self.go_on.wait()), left := asyncio.ensure_future(gone(reader))],
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if left.done():
                    return
                left.cancel()
                writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            finally:
                self.running -= 1


def counting(usage: dict[str, object]) -> list[bytes]:
    """The answers of an engine that says what it used: plain, and as a stream with and without it."""
    head = {"id": "x", "choices": [{"message": {"content": "hello"}}]}
    events = [b"data: " + json.dumps(head).encode() + b"\n\n"] * 5
    last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
    end = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    return [
        response(json.dumps({**head, "usage": usage}).encode(), "Content-Type: application/json"),
        STREAM + b"".join(map(chunk, [*events, last])) + end,
        STREAM + b"".join(map(chunk, events)) + end,
    ]


@on_uvloop
async def test_the_headers_count_down_and_a_429_says_when_to_come_back() -> None:
    clock = Clock()
    async with serving(done) as endpoint:
        keys = [key("mp-a", id="key-a", requests_per_minute=2), key("mp-b", id="key-b")]
        async with gateway(entry("m", [endpoint]), keys=keys, clock=clock) as world:
            answer = await world.ask(asking())
            assert (answer.body, limits(answer, "requests")) == (b"done", ["2", "1", "1m0s"])
            clock.now += 20.25
            assert limits(await world.ask(asking()), "requests") == ["2", "0", "1m0s"]
            clock.now += 10
            refused = await world.ask(asking())
            assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
            assert refused.json["error"]["type"] == "requests"
            assert "2 requests per minute. Try again in 30 s." in refused.message
            assert refused.headers["retry-after"] == "30"
            assert limits(refused, "requests") == ["2", "0", "50s"]
            clock.now += 29
            assert (await world.ask(asking())).headers["retry-after"] == "1"
            clock.now += 1
            assert limits(await world.ask(asking()), "requests") == ["2", "0", "1m0s"]
            free = await world.ask(asking("mp-b"))
            assert not any(name.startswith("x-ratelimit") for name in free.headers)
            free = await world.ask(asking(ADMIN_KEY))
            assert not any(name.startswith("x-ratelimit") for name in free.headers)


@on_uvloop
async def test_what_is_refused_for_any_reason_consumes_nothing() -> None:
    clock = Clock()
    async with serving(done) as endpoint:
        limited = key("mp-a", models=("m",), requests_per_minute=2, tokens_per_minute=100, max_concurrency=1)
        async with gateway(entry("m", [endpoint]), entry("other", [endpoint]), keys=[limited], clock=clock) as world:
            bearer = {"Authorization": "Bearer mp-a"}
            for raw, status in (
                (chat("other", headers=bearer), 403),
                (request("POST", "/v1/chat/completions", b"{}", bearer), 400),
                (request("GET", "/v1/models", headers=bearer), 200),
                (asking(max_tokens=101), 429),
            ):
                assert (await world.ask(raw)).status == status
            too_much = await world.ask(asking(max_tokens=100))
            assert (too_much.status, too_much.json["error"]["type"]) == (429, "tokens")
            assert "retry-after" not in too_much.headers
            assert "Waiting does not help" in too_much.message
            assert limits(too_much, "tokens") == ["100", "100", "0ms"]
            assert limits(too_much, "requests") == ["2", "2", "0ms"]


def prompt_of(raw: bytes) -> int:
    """What a body is taken to be in tokens."""
    return -(-len(raw.partition(b"\r\n\r\n")[2]) // 4)


@pytest.mark.parametrize("kind", ["plain", "stream with usage", "stream"])
@on_uvloop
async def test_tokens_are_reserved_and_then_settled_by_what_the_engine_says(kind: str) -> None:
    clock = Clock()
    answers = counting({"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50})
    answer = answers[["plain", "stream with usage", "stream"].index(kind)]

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            writer.write(answer)

    async with serving(engine) as endpoint:
        limited = key("mp-a", tokens_per_minute=1000)
        async with gateway(entry("m", [endpoint]), keys=[limited], clock=clock) as world:
            large, small = asking(max_tokens=900), asking(max_tokens=0)
            assert limits(await world.ask(large), "tokens") == ["1000", str(100 - prompt_of(large)), "1m0s"]
            used = prompt_of(large) + 5 if kind == "stream" else 50
            clock.now += 10
            assert limits(await world.ask(small), "tokens")[1] == str(1000 - used - prompt_of(small))
            used += prompt_of(small) + 5 if kind == "stream" else 50
            clock.now += 10
            refused = await world.ask(asking(max_tokens=990 - used))
            assert (refused.status, refused.json["error"]["type"]) == (429, "tokens")
            assert refused.headers["retry-after"] == "40"
            assert limits(refused, "tokens") == ["1000", str(1000 - used), "50s"]
            clock.now += 40.1
            assert (await world.ask(asking(max_tokens=990 - used))).status == 200


@on_uvloop
async def test_a_client_that_leaves_gives_its_place_back_and_what_it_reserved_is_settled() -> None:
    engine = Holding()
    async with serving(engine) as endpoint:
        limited = key("mp-a", tokens_per_minute=1000, max_concurrency=2)
        async with gateway(entry("m", [endpoint]), keys=[limited], clock=Clock()) as world:
            raw = asking(max_tokens=300)
            clients = [await world.connect() for _ in range(2)]
            for client in clients:
                client.send(raw)
                await client.reader.readuntil(b"data:")
            refused = await world.ask(raw)
            assert (refused.status, refused.code, refused.headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
            assert "2 requests at once" in refused.message
            assert limits(refused, "tokens")[1] == str(1000 - 2 * (300 + prompt_of(raw)))
            for client in clients:
                client.abort()
            await world.until_idle()
            engine.go_on.set()
            answer = await world.ask(raw)
            assert answer.status == 200
            assert limits(answer, "tokens")[1] == str(700 - 3 * prompt_of(raw) - 2)


@on_uvloop
async def test_what_waits_for_its_model_has_a_place_and_uses_no_tokens() -> None:
    limited = key("mp-a", tokens_per_minute=1000, max_concurrency=1)
    async with gateway(away(), keys=[limited], rules=rules(), clock=Clock()) as world:
        client = await world.connect()
        client.send(asking(max_tokens=300))
        await until_waiting(world)
        assert (await world.ask(asking())).code == "rate_limit_exceeded"
        client.abort()
        await until_waiting(world, 0)
        raw = chat(headers={"Authorization": "Bearer mp-a", "X-ModelPool-Max-Wait": "0"})
        answer = await world.ask(raw)
        assert (answer.code, limits(answer, "tokens")[1]) == ("model_not_ready", str(1000 - prompt_of(raw)))


@on_uvloop
async def test_a_websocket_is_a_request_for_as_long_as_it_is_open() -> None:
    limited = key("mp-a", requests_per_minute=3, max_concurrency=1)
    async with fakes(1) as endpoints, gateway(entry("m", endpoints), keys=[limited], clock=Clock()) as world:
        bearer = {"Authorization": "Bearer mp-a"}
        async with talking(world, "?model=m", additional_headers=bearer) as session:
            assert (await hear(session))["type"] == "session.created"
            with pytest.raises(InvalidStatus) as refused:
                await talking(world, "?model=m", additional_headers=bearer)
            assert refused.value.response.status_code == 429
        await world.until_idle()
        assert limits(await world.ask(asking()), "requests")[1] == "1"


@on_uvloop
async def test_a_request_that_reached_no_engine_uses_no_tokens() -> None:
    async def dying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)

    async def refusing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            writer.write(response(b'{"error": {"message": "no"}}', status="400 Bad Request"))

    async with serving(dying) as dead, serving(refusing) as no:
        entries = (entry("starting", []), entry("dead", [dead]), entry("no", [no]))
        async with gateway(*entries, keys=[key("mp-a", tokens_per_minute=1000)], clock=Clock()) as world:
            bearer = {"Authorization": "Bearer mp-a"}
            for model, status in (("starting", 503), ("dead", 502), ("no", 400), ("no", 400)):
                answer = await world.ask(chat(model, headers=bearer, max_tokens=500))
                assert answer.status == status
                assert int(limits(answer, "tokens")[1]) > 450


@on_uvloop
async def test_a_revoked_key_leaves_no_file_and_its_streams_end_well(tmp_path: Path) -> None:
    engine = Holding()
    async with serving(engine) as endpoint:
        limited = key("mp-a", id="key-a", tokens_per_minute=1000, requests_per_minute=5, max_concurrency=2)
        async with gateway(entry("m", [endpoint]), keys=[limited], folder=tmp_path) as world:
            client = await world.connect()
            client.send(asking())
            await client.reader.readuntil(b"data:")
            assert (tmp_path / "limits-key-a").exists()
            world.keys.apply(KeysDelta(epoch="e1", sequence=2, revoked=("key-a",)))
            assert not (tmp_path / "limits-key-a").exists()
            engine.go_on.set()
            assert (await client.reader.readuntil(b"0\r\n\r\n")).endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
            await world.until_idle()


@on_uvloop
async def test_the_openai_sdk_knows_what_it_is_told() -> None:
    async with serving(done) as endpoint:
        async with gateway(entry("m", [endpoint]), keys=[key("mp-a", requests_per_minute=1)]) as world:
            async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="mp-a", max_retries=0) as client:
                await client.models.list()
                messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "x"}]
                await client.chat.completions.with_raw_response.create(model="m", messages=messages)
                with pytest.raises(openai.RateLimitError) as refused:
                    await client.chat.completions.create(model="m", messages=messages)
                assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "requests")


HAMMER = """
import sys
from pathlib import Path
from modelpool.core.limits import Limits
from modelpool.errors import RateLimitExceeded
from modelpool.gateway.keys import Caller
from modelpool.gateway.limiter import Limiter
from modelpool.gateway.request import Request
from modelpool.gateway.routes import match
from modelpool.gateway.shared import joined
from modelpool.messages.routing import KeyEntry

route = match(b"POST", b"/v1/chat/completions")
request = Request(b"POST", b"/v1/chat/completions", [], http10=False, keep_alive=True)
request.body = b"{}"
limits = {sys.argv[2]: int(sys.argv[3])}
request.caller = Caller(KeyEntry(id="key-a", name="a", digest="00", **limits))
with joined(Path(sys.argv[1])) as node:
    limiter = Limiter(node)
    with limiter.admitted(request, route):
        pass
    print("ready", flush=True)
    sys.stdin.readline()
    admitted, open_ = 0, []
    for _ in range(int(sys.argv[4])):
        grant = limiter.admitted(request, route)
        try:
            grant.__enter__()
        except RateLimitExceeded:
            continue
        admitted += 1
        if sys.argv[2] == "max_concurrency":
            open_.append(grant)
            if len(open_) == 3:
                open_.pop(0).__exit__(None, None, None)
    print(admitted, len(open_), flush=True)
    sys.stdin.readline()
    for grant in open_:
        grant.__exit__(None, None, None)
"""


def hammered(folder: Path, what: str, limit: int, times: int) -> list[tuple[int, int]]:
    """Four processes that ask as fast as they can: how many each was admitted, and how many it had open at the end."""
    command = [sys.executable, "-c", HAMMER, str(folder), what, str(limit), str(times)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(4)
    ]
    counts = []
    try:
        for step in ("ready", "counts"):
            for each in running:
                assert each.stdout is not None
                line = each.stdout.readline().split()
                if step == "counts":
                    counts.append((int(line[0]), int(line[1])))
            for each in running:
                assert each.stdin is not None
                each.stdin.write("\n")
        assert [each.wait(10) for each in running] == [0, 0, 0, 0]
    finally:
        for each in running:
            each.kill()
            each.wait()
    return counts


def test_four_processes_that_ask_as_fast_as_they_can_get_exactly_as_many_requests_as_there_are(tmp_path: Path) -> None:
    counts = hammered(tmp_path, "requests_per_minute", 5_000, 2_500)
    assert sum(admitted for admitted, _ in counts) == 5_000 - 4  # one of each at its start
    assert all(admitted > 0 for admitted, _ in counts)


def test_places_taken_and_given_back_by_four_processes_at_once_are_all_there_at_the_end(tmp_path: Path) -> None:
    counts = hammered(tmp_path, "max_concurrency", 6, 2_500)
    assert sum(open_ for _, open_ in counts) <= 6
    with joined(tmp_path) as node:
        limiter = Limiter(node)
        with ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(limiter.admitted(*limited_request(max_concurrency=6)))
            with pytest.raises(RateLimitExceeded):
                stack.enter_context(limiter.admitted(*limited_request(max_concurrency=6)))


def limited_request(**limits: Any) -> tuple[Request, Route]:
    asked = Request(b"POST", b"/v1/chat/completions", [], http10=False, keep_alive=True)
    asked.body = b"{}"
    asked.caller = Caller(KeyEntry(id="key-a", name="a", digest="00", **limits))
    return asked, match(b"POST", b"/v1/chat/completions")


def test_a_full_disk_refuses_limited_keys_and_kills_nobody(tmp_path: Path) -> None:
    """A write to a page that the disk cannot give would be the end of the process."""
    with joined(tmp_path) as node:
        limiter = Limiter(node)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
            with pytest.raises(InternalError, match="limits of this key"):
                with limiter.admitted(*limited_request(tokens_per_minute=10)):
                    pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        with limiter.admitted(*limited_request(tokens_per_minute=10)):
            pass


def test_a_process_keeps_the_files_of_keys_open_that_run_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "OPEN_MAX", 8)
    with joined(tmp_path) as node:
        limiter = Limiter(node)

        def of_key(number: int) -> tuple[Request, Route]:
            asked, route = limited_request(max_concurrency=1)
            asked.caller = Caller(KeyEntry(id=f"key-{number}", name="a", digest="00", max_concurrency=1))
            return asked, route

        descriptors = psutil.Process().num_fds()
        with limiter.admitted(*of_key(0)):
            for _ in range(2):
                for number in range(1, 100):
                    with limiter.admitted(*of_key(number)):
                        pass
            assert psutil.Process().num_fds() <= descriptors + 9
            with pytest.raises(RateLimitExceeded), limiter.admitted(*of_key(0)):
                pass
        with limiter.admitted(*of_key(0)):
            pass


@asynccontextmanager
async def gateways(home: Path, count: int, endpoint: Endpoint, *keys: KeyEntry) -> AsyncIterator[list[Gateway]]:
    """Gateway processes of one node."""
    manager = Manager(home)
    manager.first = snapshot_of(entry("m", [endpoint]))
    manager.keys = keys_of(*keys)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(manager, path=Home(home).control_socket))
        starting = [stack.enter_async_context(started(home)) for _ in range(count)]
        running = list(await asyncio.gather(*starting))
        for each in running:
            while (
                await ask(each, request("GET", "/v1/models", headers={"Authorization": "Bearer mp-a"}))
            ).status == 503:
                await asyncio.sleep(0.01)
        yield running


async def ask(running: Gateway, raw: bytes) -> Answer:
    client = await running.connect()
    try:
        return await client.ask(raw)
    finally:
        client.close()


@on_uvloop
async def test_of_many_requests_over_three_processes_exactly_as_many_are_admitted_as_may_be(tmp_path: Path) -> None:
    limited = key("mp-a", id="key-a", requests_per_minute=100)
    async with serving(done) as endpoint, gateways(tmp_path, 3, endpoint, limited) as running:

        async def hammer(each: Gateway) -> Counter[int]:
            client = await each.connect()
            return Counter([(await client.ask(asking())).status for _ in range(25)])

        seen: Counter[int] = sum(await asyncio.gather(*(hammer(each) for each in running for _ in range(8))), Counter())
        assert seen == {200: 100, 429: 500}
        running[0].process.kill()
        await running[0].process.wait()
        async with started(tmp_path) as another:  # a restart gives nobody a new minute
            while (status := (await ask(another, asking())).status) in (401, 503):
                await asyncio.sleep(0.01)
            assert status == 429


@on_uvloop
async def test_tokens_over_three_processes_are_never_promised_twice(tmp_path: Path) -> None:
    engine = Holding()
    limited = key("mp-a", id="key-a", tokens_per_minute=1000)
    async with serving(engine) as endpoint, gateways(tmp_path, 3, endpoint, limited) as running:
        raw = asking(max_tokens=100 - prompt_of(asking(max_tokens=90)))

        clients = [await each.connect() for each in running for _ in range(8)]
        for client in clients:
            client.send(raw)
        statuses = [int((await client.reader.readuntil(b"\r\n")).split()[1]) for client in clients]
        assert Counter(statuses) == {200: 10, 429: 14}


@on_uvloop
async def test_places_of_a_process_that_was_killed_are_free_within_two_seconds(tmp_path: Path) -> None:
    engine = Holding()
    limited = key("mp-a", id="key-a", max_concurrency=6)
    async with serving(engine) as endpoint, gateways(tmp_path, 2, endpoint, limited) as running:
        first, second = running
        clients = [await each.connect() for each in (first, first, first, first, second, second)]
        for client in clients:
            client.send(asking())
            await client.reader.readuntil(b"data:")
        assert [(await ask(each, asking())).status for each in running] == [429, 429]
        first.process.kill()
        await first.process.wait()
        async with asyncio.timeout(2.5):
            admitted = [await begun(second) for _ in range(4)]
        assert (await ask(second, asking())).status == 429
        admitted[0].abort()
        await begun(second)


async def begun(running: Gateway) -> Client:
    """A client whose stream has begun: it asks until it may."""
    while True:
        client = await running.connect()
        client.send(asking())
        if b" 200 " in await client.reader.readuntil(b"\r\n"):
            return client
        client.close()
        await asyncio.sleep(0.02)
