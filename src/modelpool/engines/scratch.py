"""What hosts leave in folders that all share, which goes with its owners however these end."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "modelpool-forkserver-"
_SHARED_MEMORY = Path("/dev/shm")


class Scratch:
    """One folder of a forkserver, named after its process, with one in it for the temporary files of each of its hosts.

    A forkserver that was killed leaves its folder to hosts that live on; the next one that starts removes what nobody
    lives in any more.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        _sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))

    def of_host(self, pid: int) -> Path:
        """Where the host's folder is to be; the host makes it."""
        return self.path / str(pid)

    def remove_host(self, pid: int) -> None:
        _remove(self.of_host(pid))

    def remove(self) -> None:
        for host in self.path.glob("*"):
            _remove(host)
        shutil.rmtree(self.path, ignore_errors=True)


def shared_memory_prefix(host: Path) -> str:
    """What the names of shared memory that is made by the host with this folder begin with.

    Python's own resource tracker would remove it, unless it is killed too. It allows no more than ten characters.
    """
    return f"mp{hashlib.sha256(os.fsencode(host)).hexdigest()[:6]}_"


def _remove(host: Path) -> None:
    for segment in _SHARED_MEMORY.glob(f"{shared_memory_prefix(host)}*"):
        with suppress(OSError):
            segment.unlink()
    shutil.rmtree(host, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        # Another user's, or one that ended meanwhile, is not ours to touch.
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or _lives(owner):
                continue
            for host in folder.iterdir():
                if not _lives(host.name):
                    _remove(host)
            folder.rmdir()


def _lives(pid: str) -> bool:
    """Whether a process of this number runs. One that was given it since only delays the sweep."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
