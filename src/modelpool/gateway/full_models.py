"""Models whose instances have all that they take at once, as one that was let in found out: what waits for them goes on
as requests to them end, and by a look at what other processes left, every few milliseconds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from modelpool.core.admission import Admission, Ticket
from modelpool.gateway.instances import Instance
from modelpool.gateway.table import Model, Table
from modelpool.messages.models import alias_of

_LOOK_S = 0.1
_LOOK_SHARED_S = 0.01
"""Every so often they are looked at: an instance may be tried again, another process may have left a place."""


class FullModels:
    """`wake`: called with the tickets that are granted."""

    def __init__(self, table: Table, admission: Admission, wake: Callable[[Sequence[Ticket]], None]) -> None:
        self._table = table
        self._admission = admission
        self._wake = wake
        self._watched: dict[str, Model] = {}
        self._looking: asyncio.Handle | None = None

    def found(self, alias: str) -> None:
        """All its instances are full. Nothing of it is granted from now on until a place is free."""
        self._admission.full(alias)
        self._watch(alias)

    def come(self, alias: str) -> None:
        """It has instances. Of those who wait for them no more go on than they take."""
        if not self._admission.waiting_for(alias):
            self._admission.available(alias)
            return
        self._watch(alias)
        self._wake(self._admission.available(alias, self._places(alias)))

    def look_again(self) -> None:
        """What instances may be sent may have changed."""
        for alias, model in list(self._watched.items()):
            waited_for = self._admission.waiting_for(alias)
            if model is not self._table.find(alias) or not waited_for:
                for instance in self._watched.pop(alias).instances:
                    instance.want(None)
                if waited_for:
                    self._watch(alias)
                else:
                    self._admission.freed(alias)
            if self._admission.is_full(alias):
                self._wake(self._admission.freed(alias, self._places(alias)))

    def _watch(self, alias: str) -> None:
        if (model := self._table.find(alias)) is None:
            return
        self._watched[alias] = model
        for instance in model.instances:
            instance.want(self._freed)
        if self._looking is None:
            self._look_later()

    def _freed(self, instance: Instance) -> None:
        if instance.places and instance.may_be_followed:
            self._wake(self._admission.freed(alias_of(instance.name)))

    def _places(self, alias: str) -> int:
        model = self._table.find(alias)
        return 0 if model is None else model.places

    def _look_later(self) -> None:
        pause = _LOOK_SHARED_S if self._table.shared else _LOOK_S
        self._looking = asyncio.get_running_loop().call_later(pause * random.uniform(0.5, 1.5), self._look)

    def _look(self) -> None:
        self._looking = None
        self.look_again()
        if self._watched:
            self._look_later()
