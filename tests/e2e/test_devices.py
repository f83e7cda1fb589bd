"""A pool on four GPUs that do not exist, whose memory is as scarce as that of real ones."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.ladder import ladder, settled
from tests.e2e.pool import Json, PoolProcess, eventually, running_pool

TRAINING = {"gb": 80, "others": [{"pid": 4242, "name": "train.py", "gb": 50}]}
LOST = {"gb": 80, "lost": "GPU is lost"}
SOUND = {"gb": 80}
HASTY = {
    "MODEL_MIN_RESIDENCE": "0.5",
    "MODEL_TURN_MAX": "1",
    "MODEL_SWAPS_PER_MINUTE": "1000",
    "MODELPOOL_BACKOFF_INITIAL": "0.2",
    "MODELPOOL_BACKOFF_MAX": "2",
}


class Gpus:
    def __init__(self, pool: PoolProcess, file: Path) -> None:
        self.pool = pool
        self._file = file

    def are(self, *devices: Json, host_gb: float = 64) -> None:
        """The pool's devices from now on; returns once its manager knows."""
        _declare(self._file, devices, host_gb)
        eventually(lambda: [self._shown(each) for each in devices] == self._now(), 10, lambda: str(self.free()))

    def _shown(self, device: Json) -> tuple[str, int]:
        return device.get("lost", ""), len(device.get("others", ()))

    def _now(self) -> list[tuple[str, int]]:
        return [(each["lost"], len(each["others"])) for each in self.devices()]

    def devices(self) -> list[Json]:
        found: list[Json] = self.pool.status()["workers"][0]["devices"]
        return found

    def free(self) -> list[float]:
        return [each["free_bytes"] / 1e9 for each in self.devices()]

    def where(self, alias: str) -> list[int]:
        return sorted(index for each in self.pool.model(alias)["instances"] for index in each["devices"])


def _declare(file: Path, devices: tuple[Json, ...], host_gb: float) -> None:
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps({"devices": devices, "host_gb": host_gb}))
    os.replace(draft, file)


@pytest.fixture(scope="module")
def module_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpus]:
    home = tmp_path_factory.mktemp("gpus")
    file = home / "gpus.yaml"
    _declare(file, (SOUND,) * 4, 64)
    with running_pool(home, "--no-demo", **FAKE_ONLY, **HASTY, MODELPOOL_FAKE_DEVICES=str(file)) as pool:
        yield Gpus(pool, file)


@pytest.fixture
def gpus(module_gpus: Gpus) -> Iterator[Gpus]:
    """Four sound ones, and nothing runs."""
    yield module_gpus
    for each in module_gpus.pool.status()["models"]:
        module_gpus.pool.remove(each["alias"])
    module_gpus.are(SOUND, SOUND, SOUND, SOUND)
    eventually(lambda: module_gpus.free() == [80] * 4, 20, lambda: f"all free: {module_gpus.free()}")


def ask(pool: PoolProcess, alias: str, wait_s: float = 60) -> tuple[int, str]:
    body = {"model": alias, "prompt": "x", "max_tokens": 2}
    headers = {"X-ModelPool-Max-Wait": str(wait_s)}
    answer = pool.http.post("/v1/completions", json=body, headers=headers, timeout=90)
    return answer.status_code, answer.text


def test_a_model_on_two_devices_goes_where_nobody_else_is_and_nothing_is_lost(gpus: Gpus) -> None:
    gpus.are(TRAINING, SOUND, LOST, SOUND)
    gpus.pool.register("wide", fake=True, gpu_memory_gb=60, tensor_parallel_size=2)
    gpus.pool.wait_active("wide")
    assert gpus.where("wide") == [1, 3]
    eventually(lambda: gpus.free() == [30, 20, 80, 20], 10, lambda: str(gpus.free()))
    gpus.pool.register("wider", fake=True, gpu_memory_gb=60, tensor_parallel_size=3)
    status, said = ask(gpus.pool, "wider")
    assert status == 503
    assert "train.py (process 4242) holds 50.0 GB" in said
    assert "device 2 is lost (GPU is lost)" in said
    gpus.pool.register("widest", fake=True, gpu_memory_gb=1, tensor_parallel_size=4)
    status, said = ask(gpus.pool, "widest")
    assert status == 503
    assert "needs 4 devices, has 3; device 2 is lost (GPU is lost)" in said


def test_what_a_lost_device_carried_is_started_on_another_and_the_rest_goes_on(gpus: Gpus) -> None:
    gpus.pool.register("a", fake=True, gpu_memory_gb=50)
    gpus.pool.wait_active("a")
    gpus.pool.register("b", fake=True, gpu_memory_gb=50)
    gpus.pool.wait_active("b")
    (a,), (b,) = gpus.where("a"), gpus.where("b")
    host = gpus.pool.one("modelpool: host b").pid
    devices: list[Json] = [SOUND] * 4
    devices[a] = LOST
    gpus.are(*devices)
    eventually(lambda: gpus.where("a") not in ([], [a]), 10, lambda: f"moved: {gpus.pool.model('a')}")
    assert ask(gpus.pool, "a")[0] == 200
    assert gpus.where("a")[0] not in (a, b)
    assert gpus.pool.one("modelpool: host b").pid == host
    assert ask(gpus.pool, "b")[0] == 200


@contextmanager
def sampled(gpus: Gpus) -> Iterator[list[list[float]]]:
    """What is free on the devices, again and again."""
    samples: list[list[float]] = []
    done = threading.Event()

    def sample() -> None:
        with gpus.pool.worker_http() as worker:
            while not done.wait(0.02):
                info = worker.get("/info").json()
                samples.append([each["free_bytes"] / 1e9 for each in (*info["devices"], info["host"])])

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def test_many_models_take_turns_and_nobody_is_told_to_take_more_than_there_is(gpus: Gpus) -> None:
    """The devices give nobody more than they have: an instance that wants it fails, and none does."""
    gpus.are(TRAINING, SOUND, host_gb=24)
    aliases = [f"m{number}" for number in range(4)]
    for number, alias in enumerate(aliases):
        size = {"gpu_memory_gb": 40 + 5 * (number % 3), "fake_weights_mb": 8000, "fake_context_mb": 800}
        gpus.pool.register(alias, fake=True, **size)
    order = random.Random(7)
    with sampled(gpus) as samples, ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda alias: ask(gpus.pool, alias), order.choices(aliases, k=16)))
    assert "\n".join(said for status, said in answers if status != 200) == ""
    log = (gpus.pool.home / "logs" / "worker.log").read_text()
    assert [alias for alias in aliases if f"{alias} failed" in log] == []
    # They were really used, and so was the machine's memory, for the weights of who slept.
    assert min(each[1] for each in samples) < 40
    assert min(each[-1] for each in samples) < 24


def test_a_start_that_lacks_memory_is_tried_again_more_and_more_slowly_and_disturbs_nobody(gpus: Gpus) -> None:
    """It takes more than it was registered with, so that only its own start can find out."""
    pool = gpus.pool
    pool.register("good", fake=True, gpu_memory_gb=10)
    pool.wait_active("good")
    began = time.monotonic()
    pool.register("liar", fake=True, gpu_memory_gb=10, fake_kv_mb=90_000)
    eventually(lambda: _first(pool, "liar").get("failures", 0) >= 4, 30, lambda: f"failed: {pool.model('liar')}")
    assert time.monotonic() - began > 0.2 + 0.4 + 0.8
    assert ask(pool, "good")[0] == 200
    status, said = ask(pool, "liar", wait_s=0)
    assert status == 503
    assert "90.0 GB wanted of device" in said
    eventually(lambda: sorted(gpus.free()) == [70, 80, 80, 80], 10, lambda: f"given back: {gpus.free()}")
    assert _first(pool, "good")["failures"] == 0


def test_a_wake_that_fails_is_a_cold_start_and_no_error(gpus: Gpus) -> None:
    pool = gpus.pool
    pool.register("m", fake=True, gpu_memory_gb=10, fake_context_mb=500, fake_wake_error="the weights are gone")
    pool.wait_active("m")
    host = pool.one("modelpool: host m").pid
    with ladder(pool, "m") as m:
        settled(pool, "m")
        m.sleep(1)
    assert ask(pool, "m")[0] == 200
    assert pool.one("modelpool: host m").pid != host
    instance = _first(pool, "m")
    assert instance["failures"] == 1
    log = (pool.home / "logs" / "worker.log").read_text()
    assert "m failed: it could not be woken: the weights are gone" in log


def _first(pool: PoolProcess, alias: str) -> Json:
    """The model's first instance, as its manager sees it."""
    return next(iter(pool.model(alias)["instances"]), {})
