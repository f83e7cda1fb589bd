"""More real models than memory, asked for in any order: `make soak`. The figures are kept in docs/soak.md."""

from __future__ import annotations

import math
import random
import re
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelpool.settings import ModelSettings
from modelpool.testing.tiny_models import make_text_model
from modelpool.worker.memory import tree_bytes
from tests.e2e.pool import PoolProcess, running_pool
from tests.swaps import first_come_first_served

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

MODELS, PLACES, REQUESTS, CLIENTS = 8, 2, 200, 8
NEEDS_GB = 0.8
LIMIT_GB = PLACES * NEEDS_GB + 0.1
TURN_MAX_S = ModelSettings().turn_max_s
END_S = 10.0
"""An engine's end, and the requests that it still has."""
SMALL = {"enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}


class Samples:
    """What the pool's engines hold, looked at again and again: what was promised to them, and their PSS. In bytes."""

    def __init__(self, pool: PoolProcess) -> None:
        self.ledger: list[int] = []
        self.pss: list[int] = []
        self._pool = pool
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.2):
            self.ledger += self._pool.status()["workers"][0]["set_aside_bytes"]
            self.pss.append(sum(tree_bytes(each.pid) for each in self._pool.processes("modelpool: host")))

    @contextmanager
    def taken(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()


def test_eight_real_models_in_memory_for_two(tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(MODELS)]
    trace = [name for name in names for _ in range(REQUESTS // MODELS)]
    random.Random(4).shuffle(trace)
    todo = iter(trace)
    asked: list[str] = []
    waits: list[float] = []
    turn = threading.Lock()
    with running_pool(tmp_path / "home", "--no-demo", MODELPOOL_FAKE_DEVICES=f"1x{LIMIT_GB}") as pool:
        for number, name in enumerate(names):
            folder = make_text_model(tmp_path / name, seed=number)
            pool.register(name, model_name=str(folder), gpu_memory_gb=NEEDS_GB, engine_args=SMALL, max_replicas=1)
        said = {name: says(pool, name) for name in names}
        assert len(set(said.values())) == MODELS

        def client(_: int) -> int:
            """Asks for the next of the trace as soon as the one before was answered."""
            right = 0
            while True:
                with turn:
                    if (name := next(todo, None)) is None:
                        return right
                    asked.append(name)
                begun = time.monotonic()
                right += says(pool, name) == said[name]
                waits.append(time.monotonic() - begun)

        before = brought_up(pool)
        samples = Samples(pool)
        begun = time.monotonic()
        with samples.taken(), ThreadPoolExecutor(CLIENTS) as clients:
            right = sum(clients.map(client, range(CLIENTS)))
        taken = time.monotonic() - begun
        swaps = brought_up(pool) - before
        bound = bound_s(pool)
    fcfs = first_come_first_served(asked, PLACES)
    waits.sort()
    print(
        f"\n{MODELS} models, memory for {PLACES}: {right} of {REQUESTS} requests answered right in {taken:.0f} s; "
        f"{swaps} swaps, first come first served {fcfs}; waits: median {statistics.median(waits):.1f} s, "
        f"p95 {waits[int(len(waits) * 0.95)]:.1f} s, longest {waits[-1]:.1f} s of {bound:.0f} s; "
        f"promised {max(samples.ledger) / 1e9:.2f} GB at most, PSS {max(samples.pss) / 1e9:.2f} GB, of {LIMIT_GB:.1f}"
    )
    assert right == REQUESTS
    assert swaps <= fcfs / 2
    assert waits[-1] <= bound
    assert PLACES * NEEDS_GB * 1e9 <= max(samples.ledger) <= LIMIT_GB * 1e9
    assert max(samples.pss) <= LIMIT_GB * 1e9


def says(pool: PoolProcess, name: str) -> str:
    """Its greedy answer, asked as any user would."""
    with pool.sdk() as client:
        answer = client.completions.create(model=name, prompt="Model Pool", max_tokens=16, temperature=0)
    return answer.choices[0].text


def bound_s(pool: PoolProcess) -> float:
    """What docs/operations.md says that a request waits at most, with the slowest start that there was."""
    starts = re.findall(r"is ready after ([\d.]+) s", (pool.home / "logs" / "worker.log").read_text())
    swap_s = END_S + max(map(float, starts[PLACES:]))  # the first ones waited for the engine's imports
    return TURN_MAX_S + math.ceil((MODELS - PLACES) / PLACES) * (TURN_MAX_S + swap_s)


def brought_up(pool: PoolProcess) -> int:
    """How many starts and wakes its manager has ordered."""
    log = (pool.home / "logs" / "manager.log").read_text()
    return len(re.findall(r"(?:start|wake) \S+ on w1", log))
