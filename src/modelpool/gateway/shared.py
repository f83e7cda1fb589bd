"""Memory that the gateway processes of one node share: files that each of them maps, and a slot for each process.

A slot is a lock on one byte, which the kernel takes back however a process ends. What a process keeps for itself it
keeps in cells of its slot, so that nobody else writes there; what all write is written under `lock`. Whoever notices
that a slot's owner died clears its cells.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from modelpool.process import StartupError

SLOTS = 64
"""Gateway processes on one node, at most."""
LOCK_WAIT_S = 0.5
"""The most that is waited for a lock whose holder seems to run."""
_PAUSE_S = 0.00002
_LOOK_S = 0.005
_FLOCK = "hhqqi4x"
_LOCKS_AT = 1 << 20
_EXCLUSIVE = fcntl.LOCK_EX | fcntl.LOCK_NB


class Lock:
    """Held in a `with`, for as long as a few writes take; can be used again.

    Gone on without if its holder was stopped (by a signal, a debugger), which must not stop the others.
    """

    __slots__ = ("_fd", "_held", "_offset")

    def __init__(self, fd: int, offset: int) -> None:
        self._fd = fd
        self._offset = offset
        self._held = False

    def __enter__(self) -> None:
        try:
            fcntl.lockf(self._fd, _EXCLUSIVE, 1, self._offset)
            self._held = True
        except OSError:
            self._held = self._wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, self._offset)

    def _wait(self) -> bool:
        """Whether it could be had. A holder that was only put off the processor, or collects garbage, comes back."""
        begun = looked = time.monotonic()
        while (now := time.monotonic()) - begun < LOCK_WAIT_S:
            time.sleep(_PAUSE_S)  # not a spin: the holder may want this very processor
            if _try_lock(self._fd, self._offset):
                return True
            if now - looked > _LOOK_S:
                looked = now
                if self._holder_is_stopped():
                    return False
        return False

    def _holder_is_stopped(self) -> bool:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, self._offset, 1, 0)
        kind, *_, pid = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        if kind == fcntl.F_UNLCK:
            return False
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False  # it has just ended, and its lock with it
        return status.rpartition(")")[2].split()[0] in ("T", "t")


class Node:
    """This process among the gateway processes of its node. Use `joined`."""

    def __init__(self, folder: Path, fd: int, slot: int) -> None:
        self.slot = slot
        self.name = _name(folder)
        """The same for all processes of the node, and of no other node."""
        self._folder = folder
        self._fd = fd
        self._used = self.map("slots", SLOTS)
        self._clear: list[Callable[[int], None]] = []

    def map(self, name: str, size: int, *, own: int = 0, whole: bool = False) -> mmap.mmap:
        """`size` bytes that all processes see, zero at first. They outlive the processes; unused pages take no room.

        `own`: the size of a slot's part, of which ours is reserved now; `whole`: all is. Without room for that there is
        an OSError here; later a write would end the process. Each map takes a descriptor.
        """
        fd = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
            if whole:
                os.posix_fallocate(fd, 0, size)
            if own:
                os.posix_fallocate(fd, self.slot * own, own)
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)

    def lock(self, number: int) -> Lock:
        """One of any number of locks."""
        return Lock(self._fd, _LOCKS_AT + number)

    def remove(self, name: str) -> None:
        """Whoever mapped it keeps it to themselves; the next to map it begin with zeros."""
        (self._folder / name).unlink(missing_ok=True)

    def keep_clear(self, clear: Callable[[int], None]) -> None:
        """Have `clear(slot)` called now for this process's slot, and for each one whose owner is found dead."""
        self._clear.append(clear)
        clear(self.slot)

    async def keep_reaping(self, every_s: float = 1.0) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            self.reap()

    def reap(self) -> None:
        """Clear the slots whose owners died."""
        for slot, used in enumerate(self._used[:SLOTS]):
            if used and slot != self.slot and _try_lock(self._fd, slot):
                for clear in self._clear:
                    clear(slot)
                self._used[slot] = 0
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, slot)

    def claim(self) -> None:
        """For `joined`: the slot is taken."""
        self._used[self.slot] = 1

    def leave(self) -> None:
        for clear in self._clear:
            clear(self.slot)
        self._used[self.slot] = 0


@contextmanager
def joined(folder: Path) -> Iterator[Node]:
    """Be one of the node's gateway processes, whose shared files lie in `folder`. Raises StartupError if it is full."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(
        folder / "lock", os.O_RDWR | os.O_CREAT, 0o600
    )  # the only descriptor of it: closing any other would free all locks
    try:
        slot = next((slot for slot in range(SLOTS) if _try_lock(fd, slot)), None)
        if slot is None:
            raise StartupError(f"{SLOTS} gateway processes run on this machine already, which is the most.")
        node = Node(folder, fd, slot)
        node.claim()
        try:
            yield node
        finally:
            node.leave()
    finally:
        os.close(fd)


def _name(folder: Path) -> str:
    with suppress(FileExistsError):
        mine = folder / f"name-{os.getpid()}"
        mine.write_text(secrets.token_hex(8))
        try:
            os.link(mine, folder / "name")
        finally:
            mine.unlink()
    return (folder / "name").read_text()


def _try_lock(fd: int, offset: int) -> bool:
    try:
        fcntl.lockf(fd, _EXCLUSIVE, 1, offset)
    except OSError:
        return False
    return True
