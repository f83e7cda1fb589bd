"""The keys of the benchmarks. Every router is sent one; ours has them as managed keys, which a manager says."""

from __future__ import annotations

from hashlib import sha256

from modelpool.messages.keys import SECRET_PREFIX
from modelpool.messages.routing import KeyEntry, Keys

KEY = f"{SECRET_PREFIX}benchmark"
LIMITED = f"{SECRET_PREFIX}benchmark-limited"
"""Requests, tokens and concurrency of this one are limited, beyond what can be reached: so they are counted."""
_MANY = 10**6


def keys() -> Keys:
    digests = [sha256(secret.encode()).hexdigest() for secret in (KEY, LIMITED)]
    limited = KeyEntry(
        id="key-2",
        name="limited",
        digest=digests[1],
        requests_per_minute=_MANY,
        tokens_per_minute=_MANY * _MANY,
        max_concurrency=_MANY,
    )
    unlimited = KeyEntry(id="key-1", name="unlimited", digest=digests[0])
    return Keys(epoch="bench", sequence=1, required=True, keys=(unlimited, limited))
