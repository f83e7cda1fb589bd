"""The residency ladder over a worker process, on the fake engine: orders, states, memory, and what goes wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.contract.worker_process import (
    Control,
    Json,
    WorkerProcess,
    complete,
    eventually,
    running_worker,
    serving_control,
)
from tests.promised import promised

MB = 10**6
LIMITS = {
    "MODELPOOL_FAKE_DEVICES": "",
    "MODELPOOL_STALL_TIMEOUT": "2",
    "MODELPOOL_DRAIN_TIMEOUT": "3",
    "MODELPOOL_WAKE_TIMEOUT": "3",
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    with running_worker(tmp_path_factory.mktemp("worker"), **LIMITS) as worker:
        yield worker


@pytest.fixture(autouse=True)
def nothing_runs_afterwards(worker: WorkerProcess) -> Iterator[None]:
    yield
    for instance in worker.instances():
        worker.stop(instance)


def sleep(worker: WorkerProcess, level: int, instance: str = "m", **order: float) -> httpx.Response:
    return worker.http.post(f"/instances/{instance}/sleep", json={"level": level, **order})


def wake(worker: WorkerProcess, instance: str = "m") -> httpx.Response:
    return worker.http.post(f"/instances/{instance}/wake")


def asleep(worker: WorkerProcess, level: int) -> Json:
    assert sleep(worker, level).status_code == 200
    return worker.wait("m", f"SLEEP_{level}")


def awake(worker: WorkerProcess) -> Json:
    assert wake(worker).status_code == 200
    return worker.wait("m", "ACTIVE")


def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def ask(worker: WorkerProcess) -> httpx.Response:
    return complete(worker.http, "/proxy/m/v1/completions", "m")


def test_each_level_gives_back_what_it_promises_and_waking_takes_it_again(worker: WorkerProcess) -> None:
    worker.start("m", fake_weights_mb=40, fake_kv_mb=60, fake_sleep_ms=20, fake_wake_ms=30, fake_reload_ms=50)
    before = ask(worker).json()["choices"]
    full = worker.status("m")["memory_bytes"]
    for level, freed, wake_s in ((1, 60 * MB, 0.03), (2, 100 * MB, 0.08)):
        report = asleep(worker, level)
        status = worker.status("m")
        assert status["sleep_level_value"] == level
        assert abs(full - status["memory_bytes"] - freed) < 5 * MB
        change = report["last_sleep"]
        assert (change["level"], change["reason"]) == (level, "")
        assert 0.02 <= change["seconds"] < promised(1)
        assert abs(change["bytes_before"] - change["bytes_after"] - freed) < 5 * MB
        assert awake(worker)["last_wake"]["level"] == level
        last = eventually(lambda: _measured(worker.status("m")))
        assert wake_s <= last["seconds"] < wake_s + promised(1)
        assert abs(last["bytes_after"] - full) < 5 * MB
        assert worker.status("m")["sleep_level_value"] == 0
        assert ask(worker).json()["choices"] == before


def _measured(status: Json) -> Json | None:
    """The last wake, once its memory was measured."""
    last: Json = status["last_wake"]
    return last if last["bytes_after"] else None


def test_from_level_one_it_goes_to_level_two_and_only_a_wake_leads_back(worker: WorkerProcess) -> None:
    worker.start("m", fake_weights_mb=40, fake_kv_mb=60)
    asleep(worker, 1)
    report = asleep(worker, 2)
    assert abs(report["last_sleep"]["bytes_before"] - report["last_sleep"]["bytes_after"] - 40 * MB) < 5 * MB
    assert refusal(sleep(worker, 1)) == (409, "instance_asleep")
    awake(worker)
    assert ask(worker).status_code == 200


def test_an_order_given_twice_changes_nothing(worker: WorkerProcess) -> None:
    worker.start("m", fake_sleep_ms=200, fake_wake_ms=200)
    assert wake(worker).json()["state"] == "ACTIVE"
    assert [sleep(worker, 1).json()["state"] for _ in range(3)] == ["DRAINING"] * 3
    first = worker.wait("m", "SLEEP_1")
    assert sleep(worker, 1).json() == first
    assert [wake(worker).json()["state"] for _ in range(3)] == ["WAKING"] * 3
    worker.wait("m", "ACTIVE")
    assert wake(worker).json()["state"] == "ACTIVE"


def test_orders_that_cannot_be_are_refused_with_what_stands_against_them(worker: WorkerProcess) -> None:
    for body in ({"level": 0}, {"level": 4}, {"level": "deep"}, {}, {"level": 1, "drain_s": -1}):
        answer = worker.http.post("/instances/m/sleep", json=body)
        assert refusal(answer) == (422, "invalid_body"), body
        assert "level" in answer.text or "drain_s" in answer.text
    assert refusal(sleep(worker, 1)) == (404, "instance_not_found")
    assert refusal(wake(worker)) == (404, "instance_not_found")
    worker.order("m", fake_load_ms=400, fake_sleep_ms=300, fake_wake_ms=300)
    assert refusal(sleep(worker, 1)) == refusal(wake(worker)) == (409, "instance_busy")
    worker.wait("m", "ACTIVE")
    sleep(worker, 1)
    assert refusal(wake(worker)) == refusal(sleep(worker, 2)) == (409, "instance_busy")
    worker.wait("m", "SLEEP_1")
    sleep(worker, 2)
    assert refusal(wake(worker)) == (409, "instance_busy"), "it goes deeper, in state SLEEP_1"
    worker.wait("m", "SLEEP_2")
    wake(worker)
    answer = sleep(worker, 1)
    assert refusal(answer) == (409, "instance_busy")
    assert "is WAKING" in answer.text
    worker.wait("m", "ACTIVE")


@pytest.mark.parametrize("level", [0, 1, 2])
def test_level_three_ends_the_process_from_any_level(worker: WorkerProcess, level: int) -> None:
    pid = worker.start("m")["pid"]
    if level:
        asleep(worker, level)
    assert sleep(worker, 3).status_code == 200
    eventually(lambda: "m" not in worker.instances())
    assert not Path(f"/proc/{pid}").exists()
    assert refusal(sleep(worker, 3)) == (404, "instance_not_found")


def test_a_request_never_reaches_an_engine_that_sleeps(worker: WorkerProcess) -> None:
    """The fake engine does as vLLM does: a request that reached it would wait without end."""
    report = worker.start("m", fake_sleep_ms=300, fake_wake_ms=300)
    direct = f"http://127.0.0.1:{report['address']['port']}/v1/completions"

    def refused() -> None:
        began = time.monotonic()
        assert ask(worker).status_code == 503
        answer = worker.http.post(direct, json={"model": "m", "prompt": "x"})
        assert refusal(answer) == (503, "instance_draining")
        assert time.monotonic() - began < promised(0.25)

    sleep(worker, 1)
    refused()
    for level in (1, 2):
        asleep(worker, level)
        refused()
        assert refusal(ask(worker)) == (503, "instance_not_ready")
    wake(worker)
    refused()
    worker.wait("m", "ACTIVE")
    assert worker.http.post(direct, json={"model": "m", "prompt": "x"}).status_code == 200
    assert worker.status("m")["requests_total"] == 1


def test_requests_in_flight_end_first_and_none_is_aborted(worker: WorkerProcess) -> None:
    worker.start("m", fake_delay_ms=int(promised(1000)), fake_capacity=60)
    many = httpx.Client(
        base_url=worker.url,
        headers=worker.http.headers,
        timeout=promised(30),
        limits=httpx.Limits(max_connections=None),
    )
    with many, ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(complete, many, "/proxy/m/v1/completions", "m") for _ in range(100)]
        eventually(lambda: worker.status("m")["inflight_requests"] == 100)
        assert sleep(worker, 1, drain_s=60).json()["state"] == "DRAINING"
        assert [each.result().status_code for each in answers] == [200] * 100
    change = worker.wait("m", "SLEEP_1")["last_sleep"]
    assert 0.1 < change["drain_s"] < promised(3)


def test_where_requests_do_not_end_in_time_it_stays_awake_and_says_so(worker: WorkerProcess) -> None:
    worker.start("m", fake_stall_after_tokens=1)
    with worker.http.stream("POST", "/proxy/m/v1/completions", json={"model": "m", "prompt": "x", "stream": True}):
        assert sleep(worker, 1, drain_s=0.2).json()["state"] == "DRAINING"
        report = worker.wait("m", "ACTIVE")
        assert report["last_sleep"]["reason"] == "1 requests were in flight after 0.2 s"
        assert worker.status("m")["sleep_level_value"] == 0
    eventually(lambda: worker.status("m")["inflight_requests"] == 0)
    asleep(worker, 1)
    awake(worker)
    assert worker.http.post("/proxy/m/tokenize", json={"model": "m", "prompt": "x"}).status_code == 200


def test_work_without_a_client_is_waited_for_too(worker: WorkerProcess) -> None:
    worker.start("m", fake_delay_ms=500, fake_response="done")
    body = {"model": "m", "input": "x", "background": True}
    made = worker.http.post("/proxy/m/v1/responses", json=body).json()["id"]
    asleep(worker, 1)
    awake(worker)
    assert worker.http.get(f"/proxy/m/v1/responses/{made}").json()["status"] == "completed"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"fake_wake_error": "the weights are gone"}, "it could not be woken: the weights are gone"),
        ({"fake_wrong_canary": True}, "wrong after waking from level 2: the model is not what it was"),
        ({"fake_wake_ms": 20_000}, "it took more than 3 s to wake"),
    ],
)
def test_an_instance_that_does_not_wake_as_it_was_has_failed_and_is_gone(
    worker: WorkerProcess, model: Json, says: str
) -> None:
    pid = worker.start("m", **model)["pid"]
    asleep(worker, 2)
    answers: list[int] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            answers.append(ask(worker).status_code)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    wake(worker)
    report = worker.wait("m", "FAILED")
    done.set()
    asking.join()
    assert report["reason"].startswith(says)
    assert not report["permanent"]
    assert set(answers) == {503}, "not one request was served by it"
    eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert worker.status("m")["sleep_level_value"] == 3


def test_an_instance_that_cannot_fall_asleep_has_failed(worker: WorkerProcess) -> None:
    worker.start("m", fake_sleep_error="no way back")
    sleep(worker, 1)
    assert worker.wait("m", "FAILED")["reason"] == "it could not be put to sleep: no way back"


@pytest.mark.parametrize("level", [1, 2])
def test_a_killed_sleeper_is_seen_at_once(worker: WorkerProcess, level: int) -> None:
    worker.start("m")
    pid = asleep(worker, level)["pid"]
    os.kill(pid, signal.SIGKILL)
    assert worker.wait("m", "FAILED", within=1)["reason"] == "killed by signal 9 (SIGKILL)"
    assert worker.start("m")["state"] == "ACTIVE"


def test_a_sleeper_that_stalls_is_ended(worker: WorkerProcess) -> None:
    worker.start("m")
    os.kill(asleep(worker, 1)["pid"], signal.SIGSTOP)
    assert worker.wait("m", "FAILED")["reason"].startswith("stalled")


@pytest.mark.parametrize("slow", [{"fake_sleep_ms": 1000}, {"fake_wake_ms": 1000}])
def test_a_stop_need_not_wait_for_a_change_of_level(worker: WorkerProcess, slow: Json) -> None:
    worker.start("m", **slow)
    sleep(worker, 1)
    if "fake_wake_ms" in slow:
        worker.wait("m", "SLEEP_1")
        wake(worker)
    began = time.monotonic()
    assert worker.http.post("/instances/m/stop").json()["reason"] == "it is being stopped"
    assert refusal(sleep(worker, 1))[0] == refusal(wake(worker))[0] == 409
    eventually(lambda: "m" not in worker.instances())
    assert time.monotonic() - began < promised(0.9)


def test_every_level_is_reported_to_the_manager_at_once(tmp_path: Path) -> None:
    control = Control()
    with serving_control(control), running_worker(tmp_path, MANAGER_URL=control.url) as own:
        own.start("m", fake_sleep_ms=50, fake_wake_ms=50)
        for level in (1, 2):
            asleep(own, level)
            eventually(lambda: control.states("m")[-1] == f"SLEEP_{level}", within=2)  # noqa: B023
        awake(own)
        eventually(lambda: control.states("m")[-1] == "ACTIVE", within=2)
        last = next(each for each in control.heartbeats[-1]["instances"] if each["instance"] == "m")
        assert last["sleep_levels"] == [1, 2]
        assert last["last_wake"]["level"] == 2


def test_a_worker_that_ends_takes_its_sleepers_along(tmp_path: Path) -> None:
    with running_worker(tmp_path) as own:
        for alias, level in (("a", 1), ("b", 2), ("c", 0)):
            own.start(alias)
            if level:
                sleep(own, level, alias)
                own.wait(alias, f"SLEEP_{level}")
        own.process.terminate()
        assert own.process.wait(10) == 0
        assert own.below() == []


def test_a_start_says_where_its_time_went(worker: WorkerProcess) -> None:
    phases = worker.start("m", fake_load_ms=200)["phases"]
    assert [phase["name"] for phase in phases] == ["fetch", "import", "fork", "load", "app"]
    seconds = {phase["name"]: phase["seconds"] for phase in phases}
    assert 0.2 <= seconds["load"] < promised(0.5)
    assert all(0 <= each < 5 for each in seconds.values())
    assert worker.status("m")["phases"] == phases
