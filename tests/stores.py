"""Stores as managers hold them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from modelpool.manager.store import Holder, Store, StoreError, open_store

ME = Holder(id="me", name="on here (process 1)")
OTHER = Holder(id="other", name="on there (process 2)")


@asynccontextmanager
async def held(url: str, holder: Holder = ME, lease_s: float = 10.0) -> AsyncIterator[Store]:
    """The store, held by a manager that lets it go at its end."""
    async with open_store(url) as store:
        await store.take_over(holder, lease_s)
        yield store
        await store.let_go()


@contextmanager
def answers_lost(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the calling task asks of the store is done, and the answer is lost."""
    within, here = store._within, asyncio.current_task()

    async def lose(work: Awaitable[Any]) -> Any:
        done = await within(work)
        if asyncio.current_task() is here:
            raise StoreError("The connection broke after the commit.")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(store, "_within", lose)
        yield
