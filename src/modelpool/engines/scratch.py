"""Folders for the temporary files of hosts, which go with their owners however these end."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "modelpool-forkserver-"


class Scratch:
    """One folder of a forkserver, named after its process, with one in it for each of its hosts.

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
        shutil.rmtree(self.of_host(pid), ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*-*"):
        owner = folder.name.removeprefix(_PREFIX).partition("-")[0]
        # Another user's, or one that ended meanwhile, is not ours to touch.
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or _lives(owner):
                continue
            for host in folder.iterdir():
                if not _lives(host.name):
                    shutil.rmtree(host, ignore_errors=True)
            folder.rmdir()


def _lives(pid: str) -> bool:
    """Whether a process of this number runs. One that was given it since only delays the sweep."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
