"""The routing table that the gateways have: an entry of each model, made anew where that may say something else."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from itertools import islice

from modelpool.manager import views
from modelpool.messages.models import alias_of
from modelpool.messages.routing import ModelEntry

_AT_ONCE = 500
"""So many entries are made before others have their turn in the process: some 10 ms."""
_PASSES_S = 1.0
"""What is waited for is told anew this often."""


class RoutingTable:
    def __init__(self) -> None:
        self.entries: dict[str, ModelEntry] = {}
        self.complete = False
        """Whether it had all models once."""
        self._stale: dict[str, None] = {}
        self._passing: set[str] = set()
        self._passed_at = -math.inf
        self._workers: tuple[str, bool] | None = None

    @property
    def behind(self) -> bool:
        """There are more entries to be made."""
        return bool(self._stale)

    def capacity_of(self, instance: str) -> int | None:
        """None for one that requests are not sent to."""
        entry = self.entries.get(alias_of(instance))
        routes = entry.routes if entry else ()
        return next((route.capacity for route in routes if route.instance == instance), None)

    def refresh(self, known: views.Known, news: Collection[str]) -> tuple[dict[str, ModelEntry], tuple[str, ...]]:
        """The entries that changed, and the models that are gone. Those with `news` come first, in their order."""
        self._stale = {**dict.fromkeys(news), **self._stale, **dict.fromkeys(self._others(known))}
        changed: dict[str, ModelEntry] = {}
        removed: list[str] = []
        for alias in list(islice(self._stale, _AT_ONCE)):
            del self._stale[alias]
            self._passing.discard(alias)
            if alias not in known.pool.models:
                if self.entries.pop(alias, None):
                    removed.append(alias)
                continue
            entry = views.entry(known, alias)
            if entry.unavailable and views.passes(known, alias):
                self._passing.add(alias)
            if self.entries.get(alias) != entry:
                self.entries[alias] = changed[alias] = entry
        self.complete = self.complete or not self._stale
        return changed, tuple(removed)

    def _others(self, known: views.Known) -> Iterator[str]:
        """Those of which something else is to be said though nothing happened to them."""
        there = any(worker.alive for worker in known.pool.workers.values())
        before, self._workers = (
            self._workers,
            ("" if there else views.workers_missing(known.pool), bool(known.pool.missed)),
        )
        if before is None:
            yield from known.pool.models
        elif before != self._workers:
            yield from (alias for alias, entry in self.entries.items() if entry.unavailable)
        if known.now >= self._passed_at + _PASSES_S:
            self._passed_at = known.now
            yield from self._passing
