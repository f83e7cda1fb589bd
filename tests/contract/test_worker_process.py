"""A worker as a process: what it starts and leaves, how it finds its manager, and what it outlives."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from modelpool.process import Announcement, NotStarted
from tests.contract.worker_process import (
    TOKEN,
    Control,
    Json,
    WorkerProcess,
    complete,
    eventually,
    launched,
    running_worker,
    serving_control,
)
from tests.promised import promised

FORKSERVER = "modelpool: forkserver"
SPARE = "modelpool: spare host"


def hosts(alias: str = "") -> str:
    return f"modelpool: host {alias}"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# ------------------------------------------------------------ its end, and the end of what is below it


def test_a_dead_forkserver_is_replaced_and_its_hosts_go_on(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        before = worker.start("m")
        (forkserver,) = worker.below(FORKSERVER)
        os.kill(forkserver, signal.SIGKILL)
        assert worker.start("n")["state"] == "ACTIVE"
        assert worker.report("m") == before
        assert complete(worker.http, "/proxy/m/v1/completions", "m").status_code == 200
        assert forkserver not in worker.below(FORKSERVER)
        # The host that was adopted is still seen to end, though nobody can tell how.
        os.kill(before["pid"], signal.SIGKILL)
        assert worker.wait("m", "FAILED", within=5)["reason"].startswith("ended")
        assert worker.start("m")["state"] == "ACTIVE"
        worker.process.terminate()
        assert worker.process.wait(15) == 0
        assert worker.below() == []


def test_a_start_that_met_a_dying_forkserver_is_made_good_by_the_next(tmp_path: Path) -> None:
    with running_worker(tmp_path, MODELPOOL_SPARE_HOSTS="0") as worker:
        worker.start("m")
        (forkserver,) = worker.below(FORKSERVER)
        os.kill(forkserver, signal.SIGSTOP)
        assert worker.order("n").status_code == 200
        eventually(lambda: (worker.report("n")["progress"] or {}).get("phase") == "import")
        os.kill(forkserver, signal.SIGKILL)
        assert worker.wait("n", "ACTIVE")["reason"] == ""


def spares(worker: WorkerProcess, count: int = 1) -> list[int]:
    """Once there are so many."""
    return eventually(lambda: found if len(found := worker.below(SPARE)) == count else None)


def test_a_start_takes_a_host_that_waits_and_another_one_comes_in_its_place(tmp_path: Path) -> None:
    with running_worker(tmp_path, MODELPOOL_SPARE_HOSTS="2") as worker:
        worker.start("first")
        before = spares(worker, 2)
        taken = worker.start("m")["pid"]
        assert taken in before
        assert complete(worker.http, "/proxy/m/v1/completions", "m").status_code == 200
        after = eventually(lambda: found if len(found := set(worker.below(SPARE))) == 2 else None)
        assert taken not in after
        assert len(after | set(before)) == 3


def test_a_waiting_host_that_dies_is_replaced_and_nobody_is_started_in_it(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        worker.start("first")
        (spare,) = spares(worker)
        (forkserver,) = worker.below(FORKSERVER)
        # The forkserver cannot tell of the death; the worker looks for itself.
        os.kill(forkserver, signal.SIGSTOP)
        os.kill(spare, signal.SIGKILL)
        eventually(lambda: psutil.Process(spare).status() == psutil.STATUS_ZOMBIE)
        worker.order("m")
        os.kill(forkserver, signal.SIGCONT)
        assert worker.wait("m", "ACTIVE")["pid"] != spare
        (spare,) = eventually(lambda: [pid for pid in worker.below(SPARE) if pid != spare])
        os.kill(spare, signal.SIGKILL)
        eventually(lambda: [pid for pid in worker.below(SPARE) if pid != spare])
        assert worker.report("m")["state"] == "ACTIVE"


def test_a_waiting_host_outlives_its_forkserver_and_ends_with_its_worker(tmp_path: Path) -> None:
    with running_worker(tmp_path, MODELPOOL_SPARE_HOSTS="3") as worker:
        worker.start("first")
        before = spares(worker, 3)
        (forkserver,) = worker.below(FORKSERVER)
        os.kill(forkserver, signal.SIGSTOP)
        assert worker.start("m")["pid"] in before
        os.kill(forkserver, signal.SIGKILL)
        eventually(lambda: [pid for pid in worker.below(FORKSERVER) if pid != forkserver])
        spares(worker, 3)
        assert worker.start("n")["pid"] in before
        assert complete(worker.http, "/proxy/n/v1/completions", "n").status_code == 200
        worker.kill()
        eventually(lambda: worker.below() == [], within=5)


def test_nobody_waits_longer_than_its_worker(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        worker.start("first")
        (spare,) = spares(worker)
        os.kill(spare, signal.SIGSTOP)
        worker.process.terminate()
        assert worker.process.wait(20) == 0
        assert worker.below() == []


def test_a_killed_worker_takes_its_engines_along(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        worker.start("m")
        worker.order("loading", fake_load_ms=60_000)
        eventually(lambda: len(worker.below(hosts())) == 2)
        worker.kill()
        eventually(lambda: worker.below() == [], within=5)


def test_what_a_killed_worker_could_not_end_is_ended_by_the_next(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        host = worker.start("m")["pid"]
        (forkserver,) = worker.below(FORKSERVER)
        for pid in (forkserver, host):
            os.kill(pid, signal.SIGSTOP)
        worker.kill()
        assert alive(host)
        assert alive(forkserver)
        with running_worker(tmp_path) as successor:
            assert not alive(host)
            assert not alive(forkserver)
            assert successor.http.get("/instances").json() == {"instances": []}
            assert successor.start("m")["state"] == "ACTIVE"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_after_the_requests_in_flight(tmp_path: Path, number: signal.Signals) -> None:
    control = Control()
    with serving_control(control), running_worker(tmp_path, MANAGER_URL=control.url) as worker:
        worker.start("m", fake_delay_ms=700)
        answers: list[int] = []
        request = threading.Thread(
            target=lambda: answers.append(complete(worker.http, "/proxy/m/v1/completions", "m").status_code)
        )
        request.start()
        eventually(lambda: worker.status("m")["inflight_requests"] == 1)
        worker.process.send_signal(number)
        assert worker.process.wait(15) == 0
        request.join()
        assert answers == [200]
        assert worker.below() == []
        assert control.unregistered == ["w"]


def test_a_second_signal_ends_everything_at_once(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        worker.start("m", fake_stall_after_tokens=1)
        body = {"model": "m", "prompt": "x", "stream": True}
        with worker.http.stream("POST", "/proxy/m/v1/completions", json=body):
            began = time.monotonic()
            worker.process.terminate()
            eventually(lambda: "ending" in (tmp_path / "worker.out").read_text())
            worker.process.terminate()
            worker.process.wait(10)
            assert time.monotonic() - began < promised(4)
        eventually(lambda: worker.below() == [], within=5)


def test_ctrl_c_in_a_terminal_reaches_no_engine(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        host = worker.start("m")["pid"]
        groups = {os.getpgid(pid) for pid in worker.below()}
        assert os.getpgid(worker.process.pid) not in groups
        assert os.getsid(host) == host


# ------------------------------------------------------------ not starting


def refusal(announcement: Announcement) -> tuple[str, str]:
    assert isinstance(announcement, NotStarted)
    return announcement.reason, announcement.hint


def test_a_taken_port_is_said_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with launched(tmp_path, WORKER_PORT=port) as (process, announcement):
            reason, hint = refusal(announcement)
            assert f"127.0.0.1:{port}" in reason
            assert "WORKER_PORT" in hint
            assert process.wait(10) == 1


def test_one_worker_of_a_name_at_a_time(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        with launched(tmp_path) as (process, announcement):
            reason, hint = refusal(announcement)
            assert f"process {worker.process.pid}" in reason
            assert "WORKER_ID" in hint
            assert process.wait(10) == 1
        assert worker.http.get("/health").status_code == 200
        with running_worker(tmp_path, WORKER_ID="other") as other:
            assert other.http.get("/info").json()["info"]["worker_id"] == "other"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WORKER_PORT_RANGE", "9-1"),
        ("MODELPOOL_FAKE_DEVICES", "many"),
        ("PUBLIC_URL", "here"),
        ("PUBLIC_URL", "http://jump:${PORT}"),
        ("PUBLIC_URL", "http://10.0.0.1:70000"),
        ("WORKER_PORT", "x"),
    ],
)
def test_settings_of_no_use_are_named(tmp_path: Path, variable: str, value: str) -> None:
    with launched(tmp_path, **{variable: value}) as (process, announcement):
        reason, hint = refusal(announcement)
        assert value in reason
        assert variable in reason + hint
        assert process.wait(10) == 1


# ------------------------------------------------------------ its manager


def test_that_nothing_is_left_of_a_dead_host_is_told_at_once_too(tmp_path: Path) -> None:
    control, slow = Control(), {"MODELPOOL_HEARTBEAT_INTERVAL": "600"}
    with serving_control(control), running_worker(tmp_path, MANAGER_URL=control.url, **slow) as worker:
        os.kill(worker.start("m")["pid"], signal.SIGKILL)

        def last() -> Json | None:
            (report,) = control.heartbeats[-1]["instances"]
            return report if report["state"] == "FAILED" and report["pid"] is None else None

        eventually(last)


def test_every_change_is_told_at_once(tmp_path: Path) -> None:
    control = Control()
    with serving_control(control), running_worker(tmp_path, MANAGER_URL=control.url) as worker:
        first = control.registration()
        assert first["info"]["url"] == worker.url
        assert first["instances"] == []
        assert len(first["devices"]) == 4
        began = time.monotonic()
        worker.start("m")
        eventually(lambda: control.states("m")[-1:] == ["ACTIVE"], within=1)
        worker.stop("m")
        eventually(lambda: control.heartbeats[-1]["instances"] == [], within=1)
        assert time.monotonic() - began < promised(4)  # none of it waited for the interval of 5 s
        assert control.states("m") in (["STARTING", "ACTIVE", "DRAINING"], ["STARTING", "ACTIVE"])
        assert control.tokens == {f"Bearer {TOKEN}"}


def test_a_manager_that_forgot_the_worker_is_told_everything_again(tmp_path: Path) -> None:
    control = Control()
    quick = {"MODELPOOL_HEARTBEAT_INTERVAL": "0.2"}
    with serving_control(control), running_worker(tmp_path, MANAGER_URL=control.url, **quick) as worker:
        worker.start("m")
        eventually(lambda: control.registrations)
        control.knows = False
        again = control.registration(1)
        assert again["info"] == control.registrations[0]["info"]
        assert [each["instance"] for each in again["instances"]] == ["m"]


def test_a_manager_that_was_away_is_found_again_within_seconds(tmp_path: Path) -> None:
    control = Control()
    path = tmp_path / "control.sock"
    quick = {"MODELPOOL_HEARTBEAT_INTERVAL": "0.2"}
    with ExitStack() as stack:
        with serving_control(control, path=path):
            worker = stack.enter_context(running_worker(tmp_path / "home", MANAGER_URL=f"unix:{path}", **quick))
            eventually(lambda: control.heartbeats)
        path.unlink()
        worker.start("m")
        back = Control()
        with serving_control(back, path=path):
            registration = back.registration(within=4)
            assert [each["instance"] for each in registration["instances"]] == ["m"]


def test_a_worker_goes_on_to_the_next_gateway(tmp_path: Path) -> None:
    first, second = Control(), Control()
    quick = {"MODELPOOL_HEARTBEAT_INTERVAL": "0.2"}
    with ExitStack() as stack:
        stack.enter_context(serving_control(second))
        first.gateways = [second.url]
        with serving_control(first):
            stack.enter_context(running_worker(tmp_path, MANAGER_URL=first.url, **quick))
            eventually(lambda: first.heartbeats)
        assert second.registrations == []
        second.registration(within=5)


def test_the_addresses_that_are_announced_can_be_reached(tmp_path: Path) -> None:
    with running_worker(tmp_path / "any", WORKER_HOST="0.0.0.0", MANAGER_URL="http://127.0.0.1:1") as worker:
        assert "0.0.0.0" not in worker.url
        address = worker.start("m")["address"]
        answer = httpx.get(f"http://{address['host']}:{address['port']}/v1/models")
        assert answer.status_code == 401
    public = "http://pool.example/worker/7"
    with launched(tmp_path / "public", PUBLIC_URL=public) as (_, announcement):
        assert getattr(announcement, "url", "") == public


# ------------------------------------------------------------ the real engine's import


def test_health_answers_while_the_real_engine_is_imported(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with running_worker(tmp_path, True) as worker, httpx.Client(timeout=5) as probe:
        assert worker.http.get("/info").json()["engines"]["vllm"]["state"] == "importing"
        worker.order("m", fake_load_ms=500)
        took = []
        for _ in range(100):
            began = time.monotonic()
            assert probe.get(f"{worker.url}/health").status_code == 200
            took.append(time.monotonic() - began)
            time.sleep(0.02)
        took.sort()
        assert took[50] < promised(0.05)
        assert took[-1] < promised(0.5)
        assert worker.wait("m", "ACTIVE")["reason"] == ""
