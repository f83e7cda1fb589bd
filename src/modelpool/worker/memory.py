"""Memory: of this machine, as far as we may use it, and of a tree of processes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from modelpool.process_table import PROC, family, read_processes

CGROUPS = Path("/sys/fs/cgroup")
_MEMINFO = re.compile(r"^([^:]+):\s+(\d+) kB$", re.MULTILINE)
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


def tree_bytes(leader: int, proc: Path = PROC) -> int:
    """PSS of a process, its session and all their descendants, in bytes. Blocks; 0 when nothing of it lives.

    PSS, not RSS: engines are forked, so most of their pages are shared, and RSS would count them once for each.
    """
    return sum(_pss(proc / str(member.pid)) for member in family(leader, read_processes(proc)))


def _pss(process: Path) -> int:
    try:
        match = _PSS.search((process / "smaps_rollup").read_text())
    except OSError:
        return 0  # it has ended
    return int(match[1]) * 1024 if match else 0


class MachineMemory(msgspec.Struct, frozen=True):
    """In bytes. `total` is what the machine has, or what its control group allows where that is less."""

    total: int
    free: int


def machine_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> MachineMemory:
    """What we may use, and what of it is free or could be freed at once. Blocks for a moment."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in _cgroup_limits(proc, cgroups):
        if limit < total:
            free = min(free, max(0, limit - used))
            total = limit
    return MachineMemory(total=total, free=free)


def page_cache_room(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """How much can be read from disk into memory that nobody uses, in bytes. Blocks for a moment.

    That is what is free, and what files have that were read once and not again.
    """
    fields = dict(_MEMINFO.findall((proc / "meminfo").read_text()))
    room = (int(fields["MemFree"]) + int(fields["Inactive(file)"])) * 1024
    return min(room, *(max(0, limit - used) for limit, used in _cgroup_limits(proc, cgroups)), room)


def _cgroup_limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, use) of our control group and of those around it, page cache that can go not counted as used."""
    for version, root, group in _memory_groups(proc, cgroups):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        # Inside a container the path may be the host's, and our own group is what is mounted as the root.
        for folder in (root / group, *(root / parent for parent in Path(group).parents)):
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                yield limit, max(0, used - _inactive_file(folder))


def _memory_groups(proc: Path, cgroups: Path) -> Iterator[tuple[int, Path, str]]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0" and not controllers:
            yield 2, cgroups, group.lstrip("/")
        elif "memory" in controllers.split(","):
            yield 1, cgroups / "memory", group.lstrip("/")


def _number(file: Path) -> int | None:
    """None where the file is not there, or says `max`."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _inactive_file(folder: Path) -> int:
    try:
        match = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0
