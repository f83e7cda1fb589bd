"""The manager as a gateway's replica sees it, where its actor fails or makes way."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest

from modelpool.cluster.remote import RayManager
from modelpool.cluster.streams import refusal
from modelpool.errors import ManagerAway
from modelpool.manager.api import control_app
from modelpool.messages.cluster import Answer, Item
from modelpool.messages.routing import Snapshot
from modelpool.messages.workers import Heartbeat, HeartbeatAnswer

BEAT = Heartbeat(incarnation="i", devices=(), engines={})
ANSWER = HeartbeatAnswer(gateways=("http://g",), epoch="e.1")


def test_after_a_batch_that_failed_in_a_way_that_nobody_foresaw_the_next_ones_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[int] = []

    async def ask_all(method: str, calls: list[bytes]) -> list[Any]:
        batches.append(len(calls))
        reply = msgspec.json.encode(Answer(msgspec.Raw(msgspec.json.encode(ANSWER))))
        match len(batches):
            case 1:
                raise RuntimeError("Ray was shut down.")
            case 2:
                return [reply]
            case _:
                return [reply] * len(calls)

    async def story() -> None:
        manager = RayManager()
        monkeypatch.setattr(manager, "_call", ask_all)
        async with asyncio.timeout(60):
            with pytest.raises(RuntimeError, match="Ray was shut down"):
                await manager.heartbeat("w1", BEAT)
            first, second = await asyncio.gather(
                *(manager.heartbeat(each, BEAT) for each in "ab"), return_exceptions=True
            )
            assert first == ANSWER
            assert isinstance(second, ValueError), "an answer was missing"
            assert await asyncio.gather(*(manager.heartbeat(each, BEAT) for each in "abc")) == [ANSWER] * 3

    asyncio.run(story())
    assert batches == [1, 2, 3]


def test_a_stream_whose_manager_makes_way_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = msgspec.json.encode(Snapshot(epoch="e.1", sequence=1, models={}))
    items: list[Item] = [Answer(msgspec.Raw(snapshot)), refusal(ManagerAway("Another takes its place."))]

    async def call(method: str, *_: object) -> Any:
        return msgspec.json.encode(items.pop(0)) if method == "next" else None

    async def story() -> None:
        manager = RayManager()
        monkeypatch.setattr(manager, "_call", call)
        transport = httpx.ASGITransport(app=control_app(manager))
        async with httpx.AsyncClient(transport=transport, base_url="http://manager") as http:
            answer = await http.get("/snapshots")
        assert answer.status_code == 200
        assert answer.content == snapshot + b"\n"

    asyncio.run(story())
