"""The gateway as a process: ready, refusing to start, ending; and the openai SDK as its client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO

import msgspec
import openai
import psutil
import pytest

from modelpool.gateway.handover import taken_over
from modelpool.home import Home
from modelpool.process import READY_FD, Announcement, NotStarted, Ready, is_retiring
from modelpool.relay import Endpoint
from modelpool.tcp import LISTEN_FD
from tests.contract.test_gateway_control import Manager
from tests.gateway_world import Client, World, chat, entry, gateway, request, snapshot_of
from tests.wire import Unfinished, chunk, on_uvloop, read_message, response, serving


class Gateway:
    """A gateway process and what it said when it started."""

    def __init__(self, process: asyncio.subprocess.Process, said: Announcement) -> None:
        self.process = process
        self.said = said

    @property
    def endpoint(self) -> Endpoint:
        assert isinstance(self.said, Ready)
        return Endpoint.parse(self.said.url)

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection(*self.endpoint))

    @property
    def clients(self) -> set[int]:
        """The ports of those whose connections it has."""
        return {each.raddr.port for each in psutil.Process(self.process.pid).net_connections("tcp") if each.raddr}


@asynccontextmanager
async def started(
    home: Path, log: IO[bytes] | None = None, sock: socket.socket | None = None, /, **environ: str
) -> AsyncIterator[Gateway]:
    # In place of the system's memory, where it would stay: nobody knows here which gateway of a home is the last.
    (home / "run" / "gateway").mkdir(mode=0o700, parents=True, exist_ok=True)
    reader, writer = os.pipe()
    handed = {LISTEN_FD: str(sock.fileno())} if sock else {}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "modelpool.gateway",
        pass_fds=(writer, *map(int, handed.values())),
        stderr=log,
        env={**os.environ, "MODELPOOL_HOME": str(home), "SERVE_PORT": "0", READY_FD: str(writer), **handed, **environ},
    )
    os.close(writer)
    try:
        line = await asyncio.to_thread(_first_line, reader)
        decoder: msgspec.json.Decoder[Announcement] = msgspec.json.Decoder(Announcement)
        yield Gateway(process, decoder.decode(line))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _first_line(fd: int) -> bytes:
    with open(fd, "rb") as pipe:
        return pipe.readline()


@on_uvloop
async def test_it_serves_names_itself_and_takes_all_descriptors_it_may(tmp_path: Path) -> None:
    async with started(tmp_path) as running:
        client = await running.connect()
        assert (await client.ask(request("GET", "/health"))).json["status"] == "ok"
        process = psutil.Process(running.process.pid)
        assert process.cmdline()[0].startswith("modelpool: gateway")
        soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
        assert soft == hard


@on_uvloop
async def test_a_port_that_is_taken_is_said_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with started(tmp_path, SERVE_PORT=str(taken.getsockname()[1])) as running:
            assert isinstance(running.said, NotStarted)
            assert "taken" in running.said.reason
            assert "--port" in running.said.hint
            assert "SERVE_PORT" in running.said.hint
            assert await running.process.wait() == 1


@on_uvloop
async def test_a_public_address_without_a_key_is_refused_by_name(tmp_path: Path) -> None:
    async with started(tmp_path, SERVE_HOST="0.0.0.0") as running:
        assert isinstance(running.said, NotStarted)
        assert "--api-key" in running.said.hint
        assert "--insecure-no-auth" in running.said.hint
    async with started(tmp_path, SERVE_HOST="0.0.0.0", MODELPOOL_API_KEY="k") as running:
        client = await running.connect()
        assert (await client.ask(request("GET", "/v1/models"))).status == 401
        admin = {"Authorization": f"Bearer {Home(tmp_path).admin_key()}"}
        assert (await client.ask(request("GET", "/v1/models", headers=admin))).code == "manager_away"


@pytest.mark.parametrize("impatient", [False, True])
@on_uvloop
async def test_told_to_end_it_lets_requests_finish_unless_told_again(tmp_path: Path, impatient: bool) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        asked.set()
        await go_on.wait()
        writer.write(response(b"done"))

    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(serving(handle))
        manager = Manager(tmp_path)
        manager.first = snapshot_of(entry("m", [endpoint]))
        home = Home(tmp_path)
        await stack.enter_async_context(serving(manager, path=home.control_socket))
        running = await stack.enter_async_context(started(tmp_path))
        await manager.followed.wait()
        client = await running.connect()
        while (await client.ask(request("GET", "/v1/models"))).status != 200:
            await asyncio.sleep(0.01)
        client.send(chat())
        await asked.wait()
        running.process.send_signal(signal.SIGTERM)
        while psutil.Process(running.process.pid).status() != psutil.STATUS_ZOMBIE:
            try:
                _, writer = await asyncio.open_connection(*running.endpoint)
            except ConnectionError:
                break  # it listens no more
            writer.close()
        if impatient:
            running.process.send_signal(signal.SIGTERM)
            assert await running.process.wait() == -signal.SIGTERM
        else:
            go_on.set()
            assert (await client.answer()).body == b"done"
            assert await running.process.wait() == 0


@on_uvloop
async def test_retiring_it_hands_its_socket_on_and_fails_nobody(tmp_path: Path) -> None:
    """Neither those whose connection it has, busy or idle, nor those that come."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_message(reader)
            asked.set()
            await go_on.wait()
            writer.write(response(b"done"))

    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(serving(handle))
        manager = Manager(tmp_path)
        manager.first = snapshot_of(entry("m", [endpoint]))
        await stack.enter_async_context(serving(manager, path=Home(tmp_path).control_socket))
        old = await stack.enter_async_context(started(tmp_path))
        busy, idle = await old.connect(), await old.connect()
        while (await idle.ask(request("GET", "/v1/models"))).status != 200:
            await asyncio.sleep(0.01)
        busy.send(chat())
        await asked.wait()

        sock = taken_over(old.process.pid)
        assert sock is not None
        new = await stack.enter_async_context(started(tmp_path, None, sock))
        sock.close()
        assert new.endpoint == old.endpoint
        old.process.send_signal(signal.SIGSTOP)
        for _ in range(20):  # all who come wait in one queue, whoever takes them out of it
            assert (await (await new.connect()).ask(request("GET", "/health"))).status == 200
        old.process.send_signal(signal.SIGCONT)
        old.process.send_signal(signal.SIGQUIT)
        while not is_retiring(old.process.pid):
            await asyncio.sleep(0.01)
        assert taken_over(old.process.pid) is None
        while True:
            client = await new.connect()
            assert (await client.ask(request("GET", "/health"))).status == 200
            if client.writer.get_extra_info("sockname")[1] in new.clients:
                break

        answer = await idle.ask(request("GET", "/health"))
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        go_on.set()
        assert (await busy.answer()).body == b"done"
        last = await busy.ask(chat())
        assert (last.body, last.headers["connection"]) == (b"done", "close")
        assert await old.process.wait() == 0


