"""Models that nobody asks for step down, requests bring them back, and those that need room take turns."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import PoolProcess, eventually, running_pool

HURRIED = {
    "MODEL_IDLE_SLEEP_1": "1.5",
    "MODEL_IDLE_SLEEP_2": "3",
    "MODEL_IDLE_UNLOAD": "4.5",
    "MODEL_MIN_RESIDENCE": "1",
    "MODEL_COOLDOWN": "1",
    "MODEL_SCALE_INTERVAL": "1",
}


@pytest.fixture(scope="module")
def idle_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    with running_pool(tmp_path_factory.mktemp("idle"), "--no-demo", **FAKE_ONLY, **HURRIED) as pool:
        yield pool


@pytest.fixture(scope="module")
def tight_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    """One device of 10 GB, for models of 6."""
    short = {"MODEL_MIN_RESIDENCE": "0.5", "MODEL_TURN_MAX": "1", "MODEL_SWAPS_PER_MINUTE": "1000"}
    home = tmp_path_factory.mktemp("tight")
    with running_pool(home, "--no-demo", **FAKE_ONLY, **short, MODELPOOL_FAKE_DEVICES="1x10") as pool:
        yield pool


def ask(pool: PoolProcess, alias: str) -> int:
    return pool.http.post("/v1/completions", json={"model": alias, "prompt": "x"}, timeout=60).status_code


def starts(pool: PoolProcess, alias: str) -> int:
    """How often its worker has started an instance of it."""
    return len(re.findall(rf" {alias}(-r\d+)? starts, engine", (pool.home / "logs" / "worker.log").read_text()))


def until(pool: PoolProcess, alias: str, state: str, within: float = 15) -> None:
    eventually(lambda: pool.model(alias)["state"] == state, within, lambda: f"{state}: {pool.model(alias)}")


def test_nobody_asks_and_it_steps_down_and_a_request_brings_it_back(idle_pool: PoolProcess) -> None:
    pool = idle_pool
    pool.register("m", fake=True)
    whole = {"start", "sleep_1", "sleep_2", "unload"}  # all of them were seen
    eventually(lambda: whole <= {each["what"] for each in pool.model("m")["learned"]}, 45, lambda: str(pool.model("m")))
    assert pool.model("m")["state"] == "UNLOADED"
    assert [each["id"] for each in pool.http.get("/v1/models").json()["data"]] == ["m"]
    eventually(lambda: pool.processes("modelpool: host m") == [], 10, lambda: "its host has ended")
    pool.http.patch("/admin/models/m", json={"idle_sleep_2_s": 1000}).raise_for_status()
    before = starts(pool, "m")
    with ThreadPoolExecutor(50) as clients, pool.sdk() as sdk:
        answers = clients.map(lambda _: sdk.completions.create(model="m", prompt="x"), range(50))
        assert {each.choices[0].finish_reason for each in answers} == {"stop"}
    assert starts(pool, "m") == before + 1
    until(pool, "m", "SLEEP_1", within=45)
    host = pool.one("modelpool: host m").pid
    assert ask(pool, "m") == 200
    pool.http.patch("/admin/models/m", json={"idle_sleep_2_s": 3, "idle_unload_s": 1000}).raise_for_status()
    until(pool, "m", "SLEEP_2", within=45)
    assert ask(pool, "m") == 200
    assert pool.one("modelpool: host m").pid == host


def test_a_pinned_model_and_one_with_replicas_to_keep_stay_awake(idle_pool: PoolProcess) -> None:
    pool = idle_pool
    pool.register("pinned", fake=True, pinned=True)
    pool.register("kept", fake=True, min_replicas=1)
    pool.register("slow", fake=True, idle_sleep_1_s=1000)
    pool.wait_active("pinned")
    pool.wait_active("kept")
    pool.wait_active("slow")
    time.sleep(3)  # twice their idle time
    assert {pool.model(alias)["state"] for alias in ("pinned", "kept", "slow")} == {"ACTIVE"}


def test_load_brings_replicas_up_and_quiet_takes_them_away(idle_pool: PoolProcess) -> None:
    pool = idle_pool
    pool.register("busy", fake=True, fake_delay_ms=500, fake_capacity=2, max_replicas=3)
    pool.wait_active("busy")
    done = threading.Event()
    failures: list[int] = []

    def keep_asking() -> None:
        while not done.is_set():
            if (status := ask(pool, "busy")) != 200:
                failures.append(status)

    threads = [threading.Thread(target=keep_asking) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        pool.wait_active("busy", replicas=3, within=40)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []
    until(pool, "busy", "UNLOADED", within=40)


def test_who_waits_takes_the_place_of_who_is_idle(tight_pool: PoolProcess) -> None:
    pool = tight_pool
    pool.register("a", fake=True, gpu_memory_gb=6)
    pool.wait_active("a")
    pool.register("b", fake=True, gpu_memory_gb=6)
    assert pool.model("b")["state"] == "UNLOADED"
    for alias in ("b", "a", "b", "a"):
        assert ask(pool, alias) == 200
    assert pool.model("a")["state"] == "ACTIVE"
    assert pool.model("b")["state"] != "ACTIVE"


def test_two_that_cannot_live_together_and_are_both_asked_for_all_the_time_take_turns(tight_pool: PoolProcess) -> None:
    pool = tight_pool
    pool.register("a", fake=True, gpu_memory_gb=6)
    pool.register("b", fake=True, gpu_memory_gb=6)
    until_s = time.monotonic() + 7
    served = {"a": 0, "b": 0}
    failures: list[tuple[str, str]] = []
    turns: list[str] = []

    def keep_asking(alias: str) -> None:
        while time.monotonic() < until_s:
            answer = pool.http.post("/v1/completions", json={"model": alias, "prompt": "x"}, timeout=60)
            if answer.status_code != 200:
                failures.append((alias, answer.text))
            if not turns or turns[-1] != alias:
                turns.append(alias)
            served[alias] += 1

    threads = [threading.Thread(target=keep_asking, args=(alias,)) for alias in ("a", "b") for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    # Both are served, many requests in each turn, and no turn is for ever.
    assert min(served.values()) > 20, served
    assert 3 <= len(turns) <= 30, turns


def test_what_cannot_have_room_says_with_numbers_why(tight_pool: PoolProcess) -> None:
    pool = tight_pool
    pool.register("rock", fake=True, gpu_memory_gb=5, pinned=True)
    until(pool, "rock", "ACTIVE", within=30)
    pool.register("large", fake=True, gpu_memory_gb=9)
    answer = pool.http.post("/v1/completions", json={"model": "large", "prompt": "x"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_available_worker")
    message = answer.json()["error"]["message"]
    assert "needs 9.0 GB on device 0" in message
    assert "rock (ACTIVE) holds 5.0 GB, is pinned" in message
    pool.remove("rock")
    assert ask(pool, "large") == 200


def test_a_new_manager_does_not_lose_count_of_who_sleeps(idle_pool: PoolProcess, tmp_path: Path) -> None:
    pool = idle_pool
    pool.register("m2", fake=True, idle_sleep_2_s=1000)
    until(pool, "m2", "SLEEP_1")
    host = pool.one("modelpool: host m2").pid
    pool.one("modelpool: manager").kill()
    assert ask(pool, "m2") == 200
    assert pool.one("modelpool: host m2").pid == host


def test_a_new_manager_knows_what_was_learned_what_was_changed_and_who_rests(idle_pool: PoolProcess) -> None:
    pool = idle_pool
    pool.register("rests", fake=True, fake_load_ms=300)
    pool.register("stays", fake=True)
    pool.wait_active("stays")
    changed = pool.http.patch("/admin/models/stays", json={"pinned": True})
    assert changed.status_code == 200, changed.text
    until(pool, "rests", "UNLOADED")
    assert "A request starts it, which takes" in " ".join(pool.model("rests")["outlook"])
    eventually(lambda: kept_at_rest(pool) >= {"rests"}, 30, lambda: f"kept: {kept_at_rest(pool)}")
    epoch = pool.status()["epoch"]
    pool.one("modelpool: manager").kill()
    late = {"alias": "late", "fake": True}
    eventually(lambda: pool.http.post("/admin/models/register", json=late).is_success, 60, lambda: "registered")
    answer = pool.http.post("/v1/completions", json={"model": "late", "prompt": "x"}, timeout=60)
    assert answer.status_code == 200, answer.text  # at once: the gateway knows it
    assert pool.status()["epoch"] != epoch
    rests = pool.model("rests")
    assert (rests["state"], rests["instances"]) == ("UNLOADED", [])
    (start,) = (each for each in rests["learned"] if (each["what"], each["worker_id"]) == ("start", "w1"))
    assert (start["seen"], start["typical"] > 0.3) == (1, True)
    assert (pool.model("stays")["state"], pool.model("stays")["spec"]["pinned"]) == ("ACTIVE", True)
    assert ask(pool, "rests") == 200
    pool.remove("stays")


def kept_at_rest(pool: PoolProcess) -> set[str]:
    """Which models a manager that starts now would leave at rest."""
    with closing(sqlite3.connect(pool.home / "modelpool.db")) as store:
        return {alias for (alias,) in store.execute("SELECT alias FROM experience WHERE resting")}
