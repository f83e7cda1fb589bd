"""A file of JSON lines that several processes write: in batches, by a thread, up to a size."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

FLUSH_S = 0.5
PENDING_MAX = 20_000
"""Lines that may wait for a slow disk. Any more are left out, and counted."""
FILE_BYTES_MAX = 100 << 20
"""Then it becomes `NAME.1`, over the one before, and a new one begins."""


class LogFile(Generic[T]):
    """Takes items in the event loop; a thread makes lines of them and writes them. Use `log_file`."""

    def __init__(self, path: Path, line: Callable[[T], bytes], *, max_bytes: int) -> None:
        self._path = path
        self._line = line
        self._max_bytes = max_bytes
        self._pending: list[T] = []
        self._left_out = 0
        self._fd = -1

    def put(self, item: T) -> None:
        if len(self._pending) < PENDING_MAX:
            self._pending.append(item)
        else:
            self._left_out += 1

    async def keep_writing(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> None:
        items, self._pending = self._pending, []
        if self._left_out:
            log.warning("%s lines of %s were left out: the disk is slow", self._left_out, self._path)
            self._left_out = 0
        if not items:
            return
        try:
            await asyncio.to_thread(self._write, items)
        except OSError as error:
            log.warning("%s lines of %s are lost: %s", len(items), self._path, error)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, items: list[T]) -> None:
        data = b"".join(self._line(item) + b"\n" for item in items)
        self._open_current()
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            if os.fstat(self._fd).st_size + len(data) > self._max_bytes and self._is_current():
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._open_current()
        while data:
            data = data[os.write(self._fd, data) :]

    def _open_current(self) -> None:
        """The file of this name now: another process, or logrotate, may have put a new one there."""
        if self._fd >= 0 and self._is_current():
            return
        self.close()
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _is_current(self) -> bool:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        ours = os.fstat(self._fd)
        return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


@asynccontextmanager
async def log_file(
    path: Path, line: Callable[[T], bytes], *, max_bytes: int = FILE_BYTES_MAX
) -> AsyncIterator[LogFile[T]]:
    """Left, everything that was put is written."""
    file = LogFile(path, line, max_bytes=max_bytes)
    async with asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(file.keep_writing())
        try:
            yield file
        finally:
            writing.cancel()
    await file.flush()
    file.close()
