"""A model's weights are in memory when its engine comes to read them."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from modelpool.worker import read_ahead as module
from modelpool.worker.read_ahead import read_ahead

SIZE = 3 << 20


def weights(folder: Path, name: str) -> Path:
    """A file that is on disk alone."""
    file = folder / name
    with file.open("wb") as opened:
        opened.write(os.urandom(SIZE))
        opened.flush()
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def in_memory(file: Path) -> int:
    """How many of its bytes can be read without a disk."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), SIZE, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * (SIZE // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(begin), ctypes.c_size_t(SIZE), pages)
        del begin
        assert not failed
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def soon(look: Callable[[], bool]) -> bool:
    waited = threading.Event()
    return any(look() or waited.wait(0.01) for _ in range(1000))


def test_weights_are_asked_for_in_the_format_that_is_loaded(tmp_path: Path) -> None:
    names = ("model-1.safetensors", "model-2.safetensors", "pytorch_model.bin")
    first, second, other = (weights(tmp_path, name) for name in names)
    if in_memory(first):
        pytest.skip("this file system has no disk below it")
    assert read_ahead(tmp_path, threading.Event()) == 2 * SIZE
    assert soon(lambda: in_memory(first) == in_memory(second) == SIZE)
    assert in_memory(other) == 0


def test_no_more_is_read_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(tmp_path, "model.safetensors")
    monkeypatch.setattr(module, "page_cache_room", lambda: 1 << 20)
    assert read_ahead(tmp_path, threading.Event()) == 1 << 20


def test_it_ends_when_it_is_told_to_and_where_nothing_is(tmp_path: Path) -> None:
    assert read_ahead(tmp_path / "nowhere", threading.Event()) == 0
    weights(tmp_path, "model.safetensors")
    stop = threading.Event()
    stop.set()
    assert read_ahead(tmp_path, stop) == 0
