"""Which worker and devices a replica goes to: by free memory, spreading the replicas of one alias."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

GB = 10**9
CPU_DEFAULT_BYTES = 2 * GB
ACCELERATOR_DEFAULT_FRACTION = 0.9


class DeviceRoom(msgspec.Struct, frozen=True, kw_only=True):
    """What one device can still take: `free_bytes` is what is neither in use nor promised."""

    index: int
    kind: str
    total_bytes: int
    free_bytes: int


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that may be asked. `refusal` says why it can not run this model whatever its memory."""

    worker_id: str
    devices: tuple[DeviceRoom, ...]
    replicas_here: int = 0
    refusal: str = ""


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What to have on each of `devices` devices: bytes, or a fraction of its total, or the default of its kind."""

    devices: int = 1
    bytes_each: int | None = None
    fraction: float | None = None

    def on(self, device: DeviceRoom) -> int:
        """Bytes needed on this device."""
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


def place(need: Need, candidates: Sequence[Candidate]) -> Placement | Refusal:
    """The worker with the fewest replicas of this alias, among those the one with the most memory left."""
    fitting = []
    refusals = []
    for candidate in candidates:
        devices, refusal = _fit(need, candidate)
        if refusal:
            refusals.append(f"{candidate.worker_id}: {refusal}")
        else:
            left = min(device.free_bytes - need.on(device) for device in devices)
            fitting.append((candidate.replicas_here, -left, candidate.worker_id, devices))
    if not fitting:
        return Refusal("; ".join(refusals) or "no worker is registered")
    replicas, negative_left, worker_id, devices = min(fitting, key=lambda choice: choice[:3])
    return Placement(
        worker_id=worker_id,
        devices=tuple(device.index for device in devices),
        bytes_each=max(need.on(device) for device in devices),
        reason=f"{_gb(-negative_left)} left there after it; {replicas} replicas of it there already",
    )


def shortfall(need: Need, candidate: Candidate) -> dict[int, int]:
    """What each of the best devices there lacks, in bytes; nothing where there are too few, or none may be used."""
    count = _count(need, candidate)
    if candidate.refusal or len(candidate.devices) < count:
        return {}
    by_room = sorted(candidate.devices, key=lambda device: (need.on(device) - device.free_bytes, device.index))
    lacking = {device.index: need.on(device) - device.free_bytes for device in by_room[:count]}
    if any(need.on(device) > device.total_bytes for device in by_room[:count]):
        return {}
    return {index: bytes_ for index, bytes_ in lacking.items() if bytes_ > 0}


def _count(need: Need, candidate: Candidate) -> int:
    # A machine without accelerators is one device, on which the ranks of a model share cores and memory.
    return 1 if all(device.kind == "cpu" for device in candidate.devices) else need.devices


def _fit(need: Need, candidate: Candidate) -> tuple[tuple[DeviceRoom, ...], str]:
    """The devices to use on one worker, those with the most room first; or why there are none."""
    if candidate.refusal:
        return (), candidate.refusal
    count = _count(need, candidate)
    if len(candidate.devices) < count:
        return (), f"needs {need.devices} devices, has {len(candidate.devices)}"
    by_room = sorted(candidate.devices, key=lambda device: (need.on(device) - device.free_bytes, device.index))
    chosen = by_room[:count]
    short = [device for device in chosen if need.on(device) > device.free_bytes]
    if short:
        worst = short[-1]
        return (), (
            f"needs {_gb(need.on(worst))} on device {worst.index}, "
            f"{_gb(max(0, worst.free_bytes))} free of {_gb(worst.total_bytes)}"
        )
    return tuple(sorted(chosen, key=lambda device: device.index)), ""


def _gb(value: int) -> str:
    return f"{value / GB:.1f} GB"
