"""The parts of a worker that need no process: what they read is a folder, what they choose is a value."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpool.process import StartupError
from modelpool.process_table import family, read_processes, with_variable
from modelpool.relay.inference import inference_methods
from modelpool.worker.address import hosts_bind, local_host, reachable_host, url_of
from modelpool.worker.devices import visible_indices
from modelpool.worker.fetch import DiskFull, RepoFile, check_disk, needed_files
from modelpool.worker.host_spec import TAG, forkserver_environment, host_environment
from modelpool.worker.instance_log import InstanceLog
from modelpool.worker.memory import MachineMemory, machine_memory, page_cache_room, tree_bytes
from modelpool.worker.model_files import cached_models, hub_cache, is_complete
from modelpool.worker.ports import port_range

GB = 10**9


# ------------------------------------------------------------ settings


@pytest.mark.parametrize(("text", "ports"), [("", (0, 0)), ("7100-7199", (7100, 7199)), (" 80 - 80 ", (80, 80))])
def test_a_port_range_is_a_pair(text: str, ports: tuple[int, int]) -> None:
    assert port_range(text) == ports


@pytest.mark.parametrize("text", ["7100", "7199-7100", "0-10", "1-65536", "a-b", "-5", "1-2-3"])
def test_a_port_range_of_no_use_is_refused_with_the_variable_to_set(text: str) -> None:
    with pytest.raises(StartupError) as refused:
        port_range(text)
    assert repr(text) in refused.value.reason
    assert "WORKER_PORT_RANGE" in refused.value.hint


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [0, 2]),
        ("1,7,2", [1]),
        ("GPU-bb", [1]),
        ("GPU-", [0]),
        ("-1", []),
        ("1,1", [1]),
    ],
)
def test_only_visible_gpus_are_used(visible: str | None, indices: list[int]) -> None:
    assert visible_indices(visible, {0: "GPU-aaaa", 1: "GPU-bbbb", 2: "GPU-cccc"}) == indices


# ------------------------------------------------------------ addresses


def test_an_address_that_means_all_is_announced_as_one_that_can_be_reached() -> None:
    assert reachable_host("10.0.0.7", "http://10.0.0.1:8000") == "10.0.0.7"
    assert reachable_host("0.0.0.0", "http://127.0.0.1:8000") == "127.0.0.1"
    assert reachable_host("0.0.0.0", "unix:/run/control.sock") == "127.0.0.1"
    assert local_host("0.0.0.0") == "127.0.0.1"
    assert local_host("10.0.0.7") == "10.0.0.7"
    assert url_of("::1", 7000) == "http://[::1]:7000"


def test_hosts_behind_a_proxy_listen_on_loopback_only() -> None:
    assert hosts_bind("0.0.0.0", direct=True) == "0.0.0.0"
    assert hosts_bind("0.0.0.0", direct=False) == "127.0.0.1"
    assert hosts_bind("::", direct=False) == "::1"


# ------------------------------------------------------------ environments


def test_a_forkserver_gets_no_secret_and_one_thread() -> None:
    environ = {"PATH": "/bin", "HF_TOKEN": "s", "MODELPOOL_TOKEN": "s", "CUDA_VISIBLE_DEVICES": "3", "VLLM_X": "1"}
    environment = forkserver_environment(environ, tag="/home:w", run_id="r")
    assert {"PATH": "/bin", "VLLM_X": "1", TAG: "/home:w", "MODELPOOL_RUN_ID": "r"}.items() <= environment.items()
    assert {"OPENBLAS_NUM_THREADS": "1", "SPT_NOENV": "1"}.items() <= environment.items()
    assert not {"HF_TOKEN", "MODELPOOL_TOKEN", "CUDA_VISIBLE_DEVICES"} & environment.keys()
    chosen = forkserver_environment({"OMP_NUM_THREADS": "7"}, tag="", run_id="")
    assert chosen["OMP_NUM_THREADS"] == "7"


def test_a_host_gets_its_devices_and_what_is_for_its_engine() -> None:
    environ = {"PATH": "/bin", "HF_TOKEN": "s", "VLLM_X": "1", "CUDA_VISIBLE_DEVICES": "3"}
    assert host_environment(environ, device_kind="cuda", devices=(2, 3)) == {
        "HF_TOKEN": "s",
        "VLLM_X": "1",
        "CUDA_VISIBLE_DEVICES": "2,3",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    assert host_environment({}, device_kind="cpu", devices=(0,)) == {"CUDA_VISIBLE_DEVICES": ""}


# ------------------------------------------------------------ processes and memory, from a folder


def add_process(
    proc: Path, pid: int, *, parent: int = 1, group: int = 0, session: int = 0, pss_kb: int = 0, state: str = "S"
) -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "stat").write_text(
        f"{pid} (a (strange) name) {state} {parent} {group or pid} {session or pid} 0 -1 0 0\n"
    )
    (folder / "smaps_rollup").write_text(f"5500-7ff0 ---p 0 00:00 0 [rollup]\nRss: 999 kB\nPss:   {pss_kb} kB\n")
    (folder / "environ").write_bytes(f"A=1\0RUN={pid % 2}\0".encode())


def test_a_family_is_leader_session_group_and_descendants(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    add_process(tmp_path, 10, parent=5, pss_kb=100)
    add_process(tmp_path, 11, parent=10, group=10, session=10, pss_kb=20)
    add_process(tmp_path, 12, parent=1, group=12, session=10, pss_kb=3)  # left its group, and lost its parent
    add_process(tmp_path, 13, parent=11, pss_kb=1)  # left its session
    add_process(tmp_path, 14, parent=10, group=10, session=10, pss_kb=5000, state="Z")
    add_process(tmp_path, 20, parent=5, pss_kb=7000)
    assert sorted(each.pid for each in family(10, read_processes(tmp_path))) == [10, 11, 12, 13]
    assert tree_bytes(10, tmp_path) == 124 * 1024
    assert tree_bytes(99, tmp_path) == 0
    assert sorted(with_variable("RUN", "1", tmp_path)) == [11, 13]


def test_memory_is_what_the_control_group_allows(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/pod/box\n")
    box = cgroups / "pod" / "box"
    box.mkdir(parents=True)
    (box / "memory.max").write_text("max\n")
    (box / "memory.current").write_text("0\n")
    whole = machine_memory(proc, cgroups)
    assert whole.total > 64 << 20
    for folder, limit, used in ((box.parent, 64 << 20, 40 << 20), (cgroups, 1 << 60, 0)):
        (folder / "memory.max").write_text(str(limit))
        (folder / "memory.current").write_text(str(used))
    (box.parent / "memory.stat").write_text(f"anon 1\ninactive_file {10 << 20}\nactive_file 5\n")
    assert machine_memory(proc, cgroups) == MachineMemory(total=64 << 20, free=34 << 20)


def test_memory_is_what_an_old_control_group_allows(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:memory:/docker/abc\n0::/\n")
    # The path is the host's; inside the container the group is mounted as the root.
    (cgroups / "memory").mkdir(parents=True)
    (cgroups / "memory" / "memory.limit_in_bytes").write_text(str(64 << 20))
    (cgroups / "memory" / "memory.usage_in_bytes").write_text(str(1 << 20))
    assert machine_memory(proc, cgroups) == MachineMemory(total=64 << 20, free=63 << 20)


def test_pages_in_use_are_no_room_for_reading_ahead(tmp_path: Path) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/\n")
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemFree:   100 kB\nActive(file):  400 kB\nInactive(file): 50 kB\n")
    assert page_cache_room(proc, cgroups) == 150 << 10
    cgroups.mkdir()
    (cgroups / "memory.max").write_text(str(70 << 10))
    (cgroups / "memory.current").write_text(str(60 << 10))
    (cgroups / "memory.stat").write_text(f"inactive_file {20 << 10}\nactive_file {30 << 10}\n")
    assert page_cache_room(proc, cgroups) == 30 << 10


# ------------------------------------------------------------ logs


def test_the_tail_reaches_back_into_what_was_rotated_away(tmp_path: Path) -> None:
    log = InstanceLog(tmp_path / "m.log")
    assert log.tail(5) == (b"", 0)
    log.path.write_text("one\ntwo\nthree\n")
    assert log.rotate(max_bytes=5)
    assert log.size() == 0
    with log.path.open("a") as file:
        file.write("four\nfive")
    assert not log.rotate(max_bytes=100)
    assert log.tail(3)[0] == b"three\nfour\nfive"
    assert log.tail(99)[0] == b"one\ntwo\nthree\nfour\nfive"
    assert log.tail(0)[0] == b""


def test_two_old_logs_are_kept(tmp_path: Path) -> None:
    log = InstanceLog(tmp_path / "m.log")
    for text in ("first", "second", "third"):
        log.path.write_text(text)
        log.rotate(max_bytes=1)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {
        "m.log": "",
        "m.log.1": "third",
        "m.log.2": "second",
    }


def test_what_is_added_is_read_on_also_after_a_rotation(tmp_path: Path) -> None:
    log = InstanceLog(tmp_path / "m.log")
    log.path.write_text("one\n")
    _, offset = log.tail(1)
    with log.path.open("a") as file:
        file.write("two\n")
    data, offset = log.read_from(offset)
    assert (data, log.read_from(offset)[0]) == (b"two\n", b"")
    log.path.write_text("new\n")
    assert log.read_from(offset) == (b"new\n", 4)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("", ""),
        (
            "Traceback:\n  File 'x'\n    a = b\n        ^\nValueError: too few heads\n\n  \n",
            "ValueError: too few heads",
        ),
        ("\x1b[31mred\x1b[0m alert\n-----\n", "red alert"),
        (
            "2026-11-21 07:34:01,506 CRITICAL host modelpool.engines.host: the engine died: x\n"
            "(MainProcess pid=3495) WARNING 11-21 08:01:28 [core_client.py:817] starting cleanup\n"
            "(MainProcess pid=3495) INFO 11-21 08:01:28 [core_client.py:777] complete\n",
            "the engine died: x",
        ),
        ("(EngineCore pid=1) INFO all is well\nKilled\n(EngineCore pid=1) INFO bye\n", "Killed"),
        ("INFO one\nINFO two\n", "INFO two"),
    ],
)
def test_the_last_words_are_those_that_say_something(tmp_path: Path, text: str, last: str) -> None:
    log = InstanceLog(tmp_path / "m.log")
    log.path.write_text("an earlier start\n" + text)
    assert log.last_words(len("an earlier start\n")) == last


# ------------------------------------------------------------ fetching


def names(*files: str) -> list[str]:
    return [each.name for each in needed_files(RepoFile(name, 1) for name in files)]


def test_only_what_an_engine_reads_is_fetched() -> None:
    assert names(
        *("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
        *(
            "config.json",
            "tokenizer.model",
            "chat_template.jinja",
            "merges.txt",
            "modeling_x.py",
            "1_Pooling/config.json",
        ),
        *("README.md", ".gitattributes", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", "original/params.json"),
    ) == [
        *("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"),
        *(
            "config.json",
            "tokenizer.model",
            "chat_template.jinja",
            "merges.txt",
            "modeling_x.py",
            "1_Pooling/config.json",
        ),
    ]


def test_old_weights_are_fetched_where_there_are_no_others() -> None:
    assert names("pytorch_model.bin", "training_args.bin", "config.json") == ["pytorch_model.bin", "config.json"]


def test_weights_that_are_published_twice_are_fetched_once() -> None:
    assert names("consolidated.safetensors", "model.safetensors") == ["model.safetensors"]
    assert names("consolidated.safetensors", "params.json") == ["consolidated.safetensors", "params.json"]


def test_a_full_disk_is_seen_before_it_is_full() -> None:
    check_disk(2 * GB, 3 * GB, Path("/cache"))
    check_disk(0, 0, Path("/cache"))
    with pytest.raises(DiskFull, match=r"2\.00 GB are to be fetched, 1\.50 GB are free in /cache"):
        check_disk(2 * GB, 1_500_000_000, Path("/cache"))


def test_a_model_is_complete_when_all_its_weights_are_there(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_complete(tmp_path)
    (tmp_path / "model-1.safetensors").touch()
    assert is_complete(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    assert not is_complete(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    assert is_complete(tmp_path)


def test_the_models_of_a_hubs_cache_are_those_that_are_whole(tmp_path: Path) -> None:
    assert hub_cache({"HF_HOME": str(tmp_path)}) == tmp_path / "hub"
    assert hub_cache({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    for name, files in (("org--whole", ("config.json", "model.safetensors")), ("org--half", ("config.json",))):
        snapshot = tmp_path / f"models--{name}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        for file in files:
            (snapshot / file).touch()
    assert list(cached_models(tmp_path)) == ["org/whole"]
    assert list(cached_models(tmp_path / "nowhere")) == []


# ------------------------------------------------------------ routes


def test_operational_routes_are_not_for_clients() -> None:
    assert inference_methods("/v1/chat/completions") == {"POST"}
    assert inference_methods("/v1/responses/resp_12-3/cancel") == {"POST"}
    for path in (
        "/sleep",
        "/v1/load_lora_adapter",
        "/collective_rpc",
        "/v1/chat/completions/",
        "/v1/responses/a/b",
        "",
    ):
        assert not inference_methods(path), path
