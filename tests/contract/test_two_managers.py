"""Two managers on one store: one is stopped, another takes over, and the first one goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from modelpool.process import Announcement, NotStarted, Ready
from tests.contract.worker_process import TOKEN, eventually, running_worker
from tests.part_process import part_process

PATIENCE_S = 60.0
LEASE_S = 2.0


class ManagerProcess:
    """A running manager, seen over its control socket."""

    def __init__(self, process: subprocess.Popen[bytes], home: Path) -> None:
        self.process = process
        self.socket = home / "run" / "control.sock"
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://manager", timeout=PATIENCE_S
        )
        self.log = home / "manager.log"

    def register(self, alias: str) -> httpx.Response:
        return self.http.post("/admin/models/register", json={"alias": alias, "fake": True})

    def aliases(self) -> list[str]:
        return [each["alias"] for each in self.http.get("/admin/models").json()["models"]]

    def epoch(self) -> str:
        return str(self.http.get("/admin/status").json()["epoch"])


@contextmanager
def launched(home: Path, store_url: str) -> Iterator[tuple[subprocess.Popen[bytes], Announcement]]:
    """A manager process that has said whether it started."""
    home.mkdir()
    settings = {
        "MODELPOOL_HOME": str(home),
        "MODELPOOL_TOKEN": TOKEN,
        "MODELPOOL_STORE_URL": store_url,
        "MODELPOOL_LEASE": str(LEASE_S),
    }
    with part_process("manager", home / "manager.log", {**os.environ, **settings}) as started:
        yield started


@contextmanager
def running_manager(home: Path, store_url: str) -> Iterator[ManagerProcess]:
    with launched(home, store_url) as (process, announcement):
        assert isinstance(announcement, Ready), announcement
        manager = ManagerProcess(process, home)
        with manager.http:
            yield manager


@pytest.mark.parametrize("store_url", ["postgresql", pytest.param("sqlite", marks=pytest.mark.soak)], indirect=True)
def test_the_older_of_two_managers_changes_nothing(store_url: str, tmp_path: Path) -> None:
    link = tmp_path / "control.sock"
    with running_manager(tmp_path / "first", store_url) as first:
        link.symlink_to(first.socket)
        environ = {"MANAGER_URL": f"unix:{link}", "MODELPOOL_HEARTBEAT_INTERVAL": "0.5", "MODELPOOL_ENGINES": "fake"}
        with running_worker(tmp_path / "worker", **environ) as worker:
            eventually(lambda: first.http.get("/admin/workers").json()["workers"], PATIENCE_S)
            assert first.register("m").status_code == 200
            worker.wait("m", "ACTIVE", within=PATIENCE_S)
            before, pid = first.epoch(), worker.report("m")["pid"]
            os.kill(first.process.pid, signal.SIGSTOP)
            # Asked while it is stopped: it will answer when it goes on.
            asked = subprocess.Popen(
                [sys.executable, "-c", ASK_LATE, str(first.socket)], stdout=subprocess.PIPE, start_new_session=True
            )
            link.unlink()
            with running_manager(tmp_path / "second", store_url) as second:
                link.symlink_to(second.socket)
                assert second.epoch() != before
                # It asked the worker what runs, which has it as its manager from then on.
                assert second.register("n").status_code == 200
                worker.wait("n", "ACTIVE", within=PATIENCE_S)
                assert second.http.delete("/admin/models/m").status_code == 200
                eventually(lambda: worker.instances() == {"n"}, PATIENCE_S)

                os.kill(first.process.pid, signal.SIGCONT)
                assert first.process.wait(PATIENCE_S) == 1
                assert "Another manager has taken over" in first.log.read_text()
                assert asked.communicate(timeout=PATIENCE_S)[0].decode().split()[0] in ("503", "none")

                order = {"model": {"alias": "m", "fake": True}}
                answer = worker.http.post("/instances/start", json=order, headers={"X-ModelPool-Epoch": before})
                assert (answer.status_code, answer.json()["error"]["code"]) == (409, "stale_epoch")
                answer = worker.http.post("/instances/n/stop", headers={"X-ModelPool-Epoch": before})
                assert (answer.status_code, answer.json()["error"]["code"]) == (409, "stale_epoch")
                assert worker.instances() == {"n"}
                assert second.aliases() == ["n"]
                assert worker.below("modelpool: host m") == []
                assert pid not in worker.below()
        with running_manager(tmp_path / "third", store_url) as third:
            assert third.aliases() == ["n"]


ASK_LATE = """
import sys, httpx
try:
    with httpx.Client(transport=httpx.HTTPTransport(uds=sys.argv[1]), timeout=60) as http:
        print(http.post("http://manager/admin/models/register", json={"alias": "late", "fake": True}).status_code)
except httpx.HTTPError as error:
    print("none", error)
"""


def test_a_manager_does_not_start_beside_one_that_is_alive(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    with running_manager(tmp_path / "first", url) as first:
        with launched(tmp_path / "second", url) as (process, announcement):
            assert isinstance(announcement, NotStarted)
            assert f"(process {first.process.pid}), which is alive" in announcement.reason
            assert process.wait(PATIENCE_S) == 1
        assert first.register("m").status_code == 200


def test_a_store_that_cannot_be_reached_is_said_to_and_its_password_is_not(tmp_path: Path) -> None:
    with launched(tmp_path / "home", "postgresql://u:secret@127.0.0.1:1/db") as (process, announcement):
        assert isinstance(announcement, NotStarted)
        assert "The store cannot be used" in announcement.reason
        assert process.wait(PATIENCE_S) == 1
        assert "secret" not in announcement.reason + (tmp_path / "home" / "manager.log").read_text()
