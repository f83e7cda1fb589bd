"""What every engine does, from the worker's point of view: run against the fake engine and against vLLM."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil
import pytest

from modelpool.messages.engine import HostStatus, Loaded, LoadFailed, SleepRefused, Slept, Woken
from modelpool.messages.models import ModelSpec
from modelpool.testing.engine_driver import TOKEN, ForkserverDriver, HostDriver, processes_of_run
from tests.promised import promised

AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
CHAT = "/v1/chat/completions"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **fields}


class EngineContract:
    """Subclasses offer a class-wide `forkserver` and a `model` of alias `tiny`.

    The `long_` ones make a request last for many seconds; `second_tokens` for a second or two.
    """

    long_body: ClassVar[dict[str, Any]]
    long_headers: ClassVar[dict[str, str]] = {}
    load_s = 20.0
    second_tokens = 300

    @pytest.fixture
    def host(self, forkserver: ForkserverDriver, model: ModelSpec) -> Iterator[HostDriver]:
        """A host of the test's own, which may break it."""
        with _running(forkserver, self.load_s, model) as host:
            yield host

    @pytest.fixture(scope="class")
    @classmethod
    def shared(cls, forkserver: ForkserverDriver, model: ModelSpec) -> Iterator[HostDriver]:
        """One host for all tests that leave it as they found it: awake and idle."""
        log_path = str(forkserver.folder / "shared.log")
        with _running(forkserver, cls.load_s, model, instance="shared", log_path=log_path) as host:
            yield host

    def post(self, host: HostDriver, body: Any, path: str = CHAT, **headers: str) -> httpx.Response:
        return httpx.post(host.url + path, json=body, headers={**AUTHORIZED, **headers}, timeout=promised(60))

    def start_long(self, host: HostDriver, *, stream: bool) -> socket.socket:
        """A request that lasts, on a connection of its own; returns once the host counts it as running."""
        assert host.loaded is not None
        before = host.probe().running
        connection = socket.create_connection(("127.0.0.1", host.loaded.port))
        headers = {**AUTHORIZED, **self.long_headers}
        request = httpx.Request("POST", host.url + CHAT, json=chat(**self.long_body, stream=stream), headers=headers)
        lines = [f"POST {CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items())]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + request.content)
        host.probe_until(lambda status: status.running > before)
        return connection

    # ------------------------------------------------------------ answers

    def test_a_host_says_what_it_can_do(self, shared: HostDriver) -> None:
        assert shared.loaded is not None
        assert shared.phases
        assert shared.loaded.capacity >= 1
        assert shared.loaded.max_model_len == 2048

    def test_it_serves_the_model_under_its_alias(self, shared: HostDriver) -> None:
        models = httpx.get(shared.url + "/v1/models", headers=AUTHORIZED).json()["data"]
        assert [model["id"] for model in models] == ["tiny"]
        answer = self.post(shared, chat())
        assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
        assert answer.json()["usage"]["completion_tokens"] == 4

    def test_a_stream_has_a_chunk_for_each_token_and_ends_with_usage(self, shared: HostDriver) -> None:
        answer = self.post(shared, chat(stream=True, stream_options={"include_usage": True}))
        data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        assert '"completion_tokens":4' in data[-2].replace(" ", "")
        assert len(data) == 1 + 4 + 1 + 1

    @pytest.mark.parametrize(
        ("body", "status", "param"),
        [({**chat(), "model": "other"}, 404, "model"), (chat(max_tokens="many"), 400, None)],
    )
    def test_errors_are_vllms(self, shared: HostDriver, body: Any, status: int, param: str | None) -> None:
        answer = self.post(shared, body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, status)
        assert set(error) == {"message", "type", "param", "code"}
        if param:
            assert error["param"] == param

    def test_without_the_token_nothing_answers(self, shared: HostDriver) -> None:
        for path in ("/health", "/metrics", "/v1/models"):
            answer = httpx.get(shared.url + path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(shared.url + "/health", headers=AUTHORIZED).status_code == 200

    def test_metrics_have_vllms_names(self, shared: HostDriver) -> None:
        text = httpx.get(shared.url + "/metrics", headers=AUTHORIZED).text
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
            assert f"\n{name}{{" in "\n" + text

    # ------------------------------------------------------------ counting

    def test_a_probe_tells_what_was_served(self, shared: HostDriver) -> None:
        before = shared.probe().requests_total
        self.post(shared, chat())
        self.post(shared, {**chat(), "model": "other"})
        status = shared.probe_until(_is_idle)  # the client has the last byte a moment before it is counted
        assert status.requests_total == before + 2
        assert 0 < (status.ttft_last or 0) <= (status.e2e_last or 0)
        assert 0 < (status.ttft_avg or 0) <= (status.e2e_avg or 0)
        assert not status.draining

    @pytest.mark.parametrize("stream", [True, False], ids=["stream", "at once"])
    def test_when_a_client_leaves_its_request_ends(self, shared: HostDriver, stream: bool) -> None:
        """Long before it would end by itself; e2e/test_engine_aborts.py knows of what happens within a second."""
        connection = self.start_long(shared, stream=stream)
        connection.close()
        shared.probe_until(_is_idle, timeout_s=promised(4))

    # ------------------------------------------------------------ sleep

    def says(self, host: HostDriver) -> str:
        text: str = self.post(host, chat(max_tokens=12, temperature=0)).json()["choices"][0]["message"]["content"]
        return text

    @pytest.mark.parametrize("levels", [(1,), (2,), (1, 2)], ids=str)
    def test_it_sleeps_refuses_and_says_the_same_after_waking(
        self, shared: HostDriver, levels: tuple[int, ...]
    ) -> None:
        before = self.says(shared)
        for _ in range(2):
            for level in levels:
                answer = shared.sleep(level)
                assert isinstance(answer, Slept), answer
                assert answer.level == level
            began = time.monotonic()
            refused = self.post(shared, chat())
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "instance_draining")
            assert time.monotonic() - began < promised(1)
            assert shared.probe().draining
            woken = shared.wake()
            assert isinstance(woken, Woken), woken
            assert (woken.level, woken.canary_s <= woken.seconds) == (levels[-1], True)
            assert not shared.probe().draining
            assert self.says(shared) == before

    def test_requests_end_before_it_sleeps(self, shared: HostDriver) -> None:
        answers: list[httpx.Response] = []
        body = chat(max_tokens=self.second_tokens, ignore_eos=True)
        asking = threading.Thread(target=lambda: answers.append(self.post(shared, body, **{"X-Fake-Token-Ms": "3"})))
        asking.start()
        shared.probe_until(lambda status: status.running == 1)
        assert isinstance(shared.sleep(1, drain_s=promised(60), timeout_s=promised(60)), Slept)
        asking.join(promised(5))
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [self.second_tokens]
        assert isinstance(shared.wake(), Woken)

    def test_it_stays_awake_where_requests_do_not_end(self, shared: HostDriver) -> None:
        connection = self.start_long(shared, stream=True)
        answer = shared.sleep(1, drain_s=0.2)
        assert answer == SleepRefused("1 requests were in flight after 0.2 s")
        assert self.post(shared, chat()).status_code == 200
        connection.close()
        shared.probe_until(_is_idle)
        assert isinstance(shared.sleep(1), Slept)
        assert isinstance(shared.wake(), Woken)

    @pytest.mark.parametrize("level", [pytest.param(1, marks=pytest.mark.soak), 2])
    def test_a_sleeper_can_be_ended(self, forkserver: ForkserverDriver, host: HostDriver, level: int) -> None:
        assert isinstance(host.sleep(level), Slept)
        host.shutdown(drain_s=60)
        assert forkserver.wait_exited(host.pid, 20).status == 0

    def test_a_level_that_there_is_not_is_refused(self, shared: HostDriver) -> None:
        assert isinstance(shared.sleep(3), SleepRefused)
        assert self.post(shared, chat()).status_code == 200

    # ------------------------------------------------------------ the end

    def test_a_shutdown_lets_requests_end_and_takes_no_more(
        self, forkserver: ForkserverDriver, host: HostDriver
    ) -> None:
        answers: list[httpx.Response] = []
        body = chat(max_tokens=self.second_tokens, ignore_eos=True)
        asking = threading.Thread(target=lambda: answers.append(self.post(host, body, **{"X-Fake-Token-Ms": "3"})))
        # Connected before, as a gateway is.
        with httpx.Client(base_url=host.url, headers=AUTHORIZED) as client:
            client.get("/health")
            asking.start()
            host.probe_until(lambda status: status.running == 1)
            host.shutdown(drain_s=promised(60))
            host.probe_until(lambda status: status.draining)
            refused = client.post(CHAT, json=chat())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "instance_draining")
        asking.join(promised(60))
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [self.second_tokens]
        assert forkserver.wait_exited(host.pid, 20).status == 0

    def test_a_shutdown_cuts_what_is_still_running_at_its_deadline(
        self, forkserver: ForkserverDriver, host: HostDriver
    ) -> None:
        connection = self.start_long(host, stream=True)
        began = time.monotonic()
        host.shutdown(drain_s=0.2)
        assert forkserver.wait_exited(host.pid, 20).status == 0
        assert time.monotonic() - began < promised(10)
        connection.close()

    def test_a_killed_host_is_reported_and_leaves_nothing(self, forkserver: ForkserverDriver, host: HostDriver) -> None:
        def folders() -> list[Path]:
            return list(Path(tempfile.gettempdir()).glob(f"modelpool-forkserver-*/{host.pid}"))

        assert len(folders()) == 1
        os.kill(host.pid, signal.SIGKILL)
        assert forkserver.wait_exited(host.pid, promised(2)).status == -signal.SIGKILL
        assert folders() == []
        _wait_gone(forkserver, host)

    def test_a_host_that_is_stopped_can_be_killed(self, forkserver: ForkserverDriver, host: HostDriver) -> None:
        os.kill(host.pid, signal.SIGSTOP)
        os.kill(host.pid, signal.SIGKILL)
        assert forkserver.wait_exited(host.pid, promised(2)).status == -signal.SIGKILL
        _wait_gone(forkserver, host)

    def test_a_host_ends_when_its_worker_is_gone(self, forkserver: ForkserverDriver, host: HostDriver) -> None:
        host.control.close()
        assert forkserver.wait_exited(host.pid, promised(2)).status == -signal.SIGKILL
        _wait_gone(forkserver, host)

    def test_a_host_ends_when_its_worker_goes_while_it_loads(
        self, forkserver: ForkserverDriver, model: ModelSpec
    ) -> None:
        host = forkserver.start(model)
        host.receive(self.load_s)
        host.control.close()
        assert forkserver.wait_exited(host.pid, promised(3)).status == -signal.SIGKILL
        _wait_gone(forkserver, host)

    def test_sigterm_ends_a_host_cleanly(self, forkserver: ForkserverDriver, host: HostDriver) -> None:
        os.kill(host.pid, signal.SIGTERM)
        assert forkserver.wait_exited(host.pid, 20).status == 0

    # ------------------------------------------------------------ the start

    def test_its_name_and_its_log_say_which_instance_it_is(
        self, forkserver: ForkserverDriver, host: HostDriver
    ) -> None:
        assert processes_of_run(forkserver.run_id)[host.pid] == "modelpool: host tiny"
        assert os.readlink(f"/proc/{host.pid}/cwd") == str(forkserver.folder)
        log = forkserver.folder / "tiny.log"
        assert "serving on port" in log.read_text()
        # As copytruncate does; what is written next stands at the new end.
        os.truncate(log, 0)
        host.shutdown()
        forkserver.wait_exited(host.pid)
        assert log.read_bytes().strip(b"\0") == log.read_bytes()
        assert "draining" in log.read_text()

    def test_two_hosts_run_side_by_side(self, forkserver: ForkserverDriver, model: ModelSpec, host: HostDriver) -> None:
        other = forkserver.start(model, instance="tiny-r2")
        assert isinstance(other.wait_loaded(self.load_s), Loaded)
        assert other.url != host.url
        assert [self.post(each, chat()).status_code for each in (host, other)] == [200, 200]
        os.kill(other.pid, signal.SIGKILL)
        forkserver.wait_exited(other.pid)
        assert self.post(host, chat()).status_code == 200

    def test_it_takes_the_first_free_port_of_its_range(self, forkserver: ForkserverDriver, model: ModelSpec) -> None:
        with _taken_port() as taken:
            port = taken.getsockname()[1]
            refused = forkserver.start(model, ports=(port, port)).wait_loaded(self.load_s)
            assert isinstance(refused, LoadFailed)
            assert f"no free port from {port} to {port}" in refused.reason
            host = forkserver.start(model, ports=(port, port + 20))
            loaded = host.wait_loaded(self.load_s)
        assert isinstance(loaded, Loaded)
        assert port < loaded.port <= port + 20
        host.control.close()
        forkserver.wait_exited(host.pid)


@contextmanager
def _running(forkserver: ForkserverDriver, load_s: float, model: ModelSpec, **changes: Any) -> Iterator[HostDriver]:
    host = forkserver.start(model, **changes)
    loaded = host.wait_loaded(load_s)
    assert isinstance(loaded, Loaded), loaded
    yield host
    host.control.close()
    _wait_gone(forkserver, host)


def _is_idle(status: HostStatus) -> bool:
    return (status.inflight, status.running, status.waiting) == (0, 0, 0)


def _taken_port() -> socket.socket:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


def _wait_gone(forkserver: ForkserverDriver, host: HostDriver) -> None:
    """Nothing is left of the host but its forkserver, which may be serving others."""
    deadline = time.monotonic() + 5
    while group := _group(host.pid):
        assert time.monotonic() < deadline, f"left over: {group}"
        time.sleep(0.02)
    assert forkserver.process.poll() is None


def _group(leader: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(str(process))
    return found
