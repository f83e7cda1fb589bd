"""Changes while clients ask without a pause: a worker that goes, a model that is replaced. No request fails."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.another_version import VERSION, another_version
from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import PoolProcess, another_worker, eventually, running_pool
from tests.e2e.test_cli import run
from tests.load import Load


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    # Requests in flight outlast what a stop gives them otherwise.
    home = tmp_path_factory.mktemp("rolling")
    with running_pool(
        home, "--no-demo", **FAKE_ONLY, MODELPOOL_DRAIN_TIMEOUT="0.5", MODELPOOL_FAKE_DEVICES="1x80"
    ) as up:
        yield up


@contextmanager
def asked(pool: PoolProcess, alias: str, clients: int = 4) -> Iterator[None]:
    """Plain requests and streams all the while, and one long stream from the beginning: all are answered, whole."""
    loads = [Load(pool.url, alias, pool.http.headers["authorization"][7:]) for _ in range(clients)]
    long = threading.Thread(target=lambda: said.append(_long_stream(pool, alias)))
    said: list[str] = []
    long.start()
    for load in loads:
        load.__enter__()
    try:
        eventually(lambda: sum(load.statuses[200] for load in loads) > 20, 20, lambda: "requests")
        yield
    finally:
        for load in loads:
            load.__exit__(None, None, None)
        long.join()
    statuses = sum((load.statuses for load in loads), Counter[int | str]())
    assert set(statuses) == {200}, statuses
    assert said[0].rstrip().endswith("data: [DONE]"), said


def _long_stream(pool: PoolProcess, alias: str) -> str:
    """Five seconds, which is longer than a change takes, and much longer than a stop gives."""
    body = {"model": alias, "prompt": "x", "stream": True, "max_tokens": 100, "ignore_eos": True}
    return pool.http.post("/v1/completions", json=body, headers={"X-Fake-Token-Ms": "50"}).text


MODEL = {"fake": True, "fake_token_ms": 20, "fake_response": "a long tale " * 40, "gpu_memory_gb": 10}


def where(pool: PoolProcess, alias: str) -> list[tuple[str, str]]:
    """The instances that stay, and their states, by worker."""
    return sorted((each["worker_id"], each["state"]) for each in pool.model(alias)["instances"] if not each["leaving"])


def awake(pool: PoolProcess, alias: str) -> set[int]:
    """The processes of its instances that are awake."""
    return {each["pid"] for each in pool.model(alias)["instances"] if each["state"] == "ACTIVE"}


def test_a_drained_worker_leaves_no_request_unanswered(tmp_path: Path) -> None:
    """In its place comes one of another version."""
    with running_pool(tmp_path / "home", "--no-demo", **FAKE_ONLY, MODELPOOL_DRAIN_TIMEOUT="0.5") as pool:
        pool.register("served", fake=True, fake_token_ms=20, fake_response="a long tale " * 40, min_replicas=2)
        pool.register("asleep", fake=True, min_replicas=0)
        pool.wait_active("served", replicas=2)
        pool.wait_active("asleep")
        with pool.worker_http() as worker:
            assert worker.post("/instances/asleep/sleep", json={"level": 1}).status_code == 200
        eventually(lambda: pool.model("asleep")["state"] == "SLEEP_1", 10, lambda: str(pool.model("asleep")))
        later = {"PYTHONPATH": str(another_version(tmp_path / "later"))}
        with another_worker(pool, tmp_path / "home2", "w2", **later), asked(pool, "served"):
            done = run(pool, "drain", "w1", "--wait")
            assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "w1 is gone."), done.stdout + done.stderr
            assert [(each["worker_id"], each["version"]) for each in pool.status()["workers"]] == [("w2", VERSION)]
            assert where(pool, "served") == [("w2", "ACTIVE"), ("w2", "ACTIVE")]
        assert "the worker was drained, and has ended" in _notices(pool), "`up` does not start it again"


def _notices(pool: PoolProcess) -> Iterator[str]:
    """What `up --json` says from now on."""
    assert pool.process.stdout is not None
    for line in pool.process.stdout:
        yield json.loads(line).get("message", "")


def another_manager(pool: PoolProcess) -> None:
    """The manager is killed, and another one knows its workers."""
    epoch = pool.status()["epoch"]
    pool.one("modelpool: manager").kill()
    eventually(
        lambda: (now := pool.status()).get("epoch", epoch) != epoch and not now["recovering"],
        30,
        lambda: f"a new manager: {pool.status()}",
    )


def test_what_fits_nowhere_else_is_served_on_and_it_is_said_why(pool: PoolProcess) -> None:
    pool.register("alone", **MODEL)
    pool.wait_active("alone")
    with asked(pool, "alone"):
        done = run(pool, "drain", "w1")
        assert done.returncode == 0, done.stderr
        assert "alone (ACTIVE) on w1 stays until another is in its place" in done.stdout
        assert "w1: it is being drained" in done.stdout
        another_manager(pool)
        eventually(lambda: pool.status()["workers"][0]["drain"], 20, lambda: "still being drained")
        assert "is draining; it runs alone" in run(pool, "explain", "w1").stdout
        assert "draining" in run(pool, "status").stdout
        assert "alone on w1 stays until another is in its place" in pool.model("alone")["reason"]
        late = run(pool, "drain", "w1", "--wait", "--timeout", "0.1")
        assert late.returncode == 1
        assert "error: w1 is still there: alone (ACTIVE) on w1 stays" in late.stderr
        kept = run(pool, "drain", "w1", "--cancel")
        assert "w1 at http://127.0.0.1:" in kept.stdout
        assert " is alive; it runs alone." in kept.stdout
    assert pool.model("alone")["reason"] == ""
    assert pool.http.post("/admin/workers/nobody/drain").status_code == 404
    pool.remove("alone")


def test_a_replaced_model_is_served_all_the_while(pool: PoolProcess) -> None:
    pool.register("m", **MODEL, min_replicas=2)
    pool.wait_active("m", replicas=2)
    before = {each.pid for each in pool.processes("modelpool: host m")}
    with asked(pool, "m"):
        body = [f"{name}={value}" for name, value in {**MODEL, "fake": "true", "min_replicas": 2}.items()]
        sets = [part for each in [*body, "fake_capacity=3"] for part in ("--set", each)]
        refused = run(pool, "register", "m", *sets)
        assert refused.returncode == 1
        assert "`modelpool register --replace`" in refused.stderr
        done = run(pool, "register", "m", *sets, "--replace", "--wait")
        assert done.returncode == 0, done.stderr
    eventually(lambda: len(pool.processes("modelpool: host m")) == 2, 20, lambda: "the old ones have ended")
    assert before.isdisjoint(each.pid for each in pool.processes("modelpool: host m"))
    assert pool.model("m")["spec"]["fake_capacity"] == 3
    pool.remove("m")


def test_where_the_new_one_cannot_start_the_old_one_serves_on_and_it_is_said_why(pool: PoolProcess) -> None:
    pool.register("m", **MODEL)
    pool.wait_active("m")
    host = awake(pool, "m")
    with asked(pool, "m"):
        answer = pool.http.post(
            "/admin/models/register?replace=true",
            json={"alias": "m", **MODEL, "fake_load_error": "the weights are gone"},
        )
        assert answer.status_code == 200, answer.text
        eventually(lambda: "the weights are gone" in pool.model("m")["reason"], 20, lambda: str(pool.model("m")))
        assert (
            "m on w1 stays until another is in its place, since its model was registered" in pool.model("m")["reason"]
        )
        another_manager(pool)
        eventually(lambda: "the weights are gone" in pool.model("m")["reason"], 20, lambda: str(pool.model("m")))
        back = pool.http.post("/admin/models/register?replace=true", json={"alias": "m", **MODEL})
        assert back.status_code == 200, back.text
        eventually(lambda: pool.model("m")["reason"] == "", 20, lambda: str(pool.model("m")))
    assert awake(pool, "m") == host
    pool.remove("m")
