"""The socket that a gateway process hands on, by whomever it is asked, and whatever becomes of them."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest

from modelpool.gateway.handover import _address, keep_offering, taken_over
from tests.wire import on_uvloop


class Said(logging.Handler):
    """Set once something is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.event.set()


@asynccontextmanager
async def offered() -> AsyncIterator[tuple[socket.socket, asyncio.Event]]:
    """A listening socket, offered by this process, and when that was warned of. An offer that ends fails the test."""
    said, logger = Said(), logging.getLogger(keep_offering.__module__)
    logger.addHandler(said)
    try:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            async with asyncio.TaskGroup() as tasks:
                offering = tasks.create_task(keep_offering(sock))
                yield sock, said.event
                offering.cancel()
    finally:
        logger.removeHandler(said)


async def asking() -> socket.socket:
    """A successor that has asked, and was not heard yet."""
    while True:
        successor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with suppress(ConnectionRefusedError):  # it is not offered yet
            successor.connect(_address(os.getpid()))
            return successor
        successor.close()
        await asyncio.sleep(0)


async def take(sock: socket.socket) -> None:
    """A successor gets it."""
    taken = await asyncio.to_thread(taken_over, os.getpid())
    assert taken is not None
    with taken:
        assert taken.getsockname() == sock.getsockname()


@contextmanager
def no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@on_uvloop
async def test_a_successor_that_dies_while_it_asks_is_no_harm() -> None:
    async with offered() as (sock, warned):
        (await asking()).close()
        await warned.wait()
        await take(sock)


@on_uvloop
async def test_one_that_asks_while_there_are_no_descriptors_gets_it_later() -> None:
    async with offered() as (sock, warned):
        with await asking() as successor:
            with no_more_descriptors():
                await warned.wait()
            successor.settimeout(10)
            _, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, successor, 1, 1)
            with socket.socket(fileno=descriptors[0]) as taken:
                assert taken.getsockname() == sock.getsockname()
