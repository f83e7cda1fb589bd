"""The folder that one pool on one machine lives in (`MODELPOOL_HOME`): tokens, store, logs, run directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import quote

from modelpool.process import StartupError

# sun_path is 108 bytes with its final NUL.
_SOCKET_PATH_MAX = 107
_MEMORY = Path("/dev/shm")
_MEMORY_FREE_MIN = 256 << 20
_LINKED_BY = "home"
_LOCK = "lock"  # as gateway/shared.py has it


class AlreadyRunning(Exception):
    """Another live process holds the lock. `pid` is what it wrote there, or None."""

    def __init__(self, name: str, pid: int | None) -> None:
        super().__init__(f"{name} is already running" + (f" (process {pid})" if pid else ""))
        self.pid = pid


def open_private(path: Path, mode: Literal["ab", "wb"]) -> BinaryIO:
    """A file that only its owner may read, from its first moment; one that was there before is made so."""

    def opener(name: str, flags: int) -> int:
        fd = os.open(name, flags, 0o600)
        if os.fstat(fd).st_mode & 0o077:
            os.fchmod(fd, 0o600)
        return fd

    return open(path, mode, opener=opener)


class Home:
    """Paths and secrets below one folder. Creating one creates the folder, readable by its owner only.

    Raises StartupError where that is not possible.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for folder in (path, self.run, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(path, error) from error

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def cache(self) -> Path:
        """What can be made again."""
        return self.path / "cache"

    @property
    def store(self) -> Path:
        return self.path / "modelpool.db"

    @property
    def control_socket(self) -> Path:
        """The control socket; in the system's temporary folder where `home` is too long for a socket's path."""
        path = self.run / "control.sock"
        if len(os.fsencode(path)) <= _SOCKET_PATH_MAX:
            return path
        return _private(self._short) / "control.sock"

    def shared_memory(self) -> Path:
        """The folder of the files that the gateway processes of this machine map; made at the first call.

        It is a link into the system's memory, where there is room. In a file on a disk, a page cannot be written to
        while the disk takes it, which stopped a gateway for 30 ms when something else wrote much.
        """
        folder = self.run / "gateway"
        if not os.path.lexists(folder):
            _drop_orphans()
            with contextlib.suppress(FileExistsError):  # another process was first, and whatever it chose is right
                if _free_bytes(_MEMORY) >= _MEMORY_FREE_MIN:
                    folder.symlink_to(_MEMORY / self._own_name)
                else:
                    folder.mkdir(mode=0o700)
        if folder.is_symlink():
            (_private(folder.readlink()) / _LINKED_BY).write_text(str(folder))
        return folder

    def give_back(self) -> None:
        """Give back what it takes of places that all share. Only after the last gateway has ended."""
        folder = self.run / "gateway"
        if folder.is_symlink():
            shutil.rmtree(folder.readlink(), ignore_errors=True)
            folder.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is none, or a manager's socket is in it
            self._short.rmdir()

    @property
    def _short(self) -> Path:
        """A folder whose path is short."""
        return Path(tempfile.gettempdir()) / self._own_name

    @property
    def _own_name(self) -> str:
        """A name for a folder of this home in a place that all users share."""
        return f"modelpool-{os.getuid()}-{hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]}"

    def gateway_log(self, number: int) -> Path:
        """The log of the gateway process of this number, from 1."""
        return self.logs / f"gateway{f'-{number}' if number > 1 else ''}.log"

    def instance_log(self, worker_id: str, instance: str) -> Path:
        """The log of one instance. Names are quoted, so that an alias such as `org/model` is one file."""
        folder = self.logs / "instances" / quote(worker_id, safe="")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder / f"{quote(instance, safe='')}.log"

    def cluster_token(self) -> str:
        """The token that the parts of a pool know each other by; made at the first call."""
        return self._secret("cluster-token")

    def admin_key(self) -> str:
        """The key that opens every route of the gateway; made at the first call."""
        return self._secret("admin-key")

    def keep_secrets(self, cluster_token: str, admin_key: str) -> None:
        """Have those of a pool that began elsewhere."""
        for name, secret in (("cluster-token", cluster_token), ("admin-key", admin_key)):
            path = self.path / name
            if not path.exists() or path.read_text().strip() != secret:
                with open_private(path, "wb") as file:
                    file.write(f"{secret}\n".encode())

    def _secret(self, name: str) -> str:
        path = self.path / name
        if not path.exists():
            # Written under another name first: a reader never sees half a secret, and the first writer wins.
            try:
                fd, draft = tempfile.mkstemp(prefix=f".{name}.", dir=self.path)
            except OSError as error:
                raise _unusable(self.path, error) from error
            try:
                with open(fd, "w") as file:
                    file.write(secrets.token_urlsafe(32) + "\n")
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
            finally:
                os.unlink(draft)
        return path.read_text().strip()

    @contextmanager
    def lock(self, name: str) -> Iterator[str]:
        """Hold the lock `name` as long as this process lives. Raises AlreadyRunning.

        Yields an id of the lock that no other one has: who had it under that id before has ended.
        """
        path = self.run / f"{quote(name, safe='')}.lock"
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read().strip()
                raise AlreadyRunning(name, int(text) if text.isdigit() else None) from None
            pid = str(os.getpid()).encode()
            with contextlib.suppress(OSError):  # it is for people, and the disk may be full
                os.pwrite(file.fileno(), pid, 0)
                os.ftruncate(file.fileno(), len(pid))
            found, boot = os.fstat(file.fileno()), Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            yield f"{boot}:{found.st_dev}:{found.st_ino}"


def _unusable(path: Path, error: OSError) -> StartupError:
    return StartupError(
        f"The home {path} cannot be used: {error.strerror}: {error.filename}.",
        "Set MODELPOOL_HOME to a folder that this user may write to.",
    )


def _private(folder: Path) -> Path:
    """A folder in a place that all users share, which must be ours. Raises PermissionError."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise PermissionError(errno.EACCES, "belongs to another user", str(folder))
    return folder


def _drop_orphans() -> None:
    """Give back what homes that are gone hold of the system's memory: where the last gateway of a home was ended by
    hand, what they shared is still there for the next one.
    """
    for folder in _MEMORY.glob(f"modelpool-{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            if not os.path.lexists((folder / _LINKED_BY).read_text()):
                with open(folder / _LOCK, "rb+") as file:  # its gateways hold parts of it, whoever sees their home
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0
    except OSError:
        return 0
