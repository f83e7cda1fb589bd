"""What the memory of a worker is set aside for: that of its devices, and beside accelerators that of the machine.

It is kept nowhere, but worked out from what workers report, and so outlives whoever is started again.

    reserve   an order to start, to wake or to sleep sets aside the most that it may take
    commit    who is awake has its share, or what was measured where that is more; a sleeper what was measured
    release   who has ended has nothing, and its memory is free once the device shows it

What is free is the less of two: the total without all that is set aside, and what the device shows as free without what
is set aside and cannot be seen there yet. The second counts what others hold who are not of this pool.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import HOST, Need, Room
from modelpool.core.pool import Device, Instance, Worker
from modelpool.core.scaling import Step

_S = InstanceState
_NOTHING_LEFT = (_S.ABSENT, _S.UNLOADED, _S.FAILED)


class Claim(msgspec.Struct, frozen=True):
    """What is set aside for one instance on one device, or of the machine; `unseen`: what cannot be seen there yet."""

    bytes: int = 0
    unseen: int = 0


_NOTHING = Claim()


def on_device(instance: Instance, *, accelerated: bool) -> Claim:
    """On each of its devices."""
    state, held = instance.state, instance.held_bytes
    most = max(instance.memory_bytes, held)
    if state in _NOTHING_LEFT:
        return Claim()
    if state is _S.STARTING:
        return Claim(most, most)
    if state is _S.WAKING or instance.order is Step.WAKE:
        return Claim(most, most - held)
    if state in (_S.SLEEP_1, _S.SLEEP_2):
        # An accelerator's sleep mode cannot go deeper in place: it wakes in between.
        return Claim(most, most - held) if accelerated and instance.order is Step.SLEEP_2 else Claim(held)
    return Claim(most, most - held if held else 0)


def on_host(instance: Instance) -> Claim:
    """Of the machine's memory, beside an accelerator: there level 1 keeps the weights in it."""
    state, held = instance.state, instance.host_bytes
    if state in _NOTHING_LEFT:
        return Claim()
    if state is _S.STARTING:
        return Claim(held, held)
    if state is _S.SLEEP_1:
        # Pinned memory, where the weights are, does not show in any process.
        return Claim(max(held, instance.weights_bytes))
    if instance.order is Step.SLEEP_1 or (state is _S.DRAINING and not instance.stopping and 1 in instance.levels):
        return Claim(held + instance.weights_bytes, instance.weights_bytes)
    return Claim(held)


class Ledger(msgspec.Struct, frozen=True):
    """What a worker has room for. `host` is None where the one device is the machine itself, or nobody knows.

    `most`: on the device with the most of it.
    """

    devices: tuple[Room, ...]
    host: Room | None = None
    most: int = 0

    def may_take(self, need: Need) -> bool:
        """A quick look, since mostly there is no room: False where there is too little."""
        if need.bytes_each is not None:
            return self.most >= need.bytes_each
        return any(device.free_bytes >= need.on(device) for device in self.devices)

    def room(self, index: int) -> Room | None:
        """That of a device, or of HOST."""
        if index == HOST:
            return self.host
        return next((each for each in self.devices if each.index == index), None)


def accelerated(worker: Worker) -> bool:
    return any(device.kind != "cpu" for device in worker.devices)


def ledger(worker: Worker, instances: Iterable[Instance]) -> Ledger:
    """That of a worker and all instances on it."""
    fast = accelerated(worker)
    sums = claims(instances, accelerated=fast)
    devices = tuple(_room(device, sums.get(device.index, _NOTHING)) for device in worker.devices)
    return Ledger(
        devices=devices,
        most=max((device.free_bytes for device in devices), default=0),
        host=_room(worker.host, sums.get(HOST, _NOTHING)) if worker.host and fast else None,
    )


def claims(instances: Iterable[Instance], *, accelerated: bool) -> dict[int, Claim]:
    """What is set aside for all of them: by device, and of the machine (HOST) beside accelerators."""
    sums: dict[int, Claim] = {}
    for instance in instances:
        here = [(index, on_device(instance, accelerated=accelerated)) for index in instance.devices]
        for index, claim in [*here, (HOST, on_host(instance))] if accelerated else here:
            before = sums.get(index, _NOTHING)
            sums[index] = Claim(before.bytes + claim.bytes, before.unseen + claim.unseen)
    return sums


def _room(device: Device, claim: Claim) -> Room:
    return replace(device, free_bytes=min(device.total_bytes - claim.bytes, device.free_bytes - claim.unseen))
