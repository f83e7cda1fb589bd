"""Heartbeats that go to the actor together."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from modelpool.cluster.remote import RayManager
from modelpool.messages.cluster import Answer
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
