"""A gateway process under seconds of requests from a grammar of wrong ones. `make soak` takes longer."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import uvloop

from modelpool.home import Home
from tests.contract.test_gateway_process import Gateway, started
from tests.gateway_world import ADMIN_KEY, Client, chat, entry, key, keys_of, request, snapshot_of
from tests.http_fuzz import MODEL, StrictEngine, StrictManager, attack_for
from tests.wire import serving

SECONDS = 6.0
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
SEED = int(os.environ.get("MODELPOOL_FUZZ_SEED", "0"))


async def honest(client: Client, enough: asyncio.Event) -> list[float]:
    """One after the other on one connection; how long each took."""
    times = []
    while not enough.is_set():
        began = time.monotonic()
        answer = await client.ask(chat(MODEL, headers=ADMIN))
        assert (answer.status, answer.json["id"]) == (200, answer.request_id)
        times.append(time.monotonic() - began)
        await asyncio.sleep(0.01)
    return times


async def nothing_left(running: Gateway) -> None:
    async with asyncio.timeout(20):
        while True:
            answer = await (await running.connect()).ask(
                request("GET", "/metrics", headers={**ADMIN, "Connection": "close"})
            )
            left = re.findall(
                r"^modelpool_(?:requests_in_flight|requests_waiting){.*} (\S+)$", answer.body.decode(), re.MULTILINE
            )
            if not any(map(float, left)):
                return
            await asyncio.sleep(0.1)


async def fuzz(folder: Path, seconds: float, seed: int, *, keys: bool) -> Counter[str]:
    """What was answered, and how often."""
    home = Home(folder)
    (folder / "admin-key").write_text(ADMIN_KEY)
    made = [key("x", requests_per_minute=10_000, tokens_per_minute=10**6, max_concurrency=20)] if keys else []
    engine = StrictEngine()
    async with AsyncExitStack() as stack:
        endpoints = [await stack.enter_async_context(serving(engine)) for _ in range(2)]
        manager = StrictManager(keys_of(*made), snapshot_of(entry(MODEL, endpoints)))
        await stack.enter_async_context(serving(manager, path=home.control_socket))
        log = stack.enter_context((folder / "gateway.log").open("wb"))
        environment = {"MODELPOOL_TOKEN": "the-cluster-token", "MODELPOOL_MAX_BODY_BYTES": "100000"}
        running = await stack.enter_async_context(started(folder, log, **environment))
        enough = asyncio.Event()
        client = await running.connect()
        asking = asyncio.create_task(honest(client, enough))
        try:
            seen = await attack_for(running.endpoint, seed, seconds, key=b"x" if keys else b"")
        finally:
            enough.set()
        times = sorted(await asking)
        await nothing_left(running)
    assert engine.wrong == manager.wrong == []
    said = (folder / "gateway.log").read_text()
    assert "Traceback" not in said, said[max(0, said.index("Traceback") - 500) :][:3000]
    seen["that reached an engine"], seen["that reached the manager"] = engine.asked, manager.asked
    print(f"\n{len(times)} honest requests meanwhile, the slowest took {times[-1] * 1000:.0f} ms")
    return seen


@pytest.mark.parametrize("keys", [False, True], ids=["open", "with keys"])
def test_wrong_requests_get_right_answers(tmp_path: Path, keys: bool) -> None:
    seen = uvloop.run(fuzz(tmp_path, SECONDS / 2, SEED, keys=keys))
    print(dict(seen))
    assert {"200", "400 invalid_http", "404 route_not_found", "404 model_not_found", "101"} <= set(seen)
