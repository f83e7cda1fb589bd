"""Manager → gateway: the routing snapshot and the API keys, pushed as lines of JSON on `GET /snapshots` of the
control socket.

First Keys, then a Snapshot, then Deltas and KeysDeltas. The `sequence` of a delta follows the one before of its own
kind within the same `epoch`. A gap, or another epoch, means that something was missed: the gateway closes the stream
and opens it again, which brings everything anew. A manager that waits for its workers has no Snapshot yet, but Keys.
An empty line is a keepalive.
"""

from __future__ import annotations

from typing import get_args

import msgspec

from modelpool.core.limits import Limits

KEEPALIVE_S = 5.0


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One ACTIVE instance. Requests go to `http://host:port` + `prefix` + path, with the cluster token."""

    instance: str
    worker_id: str
    host: str
    port: int
    prefix: str = ""
    capacity: int = 1

    @property
    def place(self) -> tuple[str, ...]:
        """What does not change while the instance runs."""
        return (self.worker_id, self.instance, self.host, str(self.port), self.prefix)


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


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A live API key. `digest` is the SHA-256 of its secret, in hex; without `models` it may use all."""

    id: str
    name: str
    digest: str
    models: tuple[str, ...] = ()
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    priority: int = 0


class Keys(msgspec.Struct, frozen=True, kw_only=True, tag="keys"):
    """All live keys. `required`: one was made once, so nothing is open any more, even if all were revoked."""

    epoch: str
    sequence: int
    required: bool
    keys: tuple[KeyEntry, ...] = ()


class KeysDelta(msgspec.Struct, frozen=True, kw_only=True, tag="keys_delta"):
    epoch: str
    sequence: int
    made: tuple[KeyEntry, ...] = ()
    revoked: tuple[str, ...] = ()
    """Their ids."""


class Others(msgspec.Struct, frozen=True, kw_only=True, tag="others"):
    """What the gateways of this node should know of those of others, where there are any. Each replaces the one before.

    `number` grows, also from one manager to the next. `nodes`: so many have gateways. `inflight`: what others have at
    instances, on average. `keys`: of each key that is used, by its id, the part of its limits that is for this node.
    `instances`: of those that are used much, by name, the part of their capacity.
    """

    epoch: str
    number: int
    nodes: int
    inflight: dict[str, int] = {}
    keys: dict[str, Limits] = {}
    instances: dict[str, int] = {}


RoutingUpdate = Snapshot | Delta
KeysUpdate = Keys | KeysDelta
Update = RoutingUpdate | KeysUpdate | Others

_UPDATES: msgspec.json.Decoder[Update | None] = msgspec.json.Decoder(Update | None)
_KINDS = frozenset(each.__struct_config__.tag for each in get_args(Update))


class _Kind(msgspec.Struct, frozen=True):
    type: str = ""


def decode_update(line: bytes | msgspec.Raw) -> Update | None:
    """None for a kind that only later versions know, as for a keepalive. Raises msgspec.DecodeError."""
    try:
        return _UPDATES.decode(line)
    except msgspec.ValidationError:
        if msgspec.json.decode(line, type=_Kind).type in _KINDS:
            raise
        return None
