"""Numbers by label in memory that the gateway processes of a node share: each writes its own, all read all."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from modelpool.gateway.shared import SLOTS, Node

Labels = tuple[str, ...]

OTHERS = "(others)"
"""The label of what found no room."""
_LENGTH = 2
_decoder = msgspec.msgpack.Decoder(Labels)


class Rows:
    """A table with a part per slot. A row has labels and `cells` numbers, which start at zero.

    The labels of a row are written once, off the hot path; its numbers by index into `numbers`. A part belongs to
    whoever has the slot: a successor goes on with the rows it finds there.
    """

    def __init__(self, node: Node, name: str, *, rows: int, labels_bytes: int, cells: int = 1, arity: int) -> None:
        assert labels_bytes % 8 == 0
        self._rows = rows
        self._cells = cells
        self._labels_bytes = labels_bytes
        self._stride = labels_bytes + 8 * cells
        self._part = rows * self._stride
        # The layout is in the name: a gateway of another version must not write into these.
        memory = node.map(f"{name}-{rows}-{labels_bytes}-{cells}", SLOTS * self._part, own=self._part)
        self._bytes = memoryview(memory)
        self.numbers: memoryview[float] = self._bytes.cast("d")
        self._slot = node.slot
        self._others = (OTHERS,) * arity
        self._load()

    def at(self, labels: Labels) -> int:
        """Where in `numbers` this row begins. It is made at the first call; when there is no room, others share one."""
        index = self._index.get(labels)
        if index is None:
            index = self._add(labels)
        return index

    def wipe(self, slot: int) -> None:
        """Forget the rows of a slot."""
        begin = slot * self._part
        for row in range(self._rows):
            at = begin + row * self._stride
            if not self._bytes[at] and not self._bytes[at + 1]:
                break
            self._bytes[at : at + self._stride] = bytes(self._stride)
        if slot == self._slot:
            self._load()

    def all(self) -> Iterator[tuple[int, Labels, list[float]]]:
        """Slot, labels and numbers of each row there is."""
        for slot in range(SLOTS):
            for labels, index in self._read(slot):
                yield slot, labels, [self.numbers[at] for at in range(index, index + self._cells)]

    def _load(self) -> None:
        self._index = dict(self._read(self._slot))
        self._free = len(self._index)
        if not self._free:
            self._add(self._others)

    def _add(self, labels: Labels) -> int:
        encoded = msgspec.msgpack.encode(labels)
        if self._free >= self._rows or len(encoded) > self._labels_bytes - _LENGTH:
            return self._index[self._others]
        at = self._slot * self._part + self._free * self._stride
        self._bytes[at + _LENGTH : at + _LENGTH + len(encoded)] = encoded
        self._bytes[at : at + _LENGTH] = len(encoded).to_bytes(_LENGTH, "little")  # last: now it is there
        self._free += 1
        self._index[labels] = index = (at + self._labels_bytes) // 8
        return index

    def _read(self, slot: int) -> Iterator[tuple[Labels, int]]:
        for row in range(self._rows):
            at = slot * self._part + row * self._stride
            length = int.from_bytes(self._bytes[at : at + _LENGTH], "little")
            if not length:
                return
            yield (
                _decoder.decode(self._bytes[at + _LENGTH : at + _LENGTH + length]),
                (at + self._labels_bytes) // 8,
            )
