"""Which worker and devices a replica goes to: by free memory, spreading the replicas of one alias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, islice

import msgspec

GB = 10**9
CPU_DEFAULT_BYTES = 2 * GB
ACCELERATOR_DEFAULT_FRACTION = 0.9
HOST = -1
"""The index that the machine's own memory has beside those of its accelerators."""
NAMED_MAX = 8
"""So many workers are named in a refusal."""
_CHOICES_MAX = 100
"""Sets of devices of one worker that are looked at where none fits."""


class Other(msgspec.Struct, frozen=True):
    """A process that holds memory of a device and is not of this pool."""

    pid: int
    name: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid}) holds {gb(self.bytes)}"


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What one device, or the machine (HOST), can still take: `free_bytes` is neither in use nor set aside.

    `lost`: why nothing can be put there at all. `others` hold what is in use by processes not of this pool.
    """

    index: int
    kind: str
    total_bytes: int
    free_bytes: int
    name: str = ""
    lost: str = ""
    others: tuple[Other, ...] = ()


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that may be asked. `refusal` says why it can not run this model whatever its memory.

    `avoid`: it failed there lately. `has_files`: the model's files are there.
    """

    worker_id: str
    devices: tuple[Room, ...]
    host: Room | None = None
    replicas_here: int = 0
    refusal: str = ""
    avoid: bool = False
    has_files: bool = False


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What to have on each of `devices` devices: bytes, or a fraction of its total, or the default of its kind.

    `host_bytes`: of the machine's memory, beside accelerators.
    """

    devices: int = 1
    bytes_each: int | None = None
    fraction: float | None = None
    host_bytes: int = 0

    def on(self, device: Room) -> int:
        """Bytes needed on this device, or of the machine."""
        if device.index == HOST:
            return self.host_bytes
        if self.bytes_each is not None:
            return self.bytes_each
        if self.fraction is None and device.kind == "cpu":
            return CPU_DEFAULT_BYTES
        return int(device.total_bytes * (self.fraction or ACCELERATOR_DEFAULT_FRACTION))


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    devices: tuple[int, ...]
    bytes_each: int
    reason: str


class Refusal(msgspec.Struct, frozen=True):
    """Nothing fits; `reason` says why, with the numbers of every worker."""

    reason: str


def place(need: Need, candidates: Sequence[Candidate], others: int = 0) -> Placement | Refusal:
    """The worker with the fewest replicas of this alias; of those one that has its files; then the most room left.

    One where it failed comes last. `others`: so many more workers have too little room.
    """
    fitting = []
    for candidate in candidates:
        if devices := _fit(need, candidate)[0]:
            left = min(device.free_bytes - need.on(device) for device in devices)
            rank = (candidate.avoid, candidate.replicas_here, not candidate.has_files, -left, candidate.worker_id)
            fitting.append((rank, candidate, left, devices))
    if not fitting:
        return Refusal(_why(need, candidates, others))
    _, chosen, left, devices = min(fitting, key=lambda choice: choice[0])
    files = "; its files are there" if chosen.has_files else ""
    return Placement(
        worker_id=chosen.worker_id,
        devices=tuple(device.index for device in devices),
        bytes_each=max(need.on(device) for device in devices),
        reason=f"{gb(left)} left there after it; {chosen.replicas_here} replicas of it there already{files}",
    )


def shortfalls(need: Need, candidate: Candidate) -> Iterator[dict[int, int]]:
    """What is lacking there, in bytes by device and HOST, for one set of devices after the other.

    The set that lacks least comes first; nothing where there are too few, or none may be used.
    """
    host = () if candidate.host is None else (candidate.host,)
    if candidate.refusal or any(need.on(room) > room.total_bytes for room in host):
        return
    for kin in _kin(candidate):
        large = [device for device in kin if need.on(device) <= device.total_bytes]
        for chosen in islice(combinations(large, _count(need, candidate)), _CHOICES_MAX):
            lacking = {room.index: need.on(room) - room.free_bytes for room in (*chosen, *host)}
            yield {index: bytes_ for index, bytes_ in lacking.items() if bytes_ > 0}


def _count(need: Need, candidate: Candidate) -> int:
    # A machine without accelerators is one device, on which the ranks of a model share cores and memory.
    return 1 if all(device.kind == "cpu" for device in candidate.devices) else need.devices


def _kin(candidate: Candidate) -> list[list[Room]]:
    """The devices that are there, those of one kind together, the one with the most room first."""
    groups: dict[tuple[str, str, int], list[Room]] = {}
    for device in candidate.devices:
        if not device.lost:
            groups.setdefault((device.kind, device.name, device.total_bytes), []).append(device)
    return [sorted(group, key=lambda device: (-device.free_bytes, device.index)) for group in groups.values()]


def _fit(need: Need, candidate: Candidate) -> tuple[tuple[Room, ...], str]:
    """The devices to use on one worker, of one kind and with the most room; or why there are none."""
    if candidate.refusal:
        return (), candidate.refusal
    count = _count(need, candidate)
    groups = [group[:count] for group in _kin(candidate) if len(group) >= count]
    lost = [f"device {each.index} is lost ({each.lost})" for each in candidate.devices if each.lost]
    if not groups:
        most = max((len(group) for group in _kin(candidate)), default=0)
        alike = " of one kind" if most < len(candidate.devices) - len(lost) else ""
        return (), "; ".join([f"needs {need.devices} devices{alike}, has {most}", *lost])
    chosen = max(groups, key=lambda group: group[-1].free_bytes - need.on(group[-1]))
    lacking = []
    if need.on(chosen[-1]) > chosen[-1].free_bytes:
        lacking.append(_lack(need, count, [device for group in _kin(candidate) for device in group]))
    if candidate.host is not None and need.host_bytes > candidate.host.free_bytes:
        lacking.append(f"needs {gb(need.host_bytes)} of host memory, {_state(candidate.host)}")
    if lacking:
        return (), "; ".join([*lacking, *lost])
    return tuple(sorted(chosen, key=lambda device: device.index)), ""


def _lack(need: Need, count: int, devices: Sequence[Room]) -> str:
    """What is needed, and how things stand on each device."""
    if len(devices) == 1:
        return f"needs {gb(need.on(devices[0]))} on device {devices[0].index}, {_state(devices[0])}"
    standing = "; ".join(f"device {device.index}: {_state(device)}" for device in sorted(devices, key=_by_index))
    where = "one device" if count == 1 else f"each of {count} devices"
    return f"needs {gb(max(map(need.on, devices)))} on {where} ({standing})"


def _state(room: Room) -> str:
    others = "".join(f", {each}" for each in room.others)
    return f"{gb(max(0, room.free_bytes))} free of {gb(room.total_bytes)}{others}"


def _by_index(room: Room) -> int:
    return room.index


def _why(need: Need, candidates: Sequence[Candidate], others: int) -> str:
    """Why it fits nowhere: on every worker, or where these are very many on those with the most room."""
    shown = candidates
    if len(candidates) > NAMED_MAX:
        shown = sorted(candidates, key=lambda each: -max((room.free_bytes for room in each.devices), default=0))
    reasons = [f"{each.worker_id}: {_fit(need, each)[1]}" for each in shown[:NAMED_MAX]]
    if more := len(candidates) - len(reasons) + others:
        reasons.append(f"and {more} other workers")
    return "; ".join(reasons) or "no worker is registered"


def gb(value: int) -> str:
    return f"{value / GB:.1f} GB"
