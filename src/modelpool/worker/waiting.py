"""Waiting for whichever of several things comes first."""

from __future__ import annotations

import asyncio
from typing import Any


async def first_of(*futures: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Return once one of them is done, or after the timeout. Cancels none of them and raises nothing of theirs."""
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


async def all_of(*futures: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Return once all of them are done, or after the timeout. Cancels none of them and raises nothing of theirs."""
    await asyncio.wait(futures, timeout=timeout_s)


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel them, and return once they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
