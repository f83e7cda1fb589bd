"""Every part of a running pool is killed in turn, at once or after having been stopped, and the pool goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest

from tests.e2e.pool import PoolProcess, eventually, processes_of

SEEN_WITHIN_S = 5.0
HOW = ["kill", "stop then kill"]


def kill(process: psutil.Process, how: str) -> None:
    if how == "stop then kill":
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: process.status() == psutil.STATUS_STOPPED, 5, lambda: "stopped")
    process.kill()


@contextmanager
def steady_requests(pool: PoolProcess, alias: str) -> Iterator[list[str]]:
    """One request after the other to a model, until the block ends; what went wrong."""
    failures: list[str] = []
    done = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=pool.url, headers=pool.http.headers, timeout=30, trust_env=False) as http:
            while not done.is_set():
                body = {"model": alias, "messages": [{"role": "user", "content": "hi"}]}
                try:
                    answer = http.post("/v1/chat/completions", json=body)
                    if answer.status_code != 200:
                        failures.append(f"{answer.status_code} {answer.text}")
                except httpx.HTTPError as error:
                    failures.append(repr(error))
                done.wait(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield failures
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("how", HOW)
def test_a_dead_host_is_seen_and_started_again_while_others_are_not_disturbed(
    mending_pool: PoolProcess, how: str
) -> None:
    mending_pool.register("victim", fake=True)
    mending_pool.register("other", fake=True)
    mending_pool.wait_active("victim")
    mending_pool.wait_active("other")
    host = mending_pool.one("modelpool: host victim")
    with steady_requests(mending_pool, "other") as failures:
        kill(host, how)
        killed = time.monotonic()
        eventually(
            lambda: mending_pool.model("victim")["instances"][0]["failures"] == 1,
            SEEN_WITHIN_S,
            lambda: f"failure seen: {mending_pool.model('victim')}",
        )
        assert time.monotonic() - killed < SEEN_WITHIN_S
        assert "killed by" in mending_pool.model("victim")["instances"][0]["reason"]
        mending_pool.wait_active("victim", within=20)
    assert failures == []
    assert mending_pool.one("modelpool: host victim").pid != host.pid


@pytest.mark.parametrize("how", HOW)
def test_a_dead_forkserver_is_replaced_and_hosts_run_on(mending_pool: PoolProcess, how: str) -> None:
    mending_pool.register("m", fake=True)
    mending_pool.wait_active("m")
    host, forkserver = mending_pool.one("modelpool: host m"), mending_pool.one("modelpool: forkserver")
    with steady_requests(mending_pool, "m") as failures:
        kill(forkserver, how)
        eventually(
            lambda: any(each.pid != forkserver.pid for each in mending_pool.processes("modelpool: forkserver")),
            20,
            lambda: "a new forkserver",
        )
        mending_pool.register("n", fake=True)
        mending_pool.wait_active("n", within=20)
    assert failures == []
    assert mending_pool.one("modelpool: host m").pid == host.pid
    # The hosts it adopted end with the worker all the same.
    mending_pool.one("modelpool: worker").kill()
    eventually(lambda: not host.is_running() or host.status() == psutil.STATUS_ZOMBIE, 5, lambda: "the host ends")


@pytest.mark.parametrize("how", HOW)
def test_a_dead_workers_engines_end_and_its_models_come_back(mending_pool: PoolProcess, how: str) -> None:
    mending_pool.register("m", fake=True)
    mending_pool.wait_active("m")
    engines = [*mending_pool.processes("modelpool: host"), *mending_pool.processes("modelpool: forkserver")]
    worker = mending_pool.one("modelpool: worker")
    kill(worker, how)
    eventually(
        lambda: not [each for each in processes_of(mending_pool.run_id) if each in engines],
        SEEN_WITHIN_S,
        lambda: "its engines have ended",
    )
    assert [each["id"] for each in mending_pool.http.get("/v1/models").json()["data"]] == ["m"]
    eventually(lambda: mending_pool.one("modelpool: worker").pid != worker.pid, 10, lambda: "a new worker")
    mending_pool.wait_active("m", within=30)


@pytest.mark.parametrize("how", HOW)
def test_requests_go_on_without_the_manager_and_a_new_one_adopts_what_runs(mending_pool: PoolProcess, how: str) -> None:
    mending_pool.register("m", fake=True)
    mending_pool.register("n", fake=True)
    mending_pool.wait_active("m")
    mending_pool.wait_active("n")
    hosts = {each.pid for each in mending_pool.processes("modelpool: host")}
    epoch = mending_pool.status()["epoch"]
    with steady_requests(mending_pool, "m") as failures:
        kill(mending_pool.one("modelpool: manager"), how)
        eventually(
            lambda: mending_pool.status().get("epoch", epoch) != epoch and not mending_pool.status()["recovering"],
            30,
            lambda: f"a new manager: {mending_pool.status()}",
        )
        mending_pool.wait_active("m")
        mending_pool.wait_active("n")
        mending_pool.register("after", fake=True)
        mending_pool.wait_active("after")
    assert failures == []
    assert hosts < {each.pid for each in mending_pool.processes("modelpool: host")}


@pytest.mark.parametrize("how", HOW)
def test_a_dead_gateway_comes_back_on_its_port(mending_pool: PoolProcess, how: str) -> None:
    mending_pool.register("m", fake=True)
    mending_pool.wait_active("m")
    host, gateway = mending_pool.one("modelpool: host m"), mending_pool.one("modelpool: gateway")
    kill(gateway, how)
    eventually(lambda: mending_pool.answers("m"), 15, lambda: "the gateway answers")
    assert mending_pool.one("modelpool: gateway").pid != gateway.pid
    assert mending_pool.one("modelpool: host m").pid == host.pid


def test_nothing_is_left_when_up_itself_is_killed(own_pool: PoolProcess) -> None:
    own_pool.register("m", fake=True)
    own_pool.wait_active("m")
    os.kill(own_pool.process.pid, signal.SIGKILL)
    eventually(lambda: not processes_of(own_pool.run_id), 20, lambda: str(processes_of(own_pool.run_id)))


def test_an_engine_that_keeps_dying_is_tried_with_growing_pauses(mending_pool: PoolProcess) -> None:
    mending_pool.register("m", fake=True, fake_load_error="the disk with the weights is gone")
    view = eventually(
        lambda: (view := mending_pool.model("m"))["instances"][0]["failures"] >= 2 and view, 30, lambda: "two failures"
    )
    assert "the disk with the weights is gone" in view["reason"]
    answer = mending_pool.http.post("/v1/chat/completions", json={"model": "m", "messages": []})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_not_ready"
    assert "the disk with the weights is gone" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
