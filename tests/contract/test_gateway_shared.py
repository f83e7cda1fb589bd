"""What gateway processes of one node share, with real processes that are killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelpool.core.places import Others
from modelpool.gateway import shared
from modelpool.gateway.inflight import SharedInflight
from modelpool.gateway.shared import joined
from modelpool.process import StartupError

OTHER = """
import sys
from pathlib import Path
from modelpool.gateway.shared import joined
with joined(Path(sys.argv[1])) as node:
    cells = node.map("cells", 64)
    node.keep_clear(lambda slot: None)
    cells[node.slot] = 7
    print(node.slot, flush=True)
    {then}
"""
READ = "sys.stdin.read()"
HOLD = """with node.lock(3):
        print("held", flush=True)
        sys.stdin.read()"""
COUNT = """for _ in range(2000):
        with node.lock(3):
            cells[40:44] = (int.from_bytes(cells[40:44], 'little') + 1).to_bytes(4, 'little')"""
WANT = """from modelpool.gateway.inflight import SharedInflight
    row = SharedInflight(node).take("m")
    row.put({has})
    row.want({wants})
    print("counted", flush=True)
    sys.stdin.read()"""


def other(folder: Path, then: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OTHER.format(then=then), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_a_slot_is_free_again_and_cleared_when_its_process_was_killed(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        cells = node.map("cells", 64)
        cleared: list[int] = []
        node.keep_clear(cleared.append)
        process = other(tmp_path, READ)
        assert (node.slot, cells[1], cleared) == (0, 7, [0])
        node.reap()
        assert cleared == [0]
        process.kill()
        process.wait()
        node.reap()
        node.reap()
        assert cleared == [0, 1]
        with_new = other(tmp_path, "pass")
        assert with_new.wait() == 0
    assert cleared == [0, 1, 0]


def test_nobodys_change_is_lost_under_the_lock(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        cells = node.map("cells", 64)
        others = [other(tmp_path, COUNT) for _ in range(2)]
        for _ in range(2000):
            with node.lock(3):
                cells[40:44] = (int.from_bytes(cells[40:44], "little") + 1).to_bytes(4, "little")
        assert [each.wait() for each in others] == [0, 0]
        assert int.from_bytes(cells[40:44], "little") == 6000


def test_a_process_that_is_stopped_with_the_lock_does_not_stop_the_others(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        process = other(tmp_path, HOLD)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        with node.lock(3):
            pass
        assert time.monotonic() - begin < 1
        process.kill()
        process.wait()


def test_of_the_others_those_who_wait_are_told_from_the_settled(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        row = SharedInflight(node).take("m")
        assert row is not None
        row.put(5)
        row.want(True)
        assert row.others(5) == Others(inflight=0)
        processes = [
            other(tmp_path, WANT.format(has=has, wants=wants)) for has, wants in ((3, False), (7, True), (2, True))
        ]
        try:
            for each in processes:
                assert each.stdout is not None
                assert each.stdout.readline() == "counted\n"
            assert row.others(5) == Others(inflight=12, settled=3, waiting=2)
        finally:
            for each in processes:
                each.kill()
                each.wait()
        node.reap()
        assert row.others(5) == Others(inflight=0)


def test_one_process_too_many_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "SLOTS", 1)
    process = other(tmp_path, READ)
    try:
        with pytest.raises(StartupError, match="1 gateway processes"), joined(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
