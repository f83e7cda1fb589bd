"""GPUs that do not exist, to try without real ones what is done with them: declared, and taken by fake engines.

They are declared as `4x80` (count and GB each) or by a YAML file, which may change at any time:

    host_gb: 64                      # the machine's own memory; what there really is where this is left out
    devices:
      - {gb: 80}
      - {gb: 80, others: [{pid: 4242, name: train.py, gb: 30}]}
      - {gb: 24, name: L4}
      - {gb: 80, lost: GPU is lost}

Each engine has a file in a folder that all of a worker share, and holds its lock as long as it lives: so what a killed
one held is free at once, as it is on a real device, and nobody can take more than there is.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated

import msgspec
import psutil
from msgspec import Meta

from modelpool.core.placement import GB, HOST, Other, Room, gb

SETTING = "MODELPOOL_FAKE_DEVICES"
FOLDER = "MODELPOOL_FAKE_DEVICES_FOLDER"
_SHORT = re.compile(r"\s*(\d{1,3})\s*x\s*(\d+(?:\.\d+)?)\s*")
_Size = Annotated[float, Meta(gt=0)]


class OtherProcess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pid: int
    name: str
    gb: _Size


class FakeGpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    gb: _Size
    name: str = "fake GPU"
    lost: str = ""
    others: tuple[OtherProcess, ...] = ()


class Declaration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    devices: Annotated[tuple[FakeGpu, ...], Meta(min_length=1)]
    host_gb: _Size | None = None


class InvalidDeclaration(ValueError):
    """The text says what is wrong."""


class OutOfMemory(Exception):
    """As a real device would say it; the text has the numbers."""


def declaration(setting: str) -> Declaration:
    """What a setting, or the file that it names, declares now. Raises InvalidDeclaration."""
    if short := _SHORT.fullmatch(setting):
        devices = [{"gb": float(short[2])}] * int(short[1])
        return _checked({"devices": devices}, repr(setting))
    if not setting.startswith(("/", "./")):
        raise InvalidDeclaration(f"{setting!r} must be `COUNTxGB`, such as 4x80, or the path of a YAML file")
    try:
        return _checked(msgspec.yaml.decode(Path(setting).read_bytes()), setting)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidDeclaration(f"{setting}: {error}") from error


def _checked(raw: object, where: str) -> Declaration:
    try:
        return msgspec.convert(raw, Declaration)
    except msgspec.ValidationError as error:
        raise InvalidDeclaration(f"{where}: {error}; devices are `COUNTxGB` or a YAML file that lists them") from error


class FakeGpus:
    """The declared GPUs and what is held of them. `folder` is where all meet who share them."""

    def __init__(self, setting: str, folder: Path) -> None:
        self._setting = setting
        self._folder = folder
        self._declared = declaration(setting)
        self._own: IO[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """By which an engine finds them."""
        return {SETTING: self._setting, FOLDER: str(self._folder)}

    def rooms(self) -> tuple[Room, ...]:
        """The devices, and last the machine (HOST), as they are now."""
        with self._locked():
            return self._rooms(self._holders())

    def holders(self) -> dict[int, dict[int, int]]:
        """What each engine holds: process id → device, or HOST → bytes."""
        with self._locked():
            return self._holders()

    def hold(self, wanted: Mapping[int, int]) -> int:
        """Hold so much from now on, by device or HOST, until this process ends; returns by how much that is less.

        Raises OutOfMemory, and changes nothing then.
        """
        with self._locked():
            if self._own is None:
                self._own = open(self._folder / str(os.getpid()), "wb")  # noqa: SIM115  for as long as we live
                fcntl.flock(self._own, fcntl.LOCK_EX)
            holders = self._holders()
            before = holders.pop(os.getpid(), {})
            for room in self._rooms(holders):
                if (bytes_ := wanted.get(room.index, 0)) > before.get(room.index, 0):
                    _check(room, bytes_)
            self._own.seek(0)
            self._own.truncate()
            self._own.write(msgspec.json.encode(wanted))
            self._own.flush()
            return sum(before.values()) - sum(wanted.values())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _holders(self) -> dict[int, dict[int, int]]:
        held = {}
        for path in self._folder.glob("[0-9]*"):
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    held[int(path.name)] = msgspec.json.decode(file.read() or b"{}", type=dict[int, int])
                else:
                    path.unlink()  # its process has ended
        return held

    def _rooms(self, holders: Mapping[int, Mapping[int, int]]) -> tuple[Room, ...]:
        # A file that is just being written: what it said before holds.
        with suppress(InvalidDeclaration):
            self._declared = declaration(self._setting)
        held: Counter[int] = Counter()
        for each in holders.values():
            held.update(each)
        devices = [_room(index, gpu, held[index]) for index, gpu in enumerate(self._declared.devices)]
        return (*devices, _machine(self._declared.host_gb, held[HOST]))


def from_environment(environ: Mapping[str, str]) -> FakeGpus | None:
    """The GPUs that this engine runs on, where they are fake ones."""
    folder = environ.get(FOLDER)
    return FakeGpus(environ[SETTING], Path(folder)) if folder else None


def _room(index: int, gpu: FakeGpu, held: int) -> Room:
    others = tuple(Other(each.pid, each.name, int(each.gb * GB)) for each in gpu.others)
    total = int(gpu.gb * GB)
    free = max(0, total - held - sum(each.bytes for each in others))
    return Room(
        index=index, kind="cuda", name=gpu.name, total_bytes=total, free_bytes=free, lost=gpu.lost, others=others
    )


def _machine(declared_gb: float | None, held: int) -> Room:
    memory = psutil.virtual_memory()
    total, free = (memory.total, memory.available) if declared_gb is None else (int(declared_gb * GB),) * 2
    return Room(index=HOST, kind="cpu", name="host memory", total_bytes=total, free_bytes=max(0, free - held))


def _check(room: Room, bytes_: int) -> None:
    where = "host memory" if room.index == HOST else f"device {room.index}"
    if room.lost:
        raise OutOfMemory(f"{where}: {room.lost}")
    if bytes_ > room.free_bytes:
        numbers = f"{gb(bytes_)} wanted of {where}, {gb(room.free_bytes)} free of {gb(room.total_bytes)}"
        raise OutOfMemory(f"out of memory: {numbers}")
