"""The fake engine keeps the contract, and so do forkserver and host, which do not know what they run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from modelpool.messages.engine import Imported, ImportFailed, Loaded, LoadFailed
from modelpool.messages.models import EngineKind, ModelSpec
from modelpool.testing.engine_driver import ForkserverDriver, HostEnded, processes_of_run, wait_for_none
from tests.engine_contract import AUTHORIZED, CHAT, EngineContract, chat


def echo(**settings: Any) -> ModelSpec:
    return ModelSpec(alias="tiny", fake=True, max_model_len=2048, fake_response="one two three four", **settings)


@pytest.fixture(scope="module")
def forkserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkserverDriver]:
    with ForkserverDriver(EngineKind.FAKE, tmp_path_factory.mktemp("fake")) as forkserver:
        assert isinstance(forkserver.wait_imported(), Imported)
        yield forkserver


class TestFakeEngine(EngineContract):
    long_body: ClassVar[dict[str, Any]] = {"max_tokens": 2000, "ignore_eos": True}
    long_headers: ClassVar[dict[str, str]] = {"X-Fake-Token-Ms": "20"}

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls) -> ModelSpec:
        return echo()

    def test_a_load_error_comes_out_as_it_is(self, forkserver: ForkserverDriver) -> None:
        host = forkserver.start(echo(fake_load_error="The weights are on holiday."))
        assert host.wait_loaded() == LoadFailed(reason="The weights are on holiday.")
        assert forkserver.wait_exited(host.pid).status == 1

    def test_a_slow_start_takes_its_time_and_says_so(self, forkserver: ForkserverDriver) -> None:
        began = time.monotonic()
        host = forkserver.start(echo(fake_load_ms=300))
        assert isinstance(host.wait_loaded(), Loaded)
        assert time.monotonic() - began >= 0.3
        assert host.phases == ["load"]
        host.shutdown(0)
        forkserver.wait_exited(host.pid)

    def test_a_crash_takes_the_process_after_its_tokens_were_sent(self, forkserver: ForkserverDriver) -> None:
        host = forkserver.start(echo(fake_crash_after_tokens=2))
        host.wait_loaded()
        received: list[bytes] = []
        with httpx.stream("POST", host.url + CHAT, json=chat(stream=True), headers=AUTHORIZED) as answer:
            with pytest.raises(httpx.RemoteProtocolError):
                _read_into(received, answer)
        assert forkserver.wait_exited(host.pid).status == -signal.SIGKILL
        assert b"".join(received).count(b'"delta":{"content":"') == 2

    def test_the_capacity_of_the_worker_wins(self, forkserver: ForkserverDriver) -> None:
        host = forkserver.start(echo(fake_capacity=3), capacity=5)
        loaded = host.wait_loaded()
        assert isinstance(loaded, Loaded)
        assert loaded.capacity == 5
        host.shutdown(0)
        forkserver.wait_exited(host.pid)


def _read_into(received: list[bytes], answer: httpx.Response) -> None:
    """All chunks, also those before the connection broke."""
    for chunk in answer.iter_raw():
        received.append(chunk)


# ---------------------------------------------------------------- the forkserver's own life


def own(tmp_path: Path, engine: EngineKind = EngineKind.FAKE, **environment: str) -> ForkserverDriver:
    return ForkserverDriver(engine, tmp_path, environment)


def test_the_death_of_the_worker_ends_everything(tmp_path: Path) -> None:
    with own(tmp_path) as forkserver:
        forkserver.wait_imported()
        for name in ("a", "b"):
            assert isinstance(forkserver.start(ModelSpec(alias=name, fake=True)).wait_loaded(), Loaded)
        forkserver.hang_up()
        assert wait_for_none(forkserver.run_id) == {}


def test_sigterm_ends_everything_and_sigint_nothing(tmp_path: Path) -> None:
    with own(tmp_path) as forkserver:
        forkserver.wait_imported()
        host = forkserver.start(echo())
        host.wait_loaded()
        forkserver.process.send_signal(signal.SIGINT)
        assert host.probe().inflight == 0
        forkserver.process.send_signal(signal.SIGTERM)
        assert forkserver.process.wait(5) == 0
        assert wait_for_none(forkserver.run_id) == {}


def test_it_leaves_no_temporary_folder(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with own(tmp_path, TMPDIR=str(scratch)) as forkserver:
        forkserver.wait_imported()
        forkserver.start(echo()).wait_loaded()
        assert len(list(scratch.glob("modelpool-forkserver-*/*"))) == 1
        forkserver.hang_up()
    assert list(scratch.iterdir()) == []


def test_the_folder_of_a_killed_forkserver_is_removed_by_the_next(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with own(tmp_path, TMPDIR=str(scratch)) as first:
        first.wait_imported()
        host = first.start(echo())
        host.wait_loaded()
        first.process.kill()
        first.process.wait()
        with own(tmp_path, TMPDIR=str(scratch)) as second:
            second.wait_imported()
            second.start(echo()).wait_loaded()
            assert len(list(scratch.glob(f"*/{host.pid}"))) == 1, "a host still lives in it"
            second.adopt(host.pid)
            second.hang_up()
    with own(tmp_path, TMPDIR=str(scratch)) as third:
        third.wait_imported()
        third.fork("made").control.close()
        assert len(list(scratch.iterdir())) == 1
        third.hang_up()
    assert list(scratch.iterdir()) == []


def test_hosts_outlive_a_forkserver_and_end_with_the_one_that_adopts_them(tmp_path: Path) -> None:
    with own(tmp_path) as first, own(tmp_path) as second:
        first.wait_imported()
        second.wait_imported()
        dying, living = (first.start(ModelSpec(alias=name, fake=True)) for name in ("dying", "living"))
        for host in (dying, living):
            host.wait_loaded()
        first.process.kill()
        first.process.wait()
        assert living.probe().inflight == 0
        second.adopt(dying.pid, living.pid)
        os.kill(dying.pid, signal.SIGKILL)
        assert second.wait_exited(dying.pid).status is None
        second.hang_up()
        assert wait_for_none(first.run_id) == {}


def test_adopting_what_is_gone_says_so(tmp_path: Path) -> None:
    with own(tmp_path) as forkserver:
        forkserver.wait_imported()
        host = forkserver.start(echo(fake_load_error="ends at once"))
        forkserver.wait_exited(host.pid)
        forkserver.adopt(host.pid)
        assert forkserver.wait_exited(host.pid).status is None


def test_a_host_that_is_told_nothing_ends_with_its_socket(tmp_path: Path) -> None:
    with own(tmp_path) as forkserver:
        forkserver.wait_imported()
        host = forkserver.fork("silent")
        host.control.close()
        assert forkserver.wait_exited(host.pid).status == 0


def test_a_host_holds_no_socket_of_another_one(tmp_path: Path) -> None:
    with own(tmp_path) as forkserver:
        forkserver.wait_imported()
        first = forkserver.fork("first")
        second = forkserver.fork("second")
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(HostEnded):
            first.receive(2)
        assert second.pid in processes_of_run(forkserver.run_id)


def test_a_fork_asked_for_during_the_imports_is_served_after_them(tmp_path: Path) -> None:
    _write(tmp_path / "path" / "sitecustomize.py", "import time; time.sleep(0.3)")
    with own(tmp_path, PYTHONPATH=str(tmp_path / "path")) as forkserver:
        early = forkserver.begin_fork("early")
        assert isinstance(forkserver.wait_imported(), Imported)
        started = forkserver.end_fork(early, "early")
        started.send(forkserver.spec(echo()))
        assert isinstance(started.wait_loaded(), Loaded)


# ---------------------------------------------------------------- imports that fail


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "vllm":
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

sys.meta_path.insert(0, Hidden())
"""


