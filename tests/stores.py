"""Stores as managers hold them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from modelpool.manager.store import Holder, Store, open_store

ME = Holder(id="me", name="on here (process 1)")
OTHER = Holder(id="other", name="on there (process 2)")


@asynccontextmanager
async def held(url: str, holder: Holder = ME, lease_s: float = 10.0) -> AsyncIterator[Store]:
    """The store, held by a manager that lets it go at its end."""
    async with open_store(url) as store:
        await store.take_over(holder, lease_s)
        yield store
        await store.let_go()
