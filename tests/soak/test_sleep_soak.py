"""The residency ladder again and again on a real engine: `make soak`. The figures are kept in docs/soak.md."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from modelpool import demo
from tests.contract.worker_process import running_worker
from tests.e2e.ladder import Ladder, ladder, settled
from tests.e2e.pool import Json, PoolProcess, eventually, running_pool

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

ROUND = ((1,), (2,), (1, 2), (1,))
ROUNDS = 50
DAMAGES = ("ZeroedLayer", "SwappedLayers", "SkippedReload")


@contextmanager
def lone_ladder(home: Path) -> Iterator[Ladder]:
    """The demo on a worker without a manager: nobody but the test puts it to sleep or wakes it."""
    with running_worker(home, True) as worker:
        order = {"alias": demo.ALIAS, "model_name": str(demo.model_path()), "engine_args": demo.engine_args()}
        assert worker.http.post("/instances/start", json={"model": order}).status_code == 200
        worker.wait(demo.ALIAS, "ACTIVE", within=120)
        yield Ladder(demo.ALIAS, worker.http, worker.http, f"/proxy/{demo.ALIAS}/v1/completions")


def test_fifty_rounds_of_the_whole_ladder_are_flat_and_say_the_same(tmp_path: Path) -> None:
    said: Counter[str] = Counter()
    times: dict[int, list[float]] = {0: [], 1: [], 2: []}
    sizes: dict[str, list[float]] = {"awake": [], "level 1": [], "level 2": []}
    with lone_ladder(tmp_path) as ladder_:
        pid = ladder_.status()["pid"]
        for _ in range(ROUNDS):
            for levels in ROUND:
                times[0].append(ladder_.first_token_s())
                for level in levels:
                    change = ladder_.sleep(level)
                    sizes[f"level {level}"].append(change["bytes_after"] / 1e6)
                times[levels[-1]].append(ladder_.first_token_s(wake=True))
                said[ladder_.says()] += 1
            sizes["awake"].append(ladder_.pss() / 1e6)
        assert ladder_.status()["pid"] == pid, "no wake was taken for a damaged one"
    awake = statistics.median(times[0])
    print(
        f"\nladder: {ROUNDS} rounds, {said.total()} wakes; {len(said)} answer; awake: first token {awake * 1e3:.0f} ms"
    )
    for level in (1, 2):
        more = sorted(each - awake for each in times[level])
        print(
            f"from level {level} to the first token, more than awake: median {more[len(more) // 2] * 1e3:.0f} ms, "
            f"p95 {more[int(len(more) * 0.95)] * 1e3:.0f} ms, worst {more[-1] * 1e3:.0f} ms"
        )
        assert more[len(more) // 2] < (0.5, 1.5)[level - 1]
    for what, series in sizes.items():
        early, late = statistics.median(series[2:12]), statistics.median(series[-10:])
        print(f"PSS {what}: {early:.0f} → {late:.0f} MB (from {min(series):.0f} to {max(series):.0f})")
        assert late < early + 20
    assert said.total() == ROUNDS * len(ROUND) == 200
    assert len(said) == 1


class Asking:
    """A client that asks a model without pause, until stopped; what it was answered, by text, status or error."""

    def __init__(self, pool: PoolProcess, alias: str) -> None:
        self.seen: Counter[str] = Counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pool, alias))
        self._thread.start()

    def _run(self, pool: PoolProcess, alias: str) -> None:
        body = {"model": alias, "prompt": "Model Pool", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        with httpx.Client(base_url=pool.url, headers=pool.http.headers, trust_env=False, timeout=30) as http:
            while not self._done.is_set():
                answer = http.post("/v1/completions", json=body)
                text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else str(answer.status_code)
                self.seen[text] += 1

    def stop(self) -> Counter[str]:
        self._done.set()
        self._thread.join()
        return self.seen


def test_every_damaged_wake_is_found_before_a_client_sees_it_and_the_instance_is_started_again(tmp_path: Path) -> None:
    rounds, back = 7, []
    with running_pool(tmp_path, MODELPOOL_BACKOFF_MAX="1") as pool:
        pool.wait_active("demo")
        with ladder(pool, "demo") as sound:
            right = sound.says()
        for damage in DAMAGES:
            extension = {"worker_extension_cls": f"modelpool.testing.broken_wakes.{damage}"}
            pool.register(damage, model_name=str(demo.model_path()), engine_args={**demo.engine_args(), **extension})
            pool.wait_active(damage)
            with ladder(pool, damage) as broken:
                for _ in range(rounds):
                    settled(pool, damage)
                    back.append(_damaged(pool, broken, right))
            pool.remove(damage)
    print(
        f"\ndamaged wakes: {len(back)} of {rounds * len(DAMAGES)} found; from the order to wake until a new start "
        f"answered: median {statistics.median(back):.1f} s, slowest {max(back):.1f} s"
    )
    assert len(back) == rounds * len(DAMAGES) == 21


def _damaged(pool: PoolProcess, broken: Ladder, right: str) -> float:
    """A wake that goes wrong; how long it took until the model answered again."""
    failed = broken.report()["pid"]
    broken.sleep(2)
    asking = Asking(pool, broken.alias)
    begin = time.monotonic()
    # The clients have it woken; an order of ours comes to the same.
    broken.order_wake()

    def started_again() -> Json | None:
        report = broken.report()
        return report if report.get("state") == "ACTIVE" and report["pid"] != failed else None

    eventually(started_again, 60, lambda: f"another process: {broken.report()}")
    assert broken.says() == right
    taken = time.monotonic() - begin
    assert set(asking.stop()) <= {right, "503"}
    log = broken.worker.get(f"/instances/{broken.alias}/logs?tail=5000").text
    assert "wrong after waking from level 2: the model is not what it was" in log
    return taken


def test_fifty_clients_of_a_cold_model_cause_one_start(tmp_path: Path) -> None:
    """As users ask, with the SDK as it comes."""
    hurried = {"MODEL_IDLE_SLEEP_1": "2", "MODEL_IDLE_SLEEP_2": "4", "MODEL_IDLE_UNLOAD": "6"}
    question = demo.answers()[0].question
    with running_pool(tmp_path, **hurried) as pool:
        pool.wait_active("demo")
        log = pool.home / "logs" / "worker.log"
        times = []
        for _ in range(5):
            eventually(lambda: pool.model("demo")["state"] == "UNLOADED", 60, lambda: str(pool.model("demo")))
            before = log.read_text().count("starts, engine")
            begin = time.monotonic()
            with ThreadPoolExecutor(50) as clients:
                said = set(clients.map(lambda _: _chat(pool, question), range(50)))
            times.append(time.monotonic() - begin)
            assert said == {demo.answer_to(question)}
            assert log.read_text().count("starts, engine") == before + 1
    print(f"\n50 clients of an UNLOADED model: one start; all answered after {statistics.median(times):.1f} s (median)")


def _chat(pool: PoolProcess, question: str) -> str | None:
    with pool.sdk() as client:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": question}], temperature=0
        )
    return answer.choices[0].message.content
