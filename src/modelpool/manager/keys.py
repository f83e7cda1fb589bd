"""The API keys of a pool: made, listed, revoked; and what the gateways are told of them."""

from __future__ import annotations

import difflib
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable

import msgspec

from modelpool.core.limits import Limits
from modelpool.errors import Conflict, NotFound
from modelpool.manager.store import Store
from modelpool.manager.writing import Writing
from modelpool.messages.dump import StoredKey
from modelpool.messages.keys import ID_PREFIX, SECRET_PREFIX, KeyMade, KeySpec, KeyView
from modelpool.messages.routing import KeyEntry, Keys, KeysDelta, KeysUpdate

log = logging.getLogger(__name__)


class KeyNotFound(NotFound):
    code = "key_not_found"


class KeyRegister:
    """All keys that were ever made. A change is in the store before it is told, and told before its caller is."""

    def __init__(self, store: Store, *, tell: Callable[[KeysUpdate], None]) -> None:
        self._store = store
        self._tell = tell
        self._sequence = 0
        self._required = False
        self._keys: dict[str, StoredKey] = {}
        self.writing = Writing(store)

    async def recall(self) -> None:
        self._required = await self._store.has_keys()
        self._keys = {key.id: key for key in await self._store.keys()}

    async def reread(self) -> None:
        """Know what the store knows, and tell it, where that is something else. Raises StoreError."""
        async with self.writing.in_turn():
            before = self._keys
            await self.recall()
            if self._keys != before:
                self._sequence += 1
                self._tell(self.update())

    async def make(self, spec: KeySpec) -> KeyMade:
        """Raises Conflict where a live key has that name."""
        secret = SECRET_PREFIX + secrets.token_urlsafe(32)
        async with self.writing.in_turn():
            if any(key.spec.name == spec.name for key in self._keys.values() if key.revoked is None):
                raise Conflict(
                    f"There is a live key named `{spec.name}`. Revoke it first, or use another name.",
                    param="name",
                    code="name_taken",
                )
            key = StoredKey(
                id=ID_PREFIX + secrets.token_hex(8),
                digest=hashlib.sha256(secret.encode()).hexdigest(),
                spec=spec,
                created=int(time.time()),
            )
            await self._store.add_key(key)
            self._keys[key.id] = key
            self._required = True
            self._changed(made=(_entry(key),))
        log.info("made the key %s (%s)", key.id, spec.name)
        return KeyMade(key=_view(key), secret=secret)

    async def revoke(self, id: str) -> KeyView:
        """Once and for all; again changes nothing. Raises KeyNotFound."""
        async with self.writing.in_turn():
            key = self._keys.get(id)
            if key is None:
                close = difflib.get_close_matches(id, self._keys, 1)
                hint = f" Did you mean `{close[0]}`?" if close else " GET /admin/keys lists them."
                raise KeyNotFound(f"There is no key `{id}`.{hint}")
            if key.revoked is None:
                revoked = int(time.time())
                await self._store.revoke_key(id, revoked)
                self._keys[id] = key = msgspec.structs.replace(key, revoked=revoked)
                self._changed(revoked=(id,))
                log.info("revoked the key %s (%s)", id, key.spec.name)
            return _view(key)

    def limits(self, id: str) -> Limits | None:
        """Of a live key."""
        key = self._keys.get(id)
        if key is None or key.revoked is not None:
            return None
        spec = key.spec
        return Limits(
            requests=spec.requests_per_minute, tokens=spec.tokens_per_minute, concurrency=spec.max_concurrency
        )

    def stored(self) -> tuple[StoredKey, ...]:
        return tuple(sorted(self._keys.values(), key=lambda key: (key.created, key.id)))

    def missing(self, dumped: Iterable[StoredKey]) -> list[StoredKey]:
        """Those that are not there yet. Raises Conflict for one whose place another one has."""
        names = {key.spec.name: key.id for key in self._keys.values() if key.revoked is None}
        digests = {key.digest: key.id for key in self._keys.values()}
        missing = []
        for key in dumped:
            known = self._keys.get(key.id)
            if known is not None and (known.digest, known.spec) == (key.digest, key.spec):
                continue  # revoked in one of the two: it stays as it is here
            taken = key.id if known else digests.get(key.digest)
            if taken is None and key.revoked is None:
                taken = names.get(key.spec.name)
            if taken is not None:
                raise Conflict(
                    f"The key {key.id} ({key.spec.name}) cannot be loaded: {taken} is there, and is another one.",
                    param="keys",
                    code="key_taken",
                )
            digests[key.digest] = key.id
            if key.revoked is None:
                names[key.spec.name] = key.id
            missing.append(key)
        return missing

    def views(self) -> list[KeyView]:
        """Oldest first; those of one second by name."""
        keys = sorted(self._keys.values(), key=lambda key: (key.created, key.spec.name, key.id))
        return [_view(key) for key in keys]

    def update(self) -> Keys:
        """What a gateway that begins to follow is told."""
        live = tuple(_entry(key) for key in self._keys.values() if key.revoked is None)
        return Keys(epoch=self._store.epoch, sequence=self._sequence, required=self._required, keys=live)

    def _changed(self, *, made: tuple[KeyEntry, ...] = (), revoked: tuple[str, ...] = ()) -> None:
        self._sequence += 1
        self._tell(KeysDelta(epoch=self._store.epoch, sequence=self._sequence, made=made, revoked=revoked))


def _entry(key: StoredKey) -> KeyEntry:
    return KeyEntry(
        id=key.id,
        name=key.spec.name,
        digest=key.digest,
        models=key.spec.models,
        requests_per_minute=key.spec.requests_per_minute,
        tokens_per_minute=key.spec.tokens_per_minute,
        max_concurrency=key.spec.max_concurrency,
        priority=key.spec.priority,
    )


def _view(key: StoredKey) -> KeyView:
    return KeyView(
        id=key.id,
        name=key.spec.name,
        models=key.spec.models,
        requests_per_minute=key.spec.requests_per_minute,
        tokens_per_minute=key.spec.tokens_per_minute,
        max_concurrency=key.spec.max_concurrency,
        priority=key.spec.priority,
        created=key.created,
        revoked=key.revoked,
    )
