"""What `GET /admin/dump` gives and `POST /admin/load` takes: all that was registered and made, but no secret."""

from __future__ import annotations

import msgspec

from modelpool.messages.keys import KeySpec
from modelpool.messages.models import ModelSpec


class StoredModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`created`: seconds since 1970. `replaces`: what instances may still serve it that were started before it was
    registered anew; never dumped.
    """

    spec: ModelSpec
    created: int
    replaces: tuple[str, ...] = ()


class StoredKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`digest`: SHA-256 of the secret, in hex. Times are in seconds since 1970."""

    id: str
    digest: str
    spec: KeySpec
    created: int
    revoked: int | None = None


class Dump(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`cluster`: the id of the store that it is of."""

    cluster: str
    models: tuple[StoredModel, ...] = ()
    keys: tuple[StoredKey, ...] = ()


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What was not there before: aliases, and ids of keys."""

    models: tuple[str, ...]
    keys: tuple[str, ...]
