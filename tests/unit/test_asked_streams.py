"""Streams whose reader asks for item by item, as over Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from modelpool.cluster.streams import Streams
from modelpool.errors import InstanceNotFound
from modelpool.messages.cluster import Answer, End, Refusal


async def _items(*items: object, then: Exception | None = None) -> AsyncIterator[object]:
    for item in items:
        yield item
    if then is not None:
        raise then


def test_a_stream_that_fails_is_refused_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(tasks)
            assert isinstance(await streams.next("whole", lambda: _items(1)), Answer)
            refused = await streams.next("refused", lambda: _items(then=InstanceNotFound("There is none.")))
            assert isinstance(refused, Refusal)
            assert (refused.status, refused.message) == (404, "There is none.")
            assert isinstance(await streams.next("broken", lambda: _items(1, then=ValueError("no port"))), Answer)
            broken = await streams.next("broken", _items)
            assert isinstance(broken, Refusal)
            assert (broken.status, broken.code) == (500, "internal_error")
            assert "no port" in caplog.text
            assert isinstance(await streams.next("whole", _items), End)

    asyncio.run(asyncio.wait_for(story(), 30))
