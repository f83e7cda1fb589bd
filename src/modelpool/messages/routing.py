"""Manager → gateway: the routing snapshot, pushed as lines of JSON on `GET /snapshots` of the control socket.

First a Snapshot, then Deltas whose `sequence` each follows the one before within the same `epoch`. A gap, or another
epoch, means that something was missed: the gateway closes the stream and opens it again, which brings a new Snapshot.
An empty line is a keepalive.
"""

from __future__ import annotations

import msgspec

KEEPALIVE_S = 5.0


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One ACTIVE instance. Requests go to `http://host:port` + `prefix` + path, with the cluster token."""

    instance: str
    worker_id: str
    host: str
    port: int
    prefix: str = ""
    capacity: int = 1


class Unavailable(msgspec.Struct, frozen=True, kw_only=True):
    """What to answer while a model has no route: status 503, this code and message. `retry_after` in seconds.

    `on_its_way`: it is expected without anybody doing anything, so that a request may wait for it instead.
    """

    code: str
    message: str
    retry_after: float
    on_its_way: bool = False


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A registered model. `unavailable` is set exactly when `routes` is empty."""

    alias: str
    created: int
    routes: tuple[Route, ...] = ()
    unavailable: Unavailable | None = None
    max_model_len: int | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    epoch: str
    sequence: int
    models: dict[str, ModelEntry]


class Delta(msgspec.Struct, frozen=True, kw_only=True, tag="delta"):
    epoch: str
    sequence: int
    changed: dict[str, ModelEntry] = {}
    removed: tuple[str, ...] = ()


Update = Snapshot | Delta
