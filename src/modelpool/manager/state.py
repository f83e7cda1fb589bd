"""What the manager knows at the moment. It changes between two awaits of one event loop only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from msgspec.structs import replace

from modelpool.core import events
from modelpool.core.changes import apply, registered
from modelpool.core.pool import Pool
from modelpool.manager.views import Known, WorkerFacts
from modelpool.messages.models import ModelSpec


class State:
    def __init__(self) -> None:
        self.pool = Pool()
        self.specs: dict[str, ModelSpec] = {}
        """By alias: the models as they were registered."""
        self.facts: dict[str, WorkerFacts] = {}
        """What workers said of themselves."""
        self.news: set[str] = set()
        """Models of which a worker has said something that only the gateways heed."""
        self.changed = asyncio.Event()
        """There is something to act upon."""

    def apply(self, event: events.Event) -> None:
        self.pool = apply(self.pool, event, now())
        self.changed.set()

    def register(self, models: Iterable[events.ModelRegistered]) -> None:
        """Many at once."""
        self.pool = registered(self.pool, list(models), now())
        self.changed.set()

    def known(self) -> Known:
        return Known(pool=self.pool, specs=self.specs, facts=self.facts, now=now())

    def known_for_long(self) -> Known:
        """The same, as it is now."""
        return replace(self.known(), specs=dict(self.specs), facts=dict(self.facts))

    def take_news(self) -> list[str]:
        """The models of which something new is known since this was asked last."""
        news = [*self.news, *self.pool.news]
        self.news.clear()
        self.pool = replace(self.pool, news=frozenset())
        return news


def now() -> float:
    """In seconds, as everything in the pool has it."""
    return time.monotonic()
