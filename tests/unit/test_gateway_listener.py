"""The listener's one timer."""

from __future__ import annotations

import asyncio

from modelpool.errors import PoolError
from modelpool.gateway.client_limits import Limits
from modelpool.gateway.connection import ClientConnection
from modelpool.gateway.listener import CHECKED, Listener
from modelpool.gateway.request import Request


class Nothing:
    """An application that nobody asks."""

    def admit(self, request: Request) -> None:
        raise AssertionError

    def refused(self, request: Request | None, error: PoolError) -> bytes:
        raise AssertionError

    def upgrades(self, method: bytes, target: bytes) -> bool:
        raise AssertionError

    async def serve(self, request: Request, client: ClientConnection) -> None:
        raise AssertionError


async def turns_of_a_sweep(connections: int) -> tuple[int, int]:
    """How many turns the loop makes while so many connections are looked at, and how many were."""
    checked = 0
    done = asyncio.Event()

    class Checked(ClientConnection):
        def check(self, now: float) -> None:
            nonlocal checked
            checked += 1
            if checked == connections:
                done.set()

    listener, loop = Listener(), asyncio.get_running_loop()
    for _ in range(connections):
        listener.joined(Checked(Nothing(), listener, Limits(body_bytes=1), loop))
    sweep = asyncio.create_task(listener.enforce_deadlines(0.0))
    turns = 0
    while not done.is_set():
        await asyncio.sleep(0)
        turns += 1
    sweep.cancel()
    return turns, checked


def test_deadlines_of_many_connections_are_looked_at_a_few_at_a_time() -> None:
    turns, checked = asyncio.run(turns_of_a_sweep(10 * CHECKED))
    assert checked == 10 * CHECKED
    assert turns >= 10
