"""What takes too long for every run: `make soak`. Each test prints the figures that docs/soak.md keeps."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
import pytest

from modelpool.testing.tiny_models import make_text_model
from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import PoolProcess, eventually, running_pool

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]

ASK = {"messages": [{"role": "user", "content": "hi"}]}
PARTS = ["host a", "host b", "forkserver", "worker", "manager", "gateway"]
GROWTH_MAX = {
    "modelpool: gateway": 40e6,
    "modelpool: manager": 40e6,
    "modelpool: worker": 40e6,
    "modelpool: forkserver": 40e6,
}


class Clients:
    """Requests to one model, one after the other, until stopped; counts what came back, by status or error."""

    def __init__(self, pool: PoolProcess, alias: str) -> None:
        self.seen: Counter[str] = Counter()
        self._pool = pool
        self._alias = alias
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with httpx.Client(base_url=self._pool.url, headers=self._pool.http.headers, trust_env=False) as http:
            while not self._done.is_set():
                try:
                    answer = http.post("/v1/chat/completions", json={"model": self._alias, **ASK}, timeout=30)
                    self.seen[str(answer.status_code)] += 1
                except httpx.HTTPError as error:
                    self.seen[type(error).__name__] += 1
                self._done.wait(0.01)

    def stop(self) -> Counter[str]:
        self._done.set()
        self._thread.join()
        return self.seen


def pss(pool: PoolProcess) -> dict[str, float]:
    """Bytes of each of the pool's own processes, by title."""
    sizes: dict[str, float] = {}
    for title in GROWTH_MAX:
        for process in pool.processes(title):
            sizes[title] = sizes.get(title, 0.0) + process.memory_full_info().uss
    return sizes


def test_a_storm_of_deaths_leaves_a_pool_that_serves(tmp_path: Path) -> None:
    rounds, chance = 60, random.Random(7)
    killed: Counter[str] = Counter()
    slowest = 0.0
    with running_pool(tmp_path, "--no-demo", **FAKE_ONLY) as pool:
        for alias in ("a", "b"):
            pool.register(alias, fake=True)
            pool.wait_active(alias)
        clients = {alias: Clients(pool, alias) for alias in ("a", "b")}
        for _ in range(rounds):
            part, stopped = chance.choice(PARTS), chance.random() < 0.5
            victim = pool.one(f"modelpool: {part}")
            if stopped:
                victim.send_signal(signal.SIGSTOP)
                time.sleep(chance.random())
            victim.kill()
            killed[part] += 1
            time.sleep(chance.random())
            begin = time.monotonic()
            for alias in ("a", "b"):
                pool.wait_active(alias, within=60)
            slowest = max(slowest, time.monotonic() - begin)
        seen = {alias: dict(client.stop()) for alias, client in clients.items()}
        for alias in ("a", "b"):
            assert pool.http.post("/v1/chat/completions", json={"model": alias, **ASK}).status_code == 200
        assert len(pool.processes("modelpool: host")) == 2
    print(f"\nstorm: {rounds} deaths {dict(killed)}; slowest return {slowest:.1f} s; answers {seen}")
    assert all(counts.get("200", 0) > 200 for counts in seen.values())


def test_models_that_come_and_go_leave_no_memory_and_no_descriptors_behind(tmp_path: Path) -> None:
    with running_pool(tmp_path, "--no-demo", **FAKE_ONLY) as pool:

        def rounds(number: int) -> None:
            for index in range(number):
                alias = f"model-{index % 7}"
                pool.register(alias, fake=True)
                pool.wait_active(alias)
                assert pool.http.post("/v1/chat/completions", json={"model": alias, **ASK}).status_code == 200
                pool.remove(alias)
                eventually(lambda: not pool.processes("modelpool: host"), 30, lambda: "its process has ended")

        def descriptors() -> dict[str, int]:
            return {title: sum(each.num_fds() for each in pool.processes(title)) for title in GROWTH_MAX}

        rounds(30)
        memory, fds = pss(pool), descriptors()
        rounds(200)
        after, fds_after = pss(pool), descriptors()
    growth = {title: round((after[title] - memory[title]) / 1e6, 1) for title in GROWTH_MAX}
    print(f"\nchurn: 200 models; growth in MB {growth}; descriptors {fds} → {fds_after}")
    assert all(growth[title] * 1e6 < GROWTH_MAX[title] for title in GROWTH_MAX), growth
    assert all(fds_after[title] <= fds[title] + 8 for title in GROWTH_MAX), (fds, fds_after)


def test_fifty_starts_and_stops_of_a_real_engine_are_flat(tmp_path: Path) -> None:
    model = str(make_text_model(tmp_path / "text"))
    small = {"enforce_eager": True, "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20}
    starts, sizes, answers = [], [], set()
    with running_pool(tmp_path / "home", "--no-demo") as pool:
        eventually(
            lambda: pool.status()["workers"][0]["engines"]["vllm"]["state"] == "ready", 120, lambda: "imports done"
        )
        memory = []
        for _ in range(50):
            begin = time.monotonic()
            pool.register("m", model_name=model, engine_args=small)
            pool.wait_active("m")
            starts.append(time.monotonic() - begin)
            body = {"model": "m", "prompt": "x", "max_tokens": 8, "temperature": 0}
            answers.add(pool.http.post("/v1/completions", json=body).json()["choices"][0]["text"])
            with pool.worker_http() as worker:
                sizes.append(worker.get("/instances/m/status").json()["memory_bytes"])
            pool.remove("m")
            eventually(lambda: not pool.processes("modelpool: host"), 30, lambda: "its process has ended")
            assert not pool.processes("VLLM")
            memory.append(sum(pss(pool).values()))
    starts.sort()
    print(
        f"\nreal engine: 50 starts, median {starts[25]:.1f} s, slowest {starts[-1]:.1f} s; PSS {min(sizes) / 1e6:.0f} "
        f"to {max(sizes) / 1e6:.0f} MB; the pool's own memory {memory[5] / 1e6:.0f} → {memory[-1] / 1e6:.0f} MB"
    )
    assert len(answers) == 1
    assert max(sizes[25:]) < max(sizes[:25]) * 1.1
    assert memory[-1] < memory[5] + 60e6


def test_no_process_of_a_finished_soak_is_left() -> None:
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MODELPOOL_RUN_ID", "").startswith("test-"):
                left.append(process)
        except psutil.Error:
            continue
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []
