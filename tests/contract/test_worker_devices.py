"""A worker on GPUs that do not exist: what its instances hold, and what becomes of them when a device fails."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.worker_process import Json, WorkerProcess, complete, eventually, running_worker

SOUND: list[Json] = [{"gb": 80} for _ in range(4)]
TRAINING = {"gb": 80, "others": [{"pid": 4242, "name": "train.py", "gb": 60}]}


class Machine:
    """A worker, and the file that declares its devices."""

    def __init__(self, worker: WorkerProcess, file: Path) -> None:
        self.worker = worker
        self._file = file

    def has(self, *devices: Json, host_gb: float = 64) -> None:
        """These are its devices from now on."""
        draft = self._file.with_suffix(".draft")
        draft.write_text(json.dumps({"devices": devices, "host_gb": host_gb}))
        os.replace(draft, self._file)

    def free(self) -> list[float]:
        """GB by device, and at the end of the machine."""
        info = self.worker.http.get("/info").json()
        return [round(each["free_bytes"] / 1e9, 1) for each in (*info["devices"], info["host"])]

    def start(self, alias: str, *devices: int, gb: float, **model: Any) -> Json:
        self.order(alias, *devices, gb=gb, **model)
        return self.worker.wait(alias, "ACTIVE")

    def order(self, alias: str, *devices: int, gb: float, **model: Any) -> None:
        spec = {"alias": alias, "fake": True, "gpu_memory_gb": gb, "tensor_parallel_size": len(devices), **model}
        answer = self.worker.http.post("/instances/start", json={"model": spec, "devices": devices})
        assert answer.status_code == 200, answer.text

    def sleep(self, alias: str, level: int) -> Json:
        assert self.worker.http.post(f"/instances/{alias}/sleep", json={"level": level}).status_code == 200
        return self.worker.wait(alias, f"SLEEP_{level}")

    def wake(self, alias: str) -> None:
        assert self.worker.http.post(f"/instances/{alias}/wake").status_code == 200


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerProcess, Path]]:
    home = tmp_path_factory.mktemp("worker")
    file = home / "gpus.yaml"
    file.write_text(json.dumps({"devices": SOUND, "host_gb": 64}))
    with running_worker(home, MODELPOOL_FAKE_DEVICES=str(file)) as worker:
        yield worker, file


@pytest.fixture
def machine(worker: tuple[WorkerProcess, Path]) -> Iterator[Machine]:
    """Four sound devices of 80 GB and 64 GB of host memory, and nothing runs."""
    machine = Machine(*worker)
    machine.has(*SOUND)
    yield machine
    for instance in machine.worker.instances():
        machine.worker.stop(instance)


def test_each_level_holds_what_it_should_of_devices_and_machine(machine: Machine) -> None:
    size = {"fake_weights_mb": 20_000, "fake_context_mb": 500}
    report = machine.start("m", 1, 3, gb=30, **size)
    assert machine.free() == [80, 50, 80, 50, 64]  # the devices that CUDA_VISIBLE_DEVICES names
    assert (report["device_bytes"], report["weights_bytes"]) == (30e9, 20e9)
    change = machine.sleep("m", 1)["last_sleep"]
    assert machine.free() == [80, 79.5, 80, 79.5, 44]
    assert (change["device_bytes_before"], change["device_bytes_after"]) == (30e9, 0.5e9)
    assert change["bytes_after"] > 20e9
    machine.wake("m")
    machine.worker.wait("m", "ACTIVE")
    eventually(lambda: machine.worker.report("m")["device_bytes"] == 30e9)  # it serves before it is measured
    assert machine.free() == [80, 50, 80, 50, 64]
    machine.sleep("m", 2)
    assert machine.free() == [80, 79.5, 80, 79.5, 64]


def test_what_a_killed_host_held_is_free_at_once(machine: Machine) -> None:
    pid = machine.start("m", 0, gb=70)["pid"]
    os.kill(pid, signal.SIGKILL)
    machine.worker.wait("m", "FAILED")
    assert machine.free() == [80, 80, 80, 80, 64]


def test_a_start_without_memory_fails_with_the_numbers_and_disturbs_nobody(machine: Machine) -> None:
    machine.start("first", 0, gb=50)
    machine.order("second", 0, gb=50)
    reason = machine.worker.wait("second", "FAILED")["reason"]
    assert reason == "out of memory: 50.0 GB wanted of device 0, 30.0 GB free of 80.0 GB"
    assert complete(machine.worker.http, "/proxy/first/v1/completions", "first").status_code == 200
    assert machine.free() == [30, 80, 80, 80, 64]


def test_a_wake_without_memory_ends_it_and_gives_back_what_it_held(machine: Machine) -> None:
    machine.start("m", 0, gb=50, fake_context_mb=1000)
    machine.sleep("m", 1)
    machine.has(TRAINING, *SOUND[1:])
    machine.wake("m")
    reason = machine.worker.wait("m", "FAILED")["reason"]
    assert reason == "it could not be woken: out of memory: 50.0 GB wanted of device 0, 20.0 GB free of 80.0 GB"
    eventually(lambda: machine.free() == [20, 80, 80, 80, 64])


def test_others_on_a_device_are_named(machine: Machine) -> None:
    machine.has(TRAINING, *SOUND[1:])
    first = machine.worker.http.get("/info").json()["devices"][0]
    assert first["others"] == [{"pid": 4242, "name": "train.py", "bytes": 60e9}]


@pytest.mark.parametrize("state", ["ACTIVE", "SLEEP_1", "STARTING"])
def test_what_runs_on_a_lost_device_fails_and_the_others_do_not(machine: Machine, state: str) -> None:
    machine.start("other", 0, gb=10)
    machine.order("m", 1, gb=10, fake_load_ms=60_000 if state == "STARTING" else 0)
    machine.worker.wait("m", "STARTING" if state == "STARTING" else "ACTIVE")
    if state == "SLEEP_1":
        machine.sleep("m", 1)
    machine.has(SOUND[0], {"gb": 80, "lost": "GPU is lost"}, *SOUND[2:])
    machine.free()  # the devices are read, as they are with every heartbeat
    assert machine.worker.wait("m", "FAILED")["reason"] == "device 1 is lost: GPU is lost"
    assert complete(machine.worker.http, "/proxy/other/v1/completions", "other").status_code == 200
    again = machine.worker.http.post("/instances/start", json={"model": {"alias": "m", "fake": True}, "devices": [1]})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "device_lost")
