"""The processes of this machine as /proc shows them, and how to find those that belong together."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

PROC = Path("/proc")
_ENDED_STATES = ("Z", "X")


class Process(msgspec.Struct, frozen=True):
    """One line of the process table. `state` is the kernel's letter: Z for a process that ended, not yet reaped."""

    pid: int
    parent: int
    group: int
    session: int
    state: str

    @property
    def ended(self) -> bool:
        return self.state in _ENDED_STATES


def read_processes(proc: Path = PROC) -> list[Process]:
    """All processes. Those that end meanwhile are left out."""
    found = []
    for entry in os.listdir(proc):
        if entry.isdecimal():
            try:
                found.append(_parse_stat((proc / entry / "stat").read_text(errors="replace")))
            except (OSError, ValueError):
                continue  # it has ended
    return found


def _parse_stat(text: str) -> Process:
    # The name stands in parentheses and may contain anything, parentheses too.
    pid, _, rest = text.partition(" ")
    state, parent, group, session, *_ = rest[rest.rindex(")") + 1 :].split()
    return Process(pid=int(pid), parent=int(parent), group=int(group), session=int(session), state=state)


def family(leader: int, processes: Iterable[Process]) -> list[Process]:
    """The process `leader`, its session (or group), and all their descendants, without those that have ended."""
    table = list(processes)
    members = {each.pid for each in table if leader in (each.pid, each.group, each.session)}
    before = 0
    while len(members) > before:
        before = len(members)
        members |= {each.pid for each in table if each.parent in members}
    return [each for each in table if each.pid in members and not each.ended]


def values_of(variable: str, proc: Path = PROC) -> dict[int, str]:
    """What the environment variable is in all processes that were started with it, by their ids. Those we may not read
    are left out.
    """
    wanted = f"{variable}=".encode()
    found = {}
    for entry in os.listdir(proc):
        if entry.isdecimal():
            try:
                environment = (proc / entry / "environ").read_bytes()
            except OSError:
                continue  # it has ended, or is not ours
            for each in environment.split(b"\0"):
                if each.startswith(wanted):
                    found[int(entry)] = os.fsdecode(each[len(wanted) :])
    return found


def command_line(pid: int, proc: Path = PROC) -> list[str]:
    """Its arguments; none of one that has ended."""
    try:
        return (proc / str(pid) / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def with_variable(variable: str, value: str, proc: Path = PROC) -> list[int]:
    """The ids of all processes that were started with this environment variable. Those we may not read are left out."""
    return [pid for pid, found in values_of(variable, proc).items() if found == value]
