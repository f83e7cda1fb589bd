"""Brings a model's files into memory while its engine is still getting ready to read them.

An engine maps them and takes them page by page, so a disk gives it a fraction of what it could. Only asked for here
(`posix_fadvise`): the kernel reads in large pieces, and leaves out what is in memory already.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from modelpool.worker.memory import page_cache_room

_KINDS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
# The kernel takes no more from one call than the disk's window for reading ahead, 128 KiB by default.
_PIECE = 128 << 10
# So often it is looked whether there is still room.
_STRETCH = 256 << 20


@asynccontextmanager
async def reading_ahead(folder: str) -> AsyncIterator[None]:
    """While the block runs, or until all is read."""
    stop = threading.Event()
    reading = asyncio.create_task(asyncio.to_thread(read_ahead, Path(folder), stop), name=f"reading ahead {folder}")
    try:
        yield
    finally:
        stop.set()
        await reading


def read_ahead(folder: Path, stop: threading.Event) -> int:
    """Have the weights in a folder read, in the order in which they are loaded; returns how many bytes. Blocks.

    Ends early when `stop` is set, or when there is no memory that nobody uses. A file that cannot be read is left to
    the engine to report.
    """
    asked = 0
    for file in _weights(folder):
        try:
            fd = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        try:
            for begin in range(0, os.fstat(fd).st_size, _STRETCH):
                if page_cache_room() < _STRETCH:
                    return asked
                for offset in range(begin, begin + _STRETCH, _PIECE):
                    if stop.is_set():
                        return asked
                    os.posix_fadvise(fd, offset, _PIECE, os.POSIX_FADV_WILLNEED)
                asked += _STRETCH
        finally:
            os.close(fd)
    return asked


def _weights(folder: Path) -> list[Path]:
    """A folder that has them in several formats is loaded from the first."""
    found = (sorted(folder.glob(kind)) for kind in _KINDS)
    return next((files for files in found if files), [])