COMPLETION = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello there"}}],
}


def part(text: str) -> bytes:
    delta = {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}}],
    }
    return chunk(b"data: " + json.dumps(delta).encode() + b"\n\n")


async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says hello, in one piece or as a stream; dies in the middle of a stream when it is asked to."""
    while True:
        _, body = await read_message(reader)
        asked = msgspec.json.decode(body)
        if not asked.get("stream"):
            writer.write(response(json.dumps(COMPLETION).encode(), "Content-Type: application/json"))
            continue
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(part("Hello "))
        await writer.drain()
        if asked.get("seed") == 13:
            return
        writer.write(part("there") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def sdk_session(world: World, base: str) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "Hello?"}]
    async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["m", "org/starting"]
        assert (await client.models.retrieve("org/starting")).id == "org/starting"
        answer = await client.chat.completions.create(model="m", messages=messages)
        assert answer.choices[0].message.content == "Hello there"
        stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
        assert "".join([each.choices[0].delta.content or "" async for each in stream]) == "Hello there"
        dying = await client.chat.completions.create(model="m", messages=messages, stream=True, seed=13)
        texts = aiter(dying)
        assert (await anext(texts)).choices[0].delta.content == "Hello "
        with pytest.raises(openai.APIError, match="connection broke"):
            await anext(texts)
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="n", messages=messages)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.InternalServerError) as starting:
            await client.chat.completions.create(model="org/starting", messages=messages)
        assert starting.value.code == "model_not_ready"
        assert starting.value.response.headers["retry-after"] == "7"
    await world.until_idle()


@pytest.mark.parametrize("base", ["", "/v1"])
@on_uvloop
async def test_the_openai_sdk_is_at_home_with_and_without_v1(base: str) -> None:
    async with serving(engine) as endpoint:
        async with gateway(entry("m", [endpoint]), entry("org/starting", [])) as world:
            await sdk_session(world, world.url + base)


@on_uvloop
async def test_killed_it_leaves_no_request_running(tmp_path: Path) -> None:
    upstream = Unfinished()
    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(serving(upstream))
        manager = Manager(tmp_path)
        manager.first = snapshot_of(entry("m", [endpoint]))
        await stack.enter_async_context(serving(manager, path=Home(tmp_path).control_socket))
        running = await stack.enter_async_context(started(tmp_path))
        client = await running.connect()
        while (await client.ask(request("GET", "/v1/models"))).status != 200:
            await asyncio.sleep(0.01)
        client.send(chat())
        await upstream.asked.wait()
        running.process.kill()
        await upstream.left.wait()
