"""Clients and engines that misbehave in every way at once: nothing is left of them, and honest clients saw nothing.

The short form; tests/soak has the long one, against a process.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from functools import partial
from typing import Any

from modelpool.gateway.client_limits import Limits
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.hold import Rules
from modelpool.gateway.observe.journey import Journey
from modelpool.gateway.passing import PassThrough
from modelpool.gateway.request import Request
from modelpool.gateway.stay import Stay
from modelpool.messages.routing import ModelEntry, Unavailable
from modelpool.relay import Deadlines, Exchange
from tests import abuse
from tests.abuse import ANSWERS, Leave, Stop
from tests.gateway_world import World, chat, entry, gateway
from tests.wire import on_uvloop, serving

CLIENTS = 2000
AT_ONCE = 50
LIMITS = Limits(body_bytes=abuse.BODY_MAX, head_s=0.5, body_s=0.5, idle_s=1, linger_s=0.2, flush_s=1, check_s=0.05)
DEADLINES = Deadlines(first_byte_s=0.5, between_bytes_s=0.5)
RULES = Rules(max_ongoing=10_000, max_wait_s=0.2, heartbeat_s=0.02)
COMING = ModelEntry(
    alias="coming",
    created=1,
    unavailable=Unavailable(code="model_not_ready", message="It starts.", retry_after=1, on_its_way=True),
)


def left() -> Counter[str]:
    """What a request is made of, as far as it is still there."""
    gc.collect()
    kinds = (ClientConnection, Exchange, Journey, PassThrough, Request, Stay)
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)


async def until_left(world: World) -> None:
    async with asyncio.timeout(10):
        while world.listener.connections:
            await asyncio.sleep(0.01)
    await world.until_idle()


@on_uvloop
async def test_after_abuse_of_every_kind_nothing_is_left_and_no_honest_request_failed() -> None:
    before, rng, seen, told = left(), random.Random(7), Counter[str](), list[dict[str, Any]]()
    enough, few = asyncio.Event(), asyncio.Semaphore(AT_ONCE)
    requests = (*abuse.REQUESTS, *abuse.WEBSOCKET_REQUESTS, *abuse.WAITING_REQUESTS)
    bad = abuse.until_left(abuse.bad_engine(rng))

    async def one() -> None:
        async with few:
            await abuse.misbehave(world, requests, rng, seen)

    async with serving(bad) as first, serving(bad) as second, serving(abuse.honest_engine(abuse.Busy())) as good:
        models = entry("bad", [first, second]), entry("good", [good]), COMING
        async with gateway(*models, limits=LIMITS, rules=RULES, deadlines=DEADLINES) as world:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
            honest = asyncio.create_task(abuse.behave(world, "good", "", enough, rng))
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(one())
            enough.set()
            assert await honest > 10
            await until_left(world)
    print(dict(seen))
    assert told == []
    assert {"200", "400", "404", "413", "502", "503"} <= set(seen)
    assert "500" not in seen
    assert left() == before


@on_uvloop
async def test_clients_that_leave_at_every_byte_leave_nothing() -> None:
    before, busy = left(), abuse.Busy()
    async with serving(abuse.until_left(abuse.ScriptedEngine(busy, late_s=0.02))) as engine:
        async with gateway(entry("scripted", [engine]), COMING, limits=LIMITS, rules=RULES) as world:
            asked = chat("scripted", headers=abuse.script("events", 30, Stop.GO_ON))
            waiting = chat("coming", stream=True)
            jobs = [partial(abuse.leave_within, world, asked, at, how) for at in range(len(asked) + 1) for how in Leave]
            jobs += [
                partial(abuse.leave_within_answer, world, raw, at, how)
                for raw in (asked, waiting)
                for at in range(len(ANSWERS["events"]) + 1)
                for how in Leave
            ]
            await abuse.at_once(jobs, AT_ONCE)
            await until_left(world)
            assert busy.requests == 0
    assert left() == before


@on_uvloop
async def test_an_answer_that_breaks_at_any_byte_never_looks_whole() -> None:
    seen: Counter[str] = Counter()

    async def one(name: str, at: int, stop: Stop) -> None:
        told = await abuse.outcome(world, chat("scripted", headers=abuse.script(name, at, stop)))
        assert (told == "whole") == (stop is Stop.GO_ON), (name, at, stop, told)
        seen[told] += 1

    async with serving(abuse.until_left(abuse.ScriptedEngine(abuse.Busy()))) as engine:
        async with gateway(entry("scripted", [engine]), limits=LIMITS, deadlines=DEADLINES) as world:
            stops = (Stop.CLOSE, Stop.RESET, Stop.GO_ON)
            await abuse.at_once(
                [
                    partial(one, name, at, stop)
                    for name in ANSWERS
                    for at in range(len(ANSWERS[name]))
                    for stop in stops
                ],
                AT_ONCE,
            )
    print(dict(seen))
    assert {"whole", "broken off", "error event", "502 upstream_failed"} == set(seen)
