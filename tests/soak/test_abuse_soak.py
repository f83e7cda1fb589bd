"""Clients and engines that misbehave at every byte, for minutes, against a gateway process: nothing is left of them.

Honest clients ask all the while, and every one of their answers must be right. Rounds are alike but for their seeds;
memory is compared between the end of the first and the end of the last, with nothing in flight.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import uvloop

from modelpool.gateway.inflight import Row, SharedInflight
from modelpool.gateway.shared import joined
from modelpool.home import Home
from modelpool.messages.routing import Delta, ModelEntry, Unavailable
from modelpool.relay import Endpoint
from tests import abuse
from tests.abuse import ANSWERS, BODY_MAX, Leave, Stop, keyed
from tests.contract.test_gateway_control import Manager
from tests.contract.test_gateway_process import Gateway, started
from tests.gateway_world import Answer, chat, entry, key, keys_of, request, snapshot_of
from tests.wire import Handler, chunk, read_message, serving

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]

ROUNDS = int(os.environ.get("MODELPOOL_SOAK_ABUSE_ROUNDS", "2"))
RANDOM_CLIENTS = 3000
SLOW_READERS = 60
SLOW_SENDERS = 200
STILL_S = 5.0
"""How long it is looked whether engines send on to clients that do not read."""
GROWTH_PER_STREAM = 500e3
"""Of the gateway's memory for a stream that nobody reads: its write buffer, and one segment of the socket's."""
GROWTH_MAX = 6e6
"""Of the gateway's memory from the first round to the last."""
HONEST, BAD = "honest-secret", "bad-secret"
BAD_AT_ONCE = 300
"""What the bad clients' key allows."""
ENVIRONMENT = {
    "MODELPOOL_MAX_BODY_BYTES": str(BODY_MAX),
    "MODELPOOL_FIRST_BYTE_TIMEOUT": "8",
    "MODELPOOL_BETWEEN_BYTES_TIMEOUT": "8",
    "MODELPOOL_CONNECT_TIMEOUT": "8",
    "MODELPOOL_WAITING_MAX": "4",
    "MODELPOOL_WAITING_HEARTBEAT": "0.1",
    "MODELPOOL_GATEWAY_PROCESSES": "2",  # so that leases can be seen from here
}


class Flood:
    """An engine that sends events as fast as they are taken. `taken` has how many bytes, by connection."""

    def __init__(self, busy: abuse.Busy) -> None:
        self.taken: dict[asyncio.StreamWriter, int] = {}
        self._busy = busy

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        data = chunk(b"data: %b\n\n" % (b"x" * 60_000))
        writer.transport.set_write_buffer_limits(0)
        writer.write(abuse.EVENT_STREAM)
        self.taken[writer] = 0
        try:
            with self._busy.one_more():
                while True:
                    writer.write(data)
                    await writer.drain()
                    self.taken[writer] += len(data)
        finally:
            del self.taken[writer]


