"""GPUs that do not exist run out of memory as others do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modelpool.core.placement import GB, HOST, Other
from modelpool.fake_gpus import FakeGpus, OutOfMemory
from modelpool.process import StartupError
from modelpool.worker.devices import declared_gpus

FILE = """
host_gb: 64
devices:
  - {gb: 80}
  - {gb: 80, others: [{pid: 4242, name: train.py, gb: 30}]}
  - {gb: 24, name: L4, lost: GPU is lost}
"""


def free(gpus: FakeGpus) -> list[float]:
    return [room.free_bytes / GB for room in gpus.rooms()]


def test_a_file_declares_them_and_may_change(tmp_path: Path) -> None:
    file = tmp_path / "gpus.yaml"
    file.write_text(FILE)
    gpus = FakeGpus(str(file), tmp_path)
    assert free(gpus) == [80, 50, 24, 64]
    _, second, third, host = gpus.rooms()
    assert second.others == (Other(4242, "train.py", 30 * GB),)
    assert (third.name, third.lost, host.index) == ("L4", "GPU is lost", HOST)
    file.write_text("devices: [{gb: 4")  # in the middle of being written
    assert free(gpus) == [80, 50, 24, 64]
    file.write_text("devices: [{gb: 40}]\nhost_gb: 8")
    assert free(gpus) == [40, 8]


def test_nobody_takes_more_than_there_is(tmp_path: Path) -> None:
    gpus = FakeGpus("2x80", tmp_path)
    assert gpus.hold({0: 30 * GB, 1: 30 * GB}) == -60 * GB
    assert free(gpus)[:2] == [50, 50]
    with pytest.raises(OutOfMemory, match=r"81\.0 GB wanted of device 1, 80\.0 GB free of 80\.0 GB"):
        gpus.hold({1: 81 * GB})
    assert gpus.holders() == {os.getpid(): {0: 30 * GB, 1: 30 * GB}}
    assert gpus.hold({}) == 60 * GB
    assert free(gpus)[:2] == [80, 80]


def test_what_a_killed_one_held_is_free_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from modelpool.fake_gpus import FakeGpus\n"
        "gpus = FakeGpus('1x80', Path(sys.argv[1]))\n"
        "gpus.hold({0: 70 * 10**9}); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        gpus = FakeGpus("1x80", tmp_path)
        assert free(gpus)[0] == 10
        with pytest.raises(OutOfMemory):
            gpus.hold({0: 20 * GB})
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert free(gpus)[0] == 80


@pytest.mark.parametrize(
    ("text", "said"),
    [(text, "COUNTxGB") for text in ("4", "x80", "0x80", "4x0", "4x80GB", "four")]
    + [
        ("/nowhere", "No such file"),
        ("devices: []", "length >= 1"),
        ("devices: [{gb: 80, lots: 1}]", "unknown field `lots`"),
        ("devices: [{gb: -1}]", "> 0"),
        ("- 4", "Expected `object`"),
    ],
)
def test_a_declaration_that_says_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    if ":" in text or text.startswith("-"):
        file = tmp_path / "gpus.yaml"
        file.write_text(text)
        text = str(file)
    with pytest.raises(StartupError, match=said):
        declared_gpus(text, tmp_path / "held")
