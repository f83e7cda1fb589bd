"""A manager made from settings: its policy, its store, and what it begins with."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from modelpool.home import Home, open_private
from modelpool.manager.manager import Manager, running_manager
from modelpool.manager.policy import policy_of
from modelpool.manager.store import Holder, open_store
from modelpool.settings import Settings


@asynccontextmanager
async def manager_of(
    settings: Settings, home: Home, holder: Holder, gateways: tuple[str, ...] = ()
) -> AsyncIterator[Manager]:
    """The manager of the pool whose store is where the settings say, or in `home`. Raises StoreError, also NotHeld."""
    url = settings.manager.store_url
    if not url:
        open_private(home.store, "ab").close()  # before SQLite makes it; what it makes beside it is alike
        url = f"sqlite:///{home.store}"
        holder = replace(holder, alone=True)  # the lock is in that home too
    async with open_store(url) as store:
        async with running_manager(
            store,
            policy=policy_of(settings),
            token=settings.token or home.cluster_token(),
            run_id=settings.run_id,
            recovery_s=settings.manager.recovery_s,
            gateways=gateways,
            holder=holder,
            lease_s=settings.manager.lease_s,
        ) as manager:
            yield manager


def holder_here(lock_id: str) -> Holder:
    """This process as holder of a store. Whoever had the lock of this id before has ended."""
    return Holder(id=lock_id, name=f"on {socket.gethostname()} (process {os.getpid()})")