class World:
    """A gateway process, and all that it talks to, here."""

    def __init__(self, gateway: Gateway, admin_key: str, busy: abuse.Busy, flood: Flood, rows: list[Row]) -> None:
        self.gateway = gateway
        self.process = psutil.Process(gateway.process.pid)
        self.busy = busy
        self.flood = flood
        self.seen: Counter[str] = Counter()
        self._admin_key = admin_key
        self._rows = rows

    @property
    def leases(self) -> int:
        return sum(row.total for row in self._rows)

    @property
    def memory(self) -> int:
        return int(self.process.memory_full_info().pss)

    @property
    def descriptors(self) -> int:
        """But for the connections to engines and manager, which are kept to be used again."""
        engines = sum(each.status == psutil.CONN_ESTABLISHED for each in self.process.net_connections("tcp4"))
        manager = sum(not each.laddr for each in self.process.net_connections("unix"))
        return self.process.num_fds() - engines - manager

    async def metric(self, name: str) -> float:
        """The sum over its labels."""
        async with abuse.connected(self.gateway) as client:
            answer = await client.ask(keyed(request("GET", "/metrics"), self._admin_key))
        assert answer.status == 200, answer.raw
        text = answer.body.decode()
        assert f"# TYPE modelpool_{name} " in text, name
        return sum(map(float, re.findall(rf"^modelpool_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))

    async def until_idle(self) -> None:
        """Wait until nothing is in flight or waits at the gateway, or is in the hands of an engine."""
        left: dict[str, float] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(15):
                while left := {name: count for name, count in (await self._left()).items() if count}:
                    await asyncio.sleep(0.1)
        assert not left

    async def _left(self) -> dict[str, float]:
        return {
            "leases": self.leases,
            "at the engines": self.busy.requests,
            "in flight": await self.metric("requests_in_flight"),
            "waiting": await self.metric("requests_waiting"),
            # It is said once a second: when this one was there, or when not.
            "connections but for this one": max(0, await self.metric("client_connections") - 1),
        }


@asynccontextmanager
async def world(folder: Path, rng: random.Random) -> AsyncIterator[World]:
    busy = abuse.Busy()
    flood = Flood(busy)
    async with AsyncExitStack() as stack:

        async def at(*engines: Handler) -> list[Endpoint]:
            return [await stack.enter_async_context(serving(abuse.until_left(each))) for each in engines]

        honest = abuse.honest_engine(busy)
        entries = [
            entry("bad", await at(abuse.bad_engine(rng), abuse.bad_engine(rng))),
            entry("scripted", await at(abuse.ScriptedEngine(busy))),
            entry("flood", await at(flood)),
            on_its_way("coming"),
            entry("good", await at(honest, honest)),
            entry("brittle", [*await at(honest, abuse.draining_engine, abuse.hasty_engine(rng)), closed_port()]),
        ]
        moving = [*(entry("moving", [each]) for each in await at(honest, honest)), on_its_way("moving")]
        manager = Manager(folder)
        manager.keys = keys_of(
            key(HONEST, id="key-honest", requests_per_minute=200_000, tokens_per_minute=10**11, max_concurrency=100),
            key(BAD, id="key-bad", requests_per_minute=200_000, tokens_per_minute=10**11, max_concurrency=BAD_AT_ONCE),
        )
        manager.first = snapshot_of(*entries, moving[0])
        home = Home(folder)
        await stack.enter_async_context(serving(manager, path=home.control_socket))
        log = stack.enter_context((folder / "gateway.log").open("wb"))
        running = await stack.enter_async_context(started(folder, log, **ENVIRONMENT))
        shared = SharedInflight(stack.enter_context(joined(home.shared_memory())))
        routes = [route for each in (*entries, *moving) for route in each.routes]
        rows = [shared.take(f"{route.worker_id}/{route.instance}/{route.port}") for route in routes]
        changing = asyncio.create_task(change(manager, moving))
        yield World(running, home.admin_key(), busy, flood, [row for row in rows if row is not None])
        changing.cancel()


def on_its_way(alias: str) -> ModelEntry:
    why = Unavailable(code="model_not_ready", message="It is starting.", retry_after=1.0, on_its_way=True)
    return ModelEntry(alias=alias, created=1, unavailable=why)


def closed_port() -> Endpoint:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return Endpoint("127.0.0.1", sock.getsockname()[1])


async def change(manager: Manager, moving: Sequence[ModelEntry]) -> None:
    """A model that has its only instance now here, now there, and now none."""
    sequence = 1
    while True:
        await asyncio.sleep(0.1)
        sequence += 1
        update = moving[sequence % len(moving)]
        manager.say(Delta(epoch="e1", sequence=sequence, changed={update.alias: update}))


# What a round consists of


async def leaving_at_every_byte(world: World) -> None:
    """Each request broken off behind each of its bytes, in each way."""
    small = [raw for raw in (*abuse.REQUESTS, *abuse.WEBSOCKET_REQUESTS, *abuse.WAITING_REQUESTS) if len(raw) < 1000]
    small = [keyed(raw, BAD) for raw in small]
    small.append(keyed(chat("good"), HONEST) + keyed(chat("bad", stream=True), BAD) + keyed(chat("good"), HONEST))
    jobs = [
        partial(abuse.leave_within, world.gateway, raw, at, how)
        for raw in small
        for at in range(len(raw) + 1)
        for how in Leave
    ]
    world.seen["clients that left within a request"] += len(jobs)
    await abuse.at_once(jobs)


async def leaving_while_waiting(world: World, rng: random.Random) -> None:
    """Behind any number of comments that a stream gets meanwhile, and any number of milliseconds."""
    stream, plain = (keyed(raw, BAD) for raw in (abuse.WAITING_REQUESTS[1], abuse.WAITING_REQUESTS[0]))
    jobs = [partial(abuse.leave_within_answer, world.gateway, stream, at, how) for at in range(250) for how in Leave]
    jobs += [
        partial(abuse.leave_after, world.gateway, raw, rng.random() * 0.3, how)
        for raw in (stream, plain)
        for _ in range(100)
        for how in Leave
    ]
    world.seen["clients that left the waiting room"] += len(jobs)
    await abuse.at_once(jobs)

    async def stay() -> None:
        assert (await ask(world, plain)).status == 503
        world.seen["clients that waited in vain"] += 1

    await abuse.at_once([stay] * 50)


async def leaving_at_every_byte_of_the_answer(world: World) -> None:
    jobs = []
    for name, raw in ANSWERS.items():
        for stop, ats in ((Stop.GO_ON, range(len(raw) + 1)), (Stop.LATE, range(0, len(raw), 20))):
            for at in ats:
                asked = keyed(chat("scripted", headers=abuse.script(name, at, stop)), BAD)
                jobs += [partial(abuse.leave_within_answer, world.gateway, asked, at, how) for how in Leave]
    world.seen["clients that left within an answer"] += len(jobs)
    await abuse.at_once(jobs)


async def breaking_at_every_byte(world: World) -> None:
    """Each answer broken off behind each of its bytes, in each way: it never looks whole."""

    async def one(name: str, at: int, stop: Stop) -> None:
        told = await abuse.outcome(world.gateway, keyed(chat("scripted", headers=abuse.script(name, at, stop)), BAD))
        whole = stop in (Stop.GO_ON, Stop.LATE)
        # What garbage makes of the rest of an answer that has a length cannot be told from an answer.
        assert stop is Stop.GARBAGE or (told == "whole") == whole, (name, at, stop, told)
        world.seen[f"engine: {stop.value}, client: {told}"] += 1

    await abuse.at_once(
        [partial(one, name, at, stop) for name, raw in ANSWERS.items() for at in range(len(raw)) for stop in Stop]
    )


async def misbehaving(world: World, rng: random.Random) -> None:
    answers: Counter[str] = Counter()
    requests = [keyed(raw, BAD) for raw in (*abuse.REQUESTS, *abuse.WEBSOCKET_REQUESTS, *abuse.WAITING_REQUESTS)]
    await abuse.at_once([partial(abuse.misbehave, world.gateway, requests, rng, answers)] * RANDOM_CLIENTS)
    world.seen["clients that misbehaved at random"] += RANDOM_CLIENTS
    world.seen.update({f"their answers: {status}": count for status, count in answers.items()})
    assert not answers["500"]


@asynccontextmanager
async def reading_slowly(world: World) -> AsyncIterator[None]:
    """Clients that take a byte a second: the engines are soon told to wait, and little is kept for each meanwhile.

    Half of them leave. The others are sent away when they have read nothing to speak of for a minute.
    """
    before = world.memory
    socks = [await slow_reader(world.gateway.endpoint) for _ in range(SLOW_READERS)]
    reading = [asyncio.create_task(read_a_byte_a_second(sock)) for sock in socks]
    taken = await settled(world.flood)
    growth = (world.memory - before) / SLOW_READERS
    print(
        f"{SLOW_READERS} slow readers: {growth / 1e3:.0f} KB of the gateway's memory for each; "
        f"each engine got rid of {max(taken.values()) / 1e6:.1f} MB at most, and waits"
    )
    assert len(taken) == SLOW_READERS
    assert growth < GROWTH_PER_STREAM
    await asyncio.sleep(STILL_S)
    assert world.flood.taken == taken, "the engines send on, though nobody reads"
    yield
    for number in range(0, SLOW_READERS, 2):
        reading[number].cancel()
        socks[number].close()
    async with asyncio.timeout(70):
        while world.flood.taken:
            await asyncio.sleep(0.1)
    for number in range(1, SLOW_READERS, 2):
        reading[number].cancel()
        socks[number].close()
    world.seen["slow readers"] += SLOW_READERS


async def settled(flood: Flood) -> dict[asyncio.StreamWriter, int]:
    """What each engine got rid of, once it can get rid of no more."""
    async with asyncio.timeout(60):
        while True:
            taken = dict(flood.taken)
            await asyncio.sleep(2)
            if taken and flood.taken == taken:
                return taken


async def slow_reader(endpoint: Endpoint) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, endpoint)
    await loop.sock_sendall(sock, keyed(chat("flood", stream=True), BAD))
    return sock


async def read_a_byte_a_second(sock: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(sock, 1):
        await asyncio.sleep(1)


async def sending_slowly(world: World) -> None:
    """A byte a second of a head or of a body: 408, and nothing that stays."""
    raw = keyed(request("POST", "/v1/completions", b"x" * 100), BAD)
    whole_head = raw.index(b"\r\n\r\n") + 4

    async def one(number: int) -> None:
        at = whole_head if number % 2 else 1
        async with abuse.connected(world.gateway) as client, asyncio.timeout(60):
            client.send(raw[:at])
            answer = asyncio.create_task(client.answer())
            while not (await asyncio.wait([answer], timeout=1))[0]:
                client.send(raw[at : at + 1])
                at += 1
            assert ((await answer).status, (await answer).code) == (408, "request_timeout")
            world.seen["slow senders answered 408"] += 1

    await asyncio.gather(*map(one, range(SLOW_SENDERS)))


async def ask(world: World, raw: bytes) -> Answer:
    async with abuse.connected(world.gateway) as client:
        return await client.ask(raw)


async def one_round(world: World, seed: int) -> None:
    rng, enough = random.Random(seed), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        honest = {
            model: tasks.create_task(abuse.behave(world.gateway, model, HONEST, enough, random.Random(seed)))
            for model in ("good", "brittle", "moving")
        }
        async with reading_slowly(world), asyncio.TaskGroup() as bad:
            bad.create_task(sending_slowly(world))
            await leaving_at_every_byte(world)
            await leaving_while_waiting(world, rng)
            await leaving_at_every_byte_of_the_answer(world)
            await breaking_at_every_byte(world)
            await misbehaving(world, rng)
        enough.set()
    for model, task in honest.items():
        world.seen[f"honest answers, {model}"] += task.result()
        assert task.result() > 100, model
    await world.until_idle()


async def every_place_of_the_key_is_free(world: World) -> None:
    """As many requests as the bad clients' key allows at once run, and not one more: nobody kept a place."""
    stalled = keyed(chat("scripted", headers=abuse.script("plain", 0, Stop.STALL)), BAD)
    async with AsyncExitStack() as stack:
        for _ in range(BAD_AT_ONCE):
            (await stack.enter_async_context(abuse.connected(world.gateway))).send(stalled)
        while world.busy.requests < BAD_AT_ONCE:
            await asyncio.sleep(0.01)
        refused = await ask(world, stalled)
        assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    await world.until_idle()


async def rounds(folder: Path) -> None:
    async with world(folder, random.Random(1)) as each:
        await every_place_of_the_key_is_free(each)
        descriptors, sizes = each.descriptors, []
        for seed in range(ROUNDS):
            began = time.monotonic()
            await one_round(each, seed)
            sizes.append(each.memory)
            print(f"round {seed}: {time.monotonic() - began:.0f} s, {sizes[-1] / 1e6:.1f} MB")
        await every_place_of_the_key_is_free(each)
        for name, count in sorted(each.seen.items()):
            print(f"  {count:7} {name}")
        print(f"  {await each.metric('client_disconnects_total'):7.0f} requests whose client left, by the metrics")
        print(f"descriptors {descriptors} → {each.descriptors}")
        assert each.descriptors <= descriptors + 2
        assert sizes[-1] < sizes[0] + GROWTH_MAX
    said = (folder / "gateway.log").read_text()
    assert "Traceback" not in said, said[max(0, said.index("Traceback") - 500) :][:3000]


def test_abuse_of_every_kind_leaves_nothing_and_honest_clients_see_nothing_of_it(tmp_path: Path) -> None:
    print()
    uvloop.run(rounds(tmp_path))
