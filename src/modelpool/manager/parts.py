"""What takes long is done in parts, with room for others in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
V = TypeVar("V")

_AT_ONCE = 100


async def in_parts(view: Callable[[T], V], of: Sequence[T]) -> list[V]:
    """A view of each."""
    views: list[V] = []
    for number, each in enumerate(of, start=1):
        views.append(view(each))
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)
    return views
