"""What the manager hears: of models, of workers and their instances, of gateways, of its own orders."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from modelpool.core.demand import Seen
from modelpool.core.learned import Learned
from modelpool.core.lifecycle import InstanceState
from modelpool.core.pool import Device, Key, Model


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """An instance as its worker reports it; `changed_at` orders the reports of one instance."""

    instance: str
    alias: str
    key: str
    state: InstanceState
    reason: str = ""
    permanent: bool = False
    ending: bool = False
    """It has failed, and not all of its processes have ended."""
    devices: tuple[int, ...] = ()
    memory_bytes: int = 0
    held_bytes: int = 0
    host_bytes: int = 0
    weights_bytes: int = 0
    capacity: int = 1
    levels: tuple[int, ...] = ()
    changed_at: float = 0.0
    aside_s: float = 0.0
    """Of the time of its start: what the next one will not need, such as a download."""
    slept_s: float = 0.0
    """How long it took to fall asleep, once its requests had ended."""


class ModelRegistered(msgspec.Struct, frozen=True):
    """A new model; or one that the manager before knew, with what it had `learned`.

    `resting`: it was up once, and went down because nobody asked: it is not brought up until somebody does.
    """

    model: Model
    learned: Learned = {}
    resting: bool = False


class ModelChanged(msgspec.Struct, frozen=True):
    """Its settings are others now; its key is the same, so what runs is as good as before."""

    model: Model


class ModelReplaced(msgspec.Struct, frozen=True):
    """It was registered anew, with another key; what runs of the one before serves until it is there."""

    model: Model


class ModelRemoved(msgspec.Struct, frozen=True):
    alias: str


class WorkerReported(msgspec.Struct, frozen=True, kw_only=True):
    """A registration or a heartbeat: all that the worker runs."""

    worker_id: str
    incarnation: str
    devices: tuple[Device, ...]
    engines: Mapping[str, str]
    reports: tuple[Report, ...]
    host: Device | None = None
    files: frozenset[str] = frozenset()


class WorkerGone(msgspec.Struct, frozen=True):
    """The worker's process has ended, and its instances with it."""

    worker_id: str
    incarnation: str
    reason: str


class WorkerLeft(msgspec.Struct, frozen=True):
    """The worker was shut down and said goodbye: it is not missed."""

    worker_id: str
    incarnation: str


class DrainBegun(msgspec.Struct, frozen=True):
    """The worker is to go: nothing new comes to it, and what it runs leaves."""

    worker_id: str


class DrainCancelled(msgspec.Struct, frozen=True):
    """It stays after all; what has not been ended yet stays too."""

    worker_id: str


class OrderAnswered(msgspec.Struct, frozen=True):
    """The worker took an order; its next report shows what came of it."""

    key: Key


class OrderRefused(msgspec.Struct, frozen=True):
    """`permanent`: the same order will be refused again."""

    key: Key
    reason: str
    permanent: bool = False


class OrderPostponed(msgspec.Struct, frozen=True):
    """An order was not given, since another one about the instance was under way: it is due again."""

    key: Key


class DemandHeard(msgspec.Struct, frozen=True):
    """What one gateway sees, by alias: all models that it has anything to say of."""

    gateway: str
    seen: Mapping[str, Seen]


class GatewayGone(msgspec.Struct, frozen=True):
    gateway: str


class Tick(msgspec.Struct, frozen=True):
    """Nothing happened but time."""


Event = (
    ModelRegistered
    | ModelChanged
    | ModelReplaced
    | ModelRemoved
    | WorkerReported
    | WorkerGone
    | WorkerLeft
    | DrainBegun
    | DrainCancelled
    | OrderAnswered
    | OrderRefused
    | OrderPostponed
    | DemandHeard
    | GatewayGone
    | Tick
)
