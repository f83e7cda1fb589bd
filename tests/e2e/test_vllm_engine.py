"""vLLM keeps the engine contract, with its own processes, queues and errors below it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from msgspec.structs import replace

from modelpool import demo
from modelpool.messages.engine import Imported, Loaded, LoadFailed, SleepRefused, Slept, WakeFailed, Woken
from modelpool.messages.models import EngineKind, ModelSpec
from modelpool.testing.engine_driver import ForkserverDriver, HostDriver, processes_of_run
from modelpool.testing.tiny_models import make_embedding_model, make_lora_adapter, make_text_model
from tests.engine_contract import AUTHORIZED, CHAT, EngineContract, chat
from tests.promised import promised

SMALL: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_text_model(folder / "text", max_model_len=2048)
    make_embedding_model(folder / "embedding")
    return folder


@pytest.fixture(scope="module")
def forkserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkserverDriver]:
    with ForkserverDriver(EngineKind.VLLM, tmp_path_factory.mktemp("vllm")) as forkserver:
        outcome = forkserver.wait_imported(promised(120))
        assert isinstance(outcome, Imported), outcome
        yield forkserver


def spec(path: Path, **changes: Any) -> ModelSpec:
    engine_args = {**SMALL, **changes.pop("engine_args", {})}
    return ModelSpec(alias="tiny", model_name=str(path), engine_args=engine_args, **changes)


def in_three(model: ModelSpec) -> ModelSpec:
    """With a process for its worker, which on a CPU it has where there are several, or a user asks for it."""
    return replace(model, engine_args={**model.engine_args, "distributed_executor_backend": "mp"})


def process(forkserver: ForkserverDriver, host: HostDriver, name: str) -> int:
    """The one process of a host that is called so."""
    titles = processes_of_run(forkserver.run_id)
    [pid] = [pid for pid, title in titles.items() if name in title and os.getpgid(pid) == host.pid]
    return pid


def started(forkserver: ForkserverDriver, model: ModelSpec, **changes: Any) -> HostDriver:
    host = forkserver.start(model, **changes)
    loaded = host.wait_loaded(promised(60))
    assert isinstance(loaded, Loaded), loaded
    return host


def ended(forkserver: ForkserverDriver, host: HostDriver) -> None:
    host.shutdown(0)
    assert forkserver.wait_exited(host.pid, 20).status == 0


class TestVllmEngine(EngineContract):
    long_body: ClassVar[dict[str, Any]] = {"max_tokens": 1900, "ignore_eos": True}
    load_s = 60.0
    second_tokens = 900

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, models: Path) -> ModelSpec:
        return spec(models / "text")

    def test_its_facts_are_those_of_the_engine(self, shared: HostDriver) -> None:
        loaded = shared.loaded
        assert loaded is not None
        assert (loaded.capacity, loaded.max_num_seqs, loaded.block_size) == (8, 8, 128)
        assert (loaded.num_gpu_blocks or 0) * 128 >= 2048
        assert loaded.max_num_batched_tokens

    def test_a_probe_shows_the_cache_in_use(self, shared: HostDriver) -> None:
        connection = self.start_long(shared, stream=True)
        status = shared.probe_until(lambda status: bool(status.kv_cache_usage))
        assert 0 < (status.kv_cache_usage or 0) < 1
        connection.close()
        shared.probe_until(lambda status: not status.kv_cache_usage)

    def test_a_start_says_where_its_time_went(self, shared: HostDriver) -> None:
        assert shared.loaded is not None
        names = [phase.name for phase in shared.loaded.phases]
        assert names == ["configuration", "processes", "weights", "kv_cache", "warm_up", "app"]
        assert all(phase.seconds > 0 for phase in shared.loaded.phases)

    @pytest.mark.parametrize("name", ["VLLM::EngineCore", "VLLM::Worker"])
    @pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["running", "stopped"])
    def test_the_death_of_one_of_its_processes_ends_it(
        self, forkserver: ForkserverDriver, model: ModelSpec, name: str, stopped: bool
    ) -> None:
        host = started(forkserver, in_three(model) if "Worker" in name else model)
        connections = [self.start_long(host, stream=stream) for stream in (True, False)]
        pid = process(forkserver, host, name)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        assert forkserver.wait_exited(host.pid, promised(4)).status == 1
        assert "the engine died" in (forkserver.folder / "tiny.log").read_text().splitlines()[-1]
        for connection in connections:
            answer = _rest(connection)
            ended_before = b'"finish_reason":"length"' in answer
            assert ended_before or b"InternalServerError" in answer or answer.endswith(b"\r\n\r\n") or not answer

    @pytest.mark.parametrize("name", [pytest.param("VLLM::EngineCore", marks=pytest.mark.soak), "VLLM::Worker"])
    def test_the_death_of_one_of_its_processes_ends_a_sleeper_too(
        self, forkserver: ForkserverDriver, model: ModelSpec, name: str
    ) -> None:
        host = started(forkserver, in_three(model) if "Worker" in name else model)
        assert isinstance(host.sleep(2), Slept)
        os.kill(process(forkserver, host, name), signal.SIGKILL)
        assert forkserver.wait_exited(host.pid, promised(4)).status == 1

    def test_a_shutdown_does_not_wait_for_an_engine_that_is_stopped(
        self, forkserver: ForkserverDriver, host: HostDriver
    ) -> None:
        os.kill(process(forkserver, host, "VLLM::EngineCore"), signal.SIGSTOP)
        host.shutdown(0)
        assert forkserver.wait_exited(host.pid, promised(10)).status == 0

    @pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "with its resource tracker"])
    def test_shared_memory_goes_with_it_however_it_ends(
        self, forkserver: ForkserverDriver, model: ModelSpec, how: str
    ) -> None:
        host = started(forkserver, in_three(model))
        segments = _shared_memory(process(forkserver, host, "VLLM::EngineCore"))
        assert segments
        if how == "with its resource tracker":
            for pid, title in processes_of_run(forkserver.run_id).items():
                if "resource_tracker" in title:
                    os.kill(pid, signal.SIGKILL)
        os.kill(host.pid, signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        forkserver.wait_exited(host.pid, 20)
        deadline = time.monotonic() + promised(5)
        while any(segment.exists() for segment in segments):
            assert time.monotonic() < deadline
            time.sleep(0.02)


# ---------------------------------------------------------------- kinds of models and arguments


def test_a_default_registration_works_on_a_cpu(forkserver: ForkserverDriver, models: Path) -> None:
    model = ModelSpec(alias="tiny", model_name=str(models / "text"), engine_args={"enforce-eager": True})
    host = started(forkserver, model)
    assert host.loaded is not None
    assert host.loaded.max_model_len == 2048
    assert httpx.post(host.url + CHAT, json=chat(), headers=AUTHORIZED, timeout=30).status_code == 200
    ended(forkserver, host)


@pytest.mark.soak  # 20 s
def test_threads_are_bound_when_a_user_says_so(forkserver: ForkserverDriver, models: Path) -> None:
    """Then vLLM spawns its processes, since OpenMP reads its environment when it is loaded: slower, but as asked."""
    cpu = min(os.sched_getaffinity(0))
    host = started(forkserver, spec(models / "text"), env={"VLLM_CPU_OMP_THREADS_BIND": str(cpu)})
    assert "core ids=[" in (forkserver.folder / "tiny.log").read_text()
    assert httpx.post(host.url + CHAT, json=chat(), headers=AUTHORIZED, timeout=30).status_code == 200
    ended(forkserver, host)


def test_a_key_of_vllms_own_does_not_lock_the_gateway_out(forkserver: ForkserverDriver, models: Path) -> None:
    host = started(forkserver, spec(models / "text"), env={"VLLM_API_KEY": "another"})
    assert httpx.get(host.url + "/v1/models", headers=AUTHORIZED).status_code == 200
    ended(forkserver, host)


# ---------------------------------------------------------------- sleep


def test_an_embedding_model_sleeps_and_embeds_the_same(forkserver: ForkserverDriver, models: Path) -> None:
    host = started(forkserver, spec(models / "embedding"))

    def vector() -> list[float]:
        body = {"model": "tiny", "input": "hello"}
        answer = httpx.post(host.url + "/v1/embeddings", json=body, headers=AUTHORIZED)
        found: list[float] = answer.json()["data"][0]["embedding"]
        return found

    before = vector()
    assert sum(value * value for value in before) == pytest.approx(1, abs=0.01)
    for level in (1, 2):
        assert isinstance(host.sleep(level), Slept)
        assert isinstance(host.wake(), Woken)
        assert vector() == before
    ended(forkserver, host)


def test_adapters_are_there_again_after_every_level(forkserver: ForkserverDriver, models: Path, tmp_path: Path) -> None:
    adapter = make_lora_adapter(tmp_path / "adapter", base=models / "text")
    host = started(
        forkserver, spec(models / "text", engine_args={"enable_lora": True, "lora_modules": [f"ad={adapter}"]})
    )

    def says(model: str) -> str:
        body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(host.url + "/v1/completions", json=body, headers=AUTHORIZED)
        text: str = answer.json()["choices"][0]["text"]
        return text

    before = [says("tiny"), says("ad")]
    assert before[0] != before[1]
    for level in (1, 2, 2):
        assert isinstance(host.sleep(level), Slept)
        assert isinstance(host.wake(), Woken)
        assert [says("tiny"), says("ad")] == before
    ended(forkserver, host)


WAKES = [
    ("text", "ZeroedLayer"),
    ("demo", "SwappedLayers"),
    ("embedding", "SkippedReload"),
    *(
        pytest.param(model, damage, marks=pytest.mark.soak)
        for model, damage in [
            ("text", "SwappedLayers"),
            ("text", "SkippedReload"),
            ("demo", "ZeroedLayer"),
            ("demo", "SkippedReload"),
            ("embedding", "ZeroedLayer"),
            ("embedding", "SwappedLayers"),
        ]
    ),
]


@pytest.mark.parametrize(("model", "damage"), WAKES)
def test_a_wake_that_vllm_takes_for_good_is_found_out(
    forkserver: ForkserverDriver, models: Path, model: str, damage: str
) -> None:
    path = demo.model_path() if model == "demo" else models / model
    extension = {"worker_extension_cls": f"modelpool.testing.broken_wakes.{damage}"}
    host = started(forkserver, spec(path, engine_args=extension))
    assert isinstance(host.sleep(1), Slept)
    assert isinstance(host.wake(), Woken), "level 1 reloads nothing"
    assert isinstance(host.sleep(2), Slept)
    answer = host.wake()
    assert isinstance(answer, WakeFailed)
    print(f"\n{model}, {damage}: {answer.reason}")
    assert answer.reason.startswith("wrong after waking from level 2: the model is not what it was")
    assert forkserver.wait_exited(host.pid, 20).status == 1


def test_an_extension_of_a_users_own_takes_the_levels_away_and_nothing_else(
    forkserver: ForkserverDriver, models: Path
) -> None:
    host = started(forkserver, spec(models / "text", engine_args={"worker_extension_cls": "argparse.Action"}))
    assert host.loaded is not None
    assert host.loaded.sleep_levels == ()
    assert isinstance(host.sleep(1), SleepRefused)
    assert httpx.post(host.url + CHAT, json=chat(), headers=AUTHORIZED, timeout=30).status_code == 200
    ended(forkserver, host)


# ---------------------------------------------------------------- why a model cannot be loaded


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def _without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without("config.json"), "has no config.json"),
        (_without("tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
        (_without("model.safetensors"), "Cannot find any model weights"),
        (_truncate, "model.safetensors is damaged"),
        (_config(architectures=["NoSuchModel"]), "Model architectures ['NoSuchModel'] are not supported"),
        (_config(hidden_size=256), "size"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    ],
)
def test_a_damaged_model_is_refused_with_the_reason(
    forkserver: ForkserverDriver, models: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    folder = shutil.copytree(models / "text", tmp_path / "damaged")
    damage(folder)
    _expect_refusal(forkserver, spec(folder), says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_model_len": 100_000}, "max_model_len (100000) is greater"),
        ({"tensor_parallel_size": 7}, "must be divisible by tensor parallel size (7)"),
        ({"engine_args": {"kv_cache_memory_bytes": 200_000}}, "KV cache"),
        ({"engine_args": {"kv_cache_memory_bytes": 10**15}}, "Available memory"),
        ({"engine_args": {"max_num_seqz": 3}}, "engine_args.max_num_seqz: vLLM has no such argument; did you mean max"),
        ({"engine_args": {"max-num-seqs": "many"}}, "engine_args.max_num_seqs: invalid int value: 'many'"),
        ({"engine_args": {"dtype": "float7"}}, "engine_args.dtype: invalid choice"),
        ({"engine_args": {"config": "/etc/passwd"}}, "engine_args.config: not for an engine that a pool hosts"),
        ({"engine_args": {"enable_auto_tool_choice": True}}, "requires --tool-call-parser"),
        ({"engine_args": {"enable_lora": True, "lora_modules": ["a=/nowhere"]}}, "/nowhere"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_with_the_reason(
    forkserver: ForkserverDriver, models: Path, changes: dict[str, Any], says: str
) -> None:
    _expect_refusal(forkserver, spec(models / "text", **changes), says)


def test_a_path_that_does_not_exist_is_refused(forkserver: ForkserverDriver) -> None:
    _expect_refusal(forkserver, spec(Path("/no/such/model")), "The model path /no/such/model does not exist.")


def _expect_refusal(forkserver: ForkserverDriver, model: ModelSpec, says: str) -> None:
    host = forkserver.start(model)
    outcome = host.wait_loaded(promised(60))
    assert isinstance(outcome, LoadFailed)
    assert says in outcome.reason
    assert "Traceback" not in outcome.reason
    assert "root cause above" not in outcome.reason
    assert len(outcome.reason.splitlines()) <= 2
    assert forkserver.wait_exited(host.pid, 20).status == 1


# ----------------------------------------------------------------


def _rest(connection: socket.socket) -> bytes:
    """All that comes until the other side closes; it must, within seconds."""
    connection.settimeout(promised(5))
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionError:
        pass
    connection.close()
    return data


def _shared_memory(pid: int) -> set[Path]:
    """The queues that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[-1]) for line in lines if "/dev/shm/" in line}
