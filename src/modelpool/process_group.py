"""A process group, such as an engine host's: seen to end, killed, and known to be gone, whoever its parent is."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import signal
import time
from contextlib import suppress

from modelpool.process_table import read_processes, with_variable

log = logging.getLogger(__name__)

# <linux/pidfd.h>, Linux 6.9: the signal goes to the group that the process leads, even after the leader was reaped.
_PIDFD_SIGNAL_PROCESS_GROUP = 1 << 2


class ProcessGroup:
    """A group whose leader need not be our child.

    Holds a pidfd, so that no signal can reach a process that was given the leader's number later. Raises
    ProcessLookupError when the leader is gone already.
    """

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self._pidfd = os.pidfd_open(leader)

    def alive(self) -> bool:
        """Whether the leader has not ended."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return not poll.poll(0)

    async def leader_ended(self) -> None:
        """Return once the leader has ended, whether or not it was reaped."""
        await _readable(self._pidfd)

    def terminate(self) -> None:
        """SIGTERM to the leader."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def retire(self) -> None:
        """SIGQUIT to the leader: take nothing new, and end when all is done."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGQUIT)

    def kill(self) -> None:
        """SIGKILL to the leader and to its whole group."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL, None, _PIDFD_SIGNAL_PROCESS_GROUP)
        except ProcessLookupError:
            pass
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._kill_by_number()

    def _kill_by_number(self) -> None:
        """For older kernels. The number is the group's as long as the leader was not reaped or a member lives."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, 0)
            os.killpg(self.leader, signal.SIGKILL)

    async def end(self, deadline_s: float = 20.0) -> bool:
        """Kill, and return once no member is left that could hold memory. False: some outlived the deadline."""
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    self.kill()
                    members = await asyncio.to_thread(self._members)
                    if not members:
                        return True
                    await _all_ended(members)
        except TimeoutError:
            log.error("processes of group %d do not end", self.leader)
            return False

    def _members(self) -> list[int]:
        return [each.pid for each in read_processes() if self.leader == each.group and not each.ended]

    def close(self) -> None:
        os.close(self._pidfd)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def resolve() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, resolve)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def _all_ended(pids: list[int]) -> None:
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            await _readable(pidfd)
        finally:
            os.close(pidfd)


def reap(variable: str, value: str, *, deadline_s: float = 10.0) -> list[int]:
    """SIGKILL every process that was started with this environment variable, and wait for their end. Blocks.

    Returns their ids. For what a predecessor left behind: a forkserver in the middle of a fork may add to it, hence
    the rounds.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + deadline_s
    while (remaining := deadline - time.monotonic()) > 0:
        pids = [pid for pid in with_variable(variable, value) if pid != os.getpid()]
        if not pids:
            break
        killed.update(pids)
        _kill_and_wait(pids, remaining)
    return sorted(killed)


def _kill_and_wait(pids: list[int], deadline_s: float) -> None:
    pidfds = []
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(pid))
        for pidfd in pidfds:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pidfd in pidfds:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(deadline_s * 1000)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
