"""A request whose client left is out of a real engine within a second: while it streams, works, or waits its turn.

What is asked is the engine itself: its scheduler's counts, and whether a request that waits for a slot gets it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import msgspec
import pytest

from modelpool import demo
from tests.e2e.pool import PoolProcess, eventually
from tests.promised import promised

SLOTS = 2
FREED_S = 1.0
TOKENS = 12_000
"""More than any of these tests has time for. That the demo was taught no texts of this length is all the same here."""


@pytest.fixture(scope="module")
def narrow(demo_pool: PoolProcess) -> Iterator[PoolProcess]:
    """The demo model once more, on an engine with two slots, which is sent more than that."""
    overrides = {"max_position_embeddings": TOKENS + 100}
    arguments = {**demo.engine_args(), "max_num_seqs": SLOTS, "hf_overrides": overrides}
    body = {"model_name": str(demo.model_path()), "max_model_len": TOKENS + 100, "engine_args": arguments}
    demo_pool.register("narrow", **body, capacity=8, max_replicas=1)  # another one would take the load
    demo_pool.wait_active("narrow", within=60)
    yield demo_pool
    demo_pool.remove("narrow")
    eventually(lambda: not demo_pool.processes("modelpool: host narrow"), 40, lambda: "its process has ended")


class Engine:
    """What the engine says of itself."""

    def __init__(self, worker: httpx.Client) -> None:
        self._worker = worker

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait for a slot."""
        status = self._worker.get("/instances/narrow/status").json()
        return status["running"], status["waiting"]

    def reaches(self, running: int, waiting: int, within: float) -> None:
        expected = (running, waiting)
        eventually(lambda: self.load == expected, within, lambda: f"{expected}, but the engine has {self.load}")


@pytest.fixture
def engine(narrow: PoolProcess) -> Iterator[Engine]:
    with narrow.worker_http() as worker:
        engine = Engine(worker)
        engine.reaches(0, 0, 10)
        yield engine
        engine.reaches(0, 0, FREED_S)


@contextmanager
def asked(pool: PoolProcess, *, stream: bool, tokens: int = TOKENS) -> Iterator[socket.socket]:
    """A request on a connection of its own, which is closed at the end of the block, whatever became of it."""
    url = httpx.URL(pool.url)
    body = msgspec.json.encode(
        {"model": "narrow", "prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: {pool.http.headers['authorization']}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        yield connection


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_a_request_that_runs(narrow: PoolProcess, engine: Engine, stream: bool) -> None:
    # Beside another one, since a scheduler without work says nothing new.
    with asked(narrow, stream=True):
        with asked(narrow, stream=stream) as leaving:
            engine.reaches(SLOTS, 0, 30)
            if stream:
                assert leaving.recv(1 << 16).startswith(b"HTTP/1.1 200")
        engine.reaches(SLOTS - 1, 0, FREED_S)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_a_request_that_waits_for_a_slot_in_the_engine(narrow: PoolProcess, engine: Engine, stream: bool) -> None:
    with asked(narrow, stream=True), asked(narrow, stream=False):
        engine.reaches(SLOTS, 0, 30)
        with asked(narrow, stream=stream):
            engine.reaches(SLOTS, 1, 30)
        engine.reaches(SLOTS, 0, FREED_S)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_the_slot_goes_to_who_waits_for_it(narrow: PoolProcess, engine: Engine, stream: bool) -> None:
    with ExitStack() as staying:
        staying.enter_context(asked(narrow, stream=True))
        with asked(narrow, stream=stream):
            engine.reaches(SLOTS, 0, 30)
            waiting = staying.enter_context(asked(narrow, stream=True, tokens=4))
            engine.reaches(SLOTS, 1, 30)
        left = time.monotonic()
        # Its answer begins with its first token, for which it needs the slot.
        assert waiting.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - left < promised(FREED_S)
        engine.reaches(SLOTS - 1, 0, FREED_S)
