"""What each instance has in flight from all gateway processes of a node, counted in memory that they share."""

from __future__ import annotations

import hashlib
import logging

from modelpool.core.places import Others
from modelpool.gateway.shared import SLOTS, Node

log = logging.getLogger(__name__)

ROWS = 4096
"""Instances that can be counted together at once; of any more each process sees its own requests only."""
_LOCK = 0


class SharedInflight:
    """A row of counters for each instance, one counter for each process.

    A row belongs to an instance for as long as any process uses it: `take` and `give_back` come in pairs.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        memory = memoryview(node.map("inflight", ROWS * (8 + 8 + 4 * SLOTS), whole=True))
        self._names = memory[: ROWS * 8].cast("Q")
        self._users = memory[ROWS * 8 : ROWS * 16].cast("Q")
        """One bit for each slot."""
        self._counts = memory[ROWS * 16 :].cast("i")
        self._wanting = memoryview(node.map("wanting", ROWS * 8, whole=True)).cast("Q")
        """One bit for each slot: requests of that process wait for the instance."""
        node.keep_clear(self._clear)

    def take(self, instance: str) -> Row | None:
        """The row of an instance; None while there is no room."""
        name = int.from_bytes(hashlib.blake2b(instance.encode(), digest_size=8).digest(), "little") or 1
        with self._node.lock(_LOCK):
            names = list(self._names)
            number = names.index(name) if name in names else (names.index(0) if 0 in names else -1)
            if number < 0:
                log.warning("more than %s instances: %s is not counted together with other processes", ROWS, instance)
                return None
            self._names[number] = name
            self._users[number] |= 1 << self._node.slot
        counts, wanting = self._counts[number * SLOTS : (number + 1) * SLOTS], self._wanting[number : number + 1]
        return Row(self, counts, wanting, number, self._node.slot)

    def want(self, number: int, wants: bool) -> None:
        """For a row: whether requests of this process wait for the instance."""
        with self._node.lock(_LOCK):
            self._want(number, self._node.slot, wants)

    def give_back(self, number: int) -> None:
        """For a row: this process uses it no more."""
        with self._node.lock(_LOCK):
            self._leave(number, self._node.slot)

    def _want(self, number: int, slot: int, wants: bool) -> None:
        others = self._wanting[number] & ~(1 << slot)
        self._wanting[number] = others | wants << slot

    def _leave(self, number: int, slot: int) -> None:
        self._want(number, slot, False)
        self._counts[number * SLOTS + slot] = 0
        self._users[number] &= ~(1 << slot)
        if not self._users[number]:
            self._names[number] = 0

    def _clear(self, slot: int) -> None:
        with self._node.lock(_LOCK):
            for number, users in enumerate(self._users):
                if users >> slot & 1:
                    self._leave(number, slot)


class Row:
    """The counters of one instance."""

    __slots__ = ("_counts", "_number", "_own", "_shared", "_wanting")

    def __init__(self, shared: SharedInflight, counts: memoryview, wanting: memoryview, number: int, own: int) -> None:
        self._shared = shared
        self._counts = counts
        self._wanting = wanting
        self._number = number
        self._own = own

    def put(self, inflight: int) -> None:
        """What this process has in flight."""
        self._counts[self._own] = inflight

    @property
    def total(self) -> int:
        return sum(self._counts)

    def others(self, own: int) -> Others:
        """What the other processes have and want, this one having `own`."""
        wanting = self._wanting[0] & ~(1 << self._own)
        inflight = self.total - own
        if not wanting:
            return Others(inflight=inflight)
        settled = inflight - sum(self._counts[slot] for slot in range(wanting.bit_length()) if wanting >> slot & 1)
        return Others(inflight=inflight, settled=settled, waiting=wanting.bit_count())

    def want(self, wants: bool) -> None:
        self._shared.want(self._number, wants)

    def give_back(self) -> None:
        self._shared.give_back(self._number)
