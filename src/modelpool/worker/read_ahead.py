"""Brings a model's weights into memory while its engine is still getting ready to read them.

They are only asked for (`posix_fadvise`): the kernel reads in large pieces, and leaves out what it has.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from modelpool.worker.memory import page_cache_room

_KINDS = ("*.safetensors", "*.bin", "*.pt")
# Of one call the kernel takes no more than a disk's window for reading ahead, which is 128 KiB where nobody changed it.
_PIECE = 128 << 10


@asynccontextmanager
async def reading_ahead(folder: str) -> AsyncIterator[None]:
    """In a thread of its own, while the block runs or until all is read."""
    stop = threading.Event()
    threading.Thread(target=read_ahead, args=(Path(folder), stop), name="read ahead", daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def read_ahead(folder: Path, stop: threading.Event) -> int:
    """Ask for the weights in a folder, in the order in which they are loaded; returns how many bytes. Blocks.

    No more than fits into memory that nobody uses: neither pages in use nor those read a moment ago shall go for it.
    """
    room, asked = page_cache_room(), 0
    for file in _weights(folder):
        try:
            fd = os.open(file, os.O_RDONLY)
        except OSError:
            continue  # the engine says what is wrong with it
        try:
            for offset in range(0, os.fstat(fd).st_size, _PIECE):
                if stop.is_set() or asked + _PIECE > room:
                    return asked
                os.posix_fadvise(fd, offset, _PIECE, os.POSIX_FADV_WILLNEED)
                asked += _PIECE
        finally:
            os.close(fd)
    return asked


def _weights(folder: Path) -> list[Path]:
    """A folder that has them in several formats is loaded from the first."""
    found = (sorted(folder.glob(kind)) for kind in _KINDS)
    return next((files for files in found if files), [])
