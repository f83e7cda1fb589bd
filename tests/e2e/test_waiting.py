"""Requests that wait for their model, in a whole pool: cold starts, deaths of each part, clients that leave."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import PoolProcess, eventually, running_pool

LOAD_MS = 1500


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    home: Path = tmp_path_factory.mktemp("waiting")
    with running_pool(
        home, "--no-demo", MODELPOOL_WAITING_MAX="60", MODELPOOL_WAITING_HEARTBEAT="0.3", **FAKE_ONLY
    ) as running:
        yield running


def ask(
    pool: PoolProcess, alias: str, headers: dict[str, str] | None = None, *, stream: bool = False
) -> httpx.Response:
    body = {"model": alias, "messages": [{"role": "user", "content": "hi"}], "stream": stream}
    return pool.http.post("/v1/chat/completions", json=body, headers=headers)


def loading(pool: PoolProcess, alias: str) -> None:
    """Register it; a gateway that has lost its manager a moment ago hears of it a moment later."""
    pool.register(alias, fake=True, fake_load_ms=LOAD_MS, fake_response="Here I am.")
    eventually(lambda: pool.http.get(f"/v1/models/{alias}").status_code == 200, 5, lambda: f"{alias} is known")


def test_the_first_request_for_a_model_waits_for_its_start(pool: PoolProcess) -> None:
    loading(pool, "cold")
    answer = ask(pool, "cold", {"X-ModelPool-No-Cold-Start": "true"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
    assert int(answer.headers["retry-after"]) >= 1
    answer = ask(pool, "cold", {"X-ModelPool-Max-Wait": "0.1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
    with ThreadPoolExecutor(10) as clients:
        answers = list(clients.map(lambda _: ask(pool, "cold"), range(20)))
    assert [each.status_code for each in answers] == [200] * 20
    pool.remove("cold")


def test_a_stream_hears_comments_until_its_model_is_there(pool: PoolProcess) -> None:
    loading(pool, "streamed")
    text = ask(pool, "streamed", stream=True).text
    assert text.startswith(": waiting\n\n: waiting\n\n")
    assert text.rstrip().endswith("data: [DONE]")
    pool.remove("streamed")


def test_a_load_goes_on_when_the_client_that_asked_leaves(pool: PoolProcess) -> None:
    loading(pool, "left")
    with pytest.raises(httpx.ReadTimeout):
        pool.http.post("/v1/chat/completions", json={"model": "left", "messages": []}, timeout=0.2)
    state = eventually(lambda: next(iter(pool.model("left")["instances"]), None), 10, lambda: str(pool.model("left")))[
        "state"
    ]
    assert state == "STARTING"
    pool.wait_active("left", within=30)
    assert ask(pool, "left").status_code == 200
    pool.remove("left")


def test_a_model_that_cannot_start_is_answered_at_once(pool: PoolProcess) -> None:
    pool.register("broken", fake=True, fake_load_error="out of paint")
    eventually(lambda: pool.model("broken")["reason"].startswith("it failed"), 30, lambda: str(pool.model("broken")))
    eventually(lambda: pool.model("broken")["instances"][0]["failures"] > 1, 30, lambda: str(pool.model("broken")))
    begun = time.monotonic()
    answer = ask(pool, "broken", {"X-ModelPool-Max-Wait": "30"})
    assert answer.status_code == 503
    assert "out of paint" in answer.json()["error"]["message"]
    assert time.monotonic() - begun < 5
    pool.remove("broken")


def has_ended(process: psutil.Process) -> bool:
    """Down to its sockets, which go after its memory."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("part", ["host steady", "worker", "manager", "forkserver"])
def test_whatever_dies_requests_that_may_wait_are_answered(pool: PoolProcess, part: str) -> None:
    """All that begin when it is dead: what runs in the engine that dies may have run, and is a 502."""
    pool.register("steady", fake=True, fake_response="Here I am.")
    pool.wait_active("steady")
    before, host = pool.one(f"modelpool: {part}"), pool.one("modelpool: host steady")
    before.send_signal(signal.SIGKILL)
    before.wait(10)
    if part == "worker":  # its engine ends a moment after it
        eventually(lambda: has_ended(host), 10, lambda: "its engine has ended")
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: ask(pool, "steady"), range(40)))
    assert [each.status_code for each in answers] == [200] * 40
    pool.wait_active("steady")


def test_the_manager_dies_while_a_request_waits(pool: PoolProcess) -> None:
    loading(pool, "patient")
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(ask(pool, "patient")))
    waiting.start()
    eventually(lambda: pool.model("patient")["instances"], 10, lambda: str(pool.model("patient")))
    pool.one("modelpool: manager").kill()
    waiting.join(60)
    assert [each.status_code for each in answers] == [200]
    pool.remove("patient")