def test_an_engine_that_is_not_installed_is_missing(tmp_path: Path) -> None:
    _write(tmp_path / "path" / "sitecustomize.py", HIDDEN)
    with own(tmp_path, EngineKind.VLLM, PYTHONPATH=str(tmp_path / "path")) as forkserver:
        outcome = forkserver.wait_imported()
        assert isinstance(outcome, ImportFailed)
        assert outcome.missing
        assert "pip install 'modelpool[" in outcome.reason
        assert forkserver.process.wait(5) == 1


def test_an_engine_that_is_broken_says_how_in_one_line(tmp_path: Path) -> None:
    _write(tmp_path / "path" / "vllm" / "__init__.py", "raise OSError('libcudart.so.13 is not there\\nand more')")
    with own(tmp_path, EngineKind.VLLM, PYTHONPATH=str(tmp_path / "path")) as forkserver:
        outcome = forkserver.wait_imported()
        assert outcome == ImportFailed(reason="The engine cannot be imported: OSError: libcudart.so.13 is not there")


def test_a_process_with_threads_is_not_forked(tmp_path: Path) -> None:
    code = "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    _write(tmp_path / "path" / "sitecustomize.py", code)
    with own(tmp_path, PYTHONPATH=str(tmp_path / "path")) as forkserver:
        outcome = forkserver.wait_imported()
        assert isinstance(outcome, ImportFailed)
        assert "1 threads" in outcome.reason


def test_the_end_of_the_worker_during_the_imports_is_noticed_at_once(tmp_path: Path) -> None:
    mark = tmp_path / "importing"
    _write(
        tmp_path / "path" / "vllm" / "__init__.py",
        f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)",
    )
    with own(tmp_path, EngineKind.VLLM, PYTHONPATH=str(tmp_path / "path")) as forkserver:
        deadline = time.monotonic() + 10
        while not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        forkserver.hang_up(timeout_s=1)
