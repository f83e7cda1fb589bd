"""What engines compile (torch.compile, Triton, CUDA): kept below the home for the next start, within a bound."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_FOLDERS = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}
"""The variable that says where, and the folder that it says."""
# What is of no use in part: a folder for each compiled model, graph or kernel. The rest is small, or bounds itself.
_AHEAD_OF_TIME = "vllm/torch_compile_cache/torch_aot_compile"
_ENTRIES = ("vllm/torch_compile_cache/*", f"{_AHEAD_OF_TIME}/*", "inductor/*", "triton/*")


def cache_environment(cache: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that have engines keep there what they compile; what a user has set stays."""
    return {name: environ.get(name) or str(cache / folder) for name, folder in _FOLDERS.items()}


class _Entry(NamedTuple):
    used_at: float
    bytes: int
    path: Path


def prune(cache: Path, most_bytes: int) -> int:
    """Remove what was not used for longest, until the rest is within the bound; returns how many bytes went. Blocks.

    An engine that loses what it has open goes on, and compiles it again at its next start.
    """
    paths = {path for pattern in _ENTRIES for path in cache.glob(pattern)} - {cache / _AHEAD_OF_TIME}
    entries = sorted(_entry(path) for path in paths)
    excess = gone = max(0, sum(entry.bytes for entry in entries) - most_bytes)
    for entry in entries:
        if excess <= 0:
            break
        excess -= entry.bytes
        if entry.path.is_dir():
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            entry.path.unlink(missing_ok=True)
    return gone - excess


def _entry(path: Path) -> _Entry:
    """File systems keep times of access to the day; where that is turned off, those of writing count.

    Folders' do not: looking into one is an access.
    """
    found = [each.stat() for each in (path, *path.rglob("*")) if each.is_file()]
    return _Entry(
        used_at=max((max(each.st_atime, each.st_mtime) for each in found), default=0.0),
        bytes=sum(each.st_size for each in found),
        path=path,
    )
