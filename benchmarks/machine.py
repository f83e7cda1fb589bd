"""What processes take of the machine, and how much of it others took meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil


def raise_descriptor_limit() -> None:
    """Each connection is a descriptor."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def tree(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """These and all that they started."""
    return [each for process in processes for each in (process, *process.children(recursive=True))]


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """User and system time of their threads and their children's, so far: the scheduler's, which counts nanoseconds."""
    total = 0
    for process in tree(processes):
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((thread / "schedstat").read_bytes().split()[0])
    return total / 1e9


def pss_bytes(processes: Iterable[psutil.Process]) -> int:
    """Memory of them and their children; a page that several share counts in parts."""
    total = 0
    for process in tree(processes):
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where and beside what something was measured. `others` is their share of all cores."""

    cores: int
    processor: str
    python: str
    others: float


class Watch:
    """Sees from now on how much of the machine others take."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._busy = _busy_seconds()
        self._own = _own_seconds()

    def machine(self) -> Machine:
        """As of now; what this process started and waited for is not counted as others."""
        cores = os.cpu_count() or 1
        others = _busy_seconds() - self._busy - (_own_seconds() - self._own)
        return Machine(
            cores=cores,
            processor=_processor(),
            python=platform.python_version(),
            others=max(0.0, others / (time.monotonic() - self._since) / cores),
        )


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """Of the tree that is measured, with a `+` if files were changed since."""
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(described, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip() or "unknown"
