"""The last requests of each gateway process, in memory that those of a node share, so that any of them can tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from modelpool.gateway.observe.journey import Journey, Record
from modelpool.gateway.shared import SLOTS, Node

RECORDS = 4096
"""Kept per process."""
RECORD_BYTES = 512
_LENGTH = 2
_PART = RECORDS * RECORD_BYTES
_SHOWN_MAX = 6
_TEXT_MAX = 40


class Found(NamedTuple):
    record: Record
    slot: int


class Recent:
    """An Observer that keeps the record of each journey: when it waits, when its instance is chosen, and at its end."""

    def __init__(self, node: Node) -> None:
        self._map = node.map(f"recent-{RECORDS}-{RECORD_BYTES}", SLOTS * _PART, own=_PART)
        self._memory = memoryview(self._map)
        self._counts = memoryview(node.map("recent-counts", SLOTS * 8)).cast("Q")
        self._slot = node.slot
        self._begin = node.slot * _PART
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder = msgspec.msgpack.Decoder(Record)

    def waits(self, journey: Journey) -> None:
        self._write(journey)

    def waited(self, journey: Journey) -> None:
        """What comes after is written over it."""

    def chosen(self, journey: Journey) -> None:
        self._write(journey)

    def not_taken(self, journey: Journey) -> None:
        """What comes after is written over it."""

    def ended(self, journey: Journey) -> None:
        self._write(journey)

    def find(self, id_: bytes) -> Found | None:
        """The latest request of this id."""
        found = [each for slot in self._slots() for each in self._find_in(slot, id_)]
        return max(found, key=lambda each: each.record.accepted, default=None)

    def ended_within(self, after: float, until: float) -> list[Record]:
        """All that ended after one moment and until another (monotonic), oldest first. Takes milliseconds."""
        kept = (
            self._read(slot, number) for slot in self._slots() for number in range(min(RECORDS, self._counts[slot]))
        )
        return sorted((each for each in kept if each and after < each.ended <= until), key=lambda each: each.ended)

    def complete_since(self) -> float:
        """Of requests accepted before this moment some may have been written over."""
        oldest = (self._oldest(slot) for slot in self._slots() if self._counts[slot] > RECORDS)
        return max((each.accepted for each in oldest if each), default=0.0)

    def since(self) -> float | None:
        """All requests accepted after this moment, on the monotonic clock, are there. None if none ever was."""
        oldest = {slot: record for slot in self._slots() if (record := self._oldest(slot))}
        full = [record.accepted for slot, record in oldest.items() if self._counts[slot] > RECORDS]
        return max(full) if full else min((record.accepted for record in oldest.values()), default=None)

    def _write(self, journey: Journey) -> None:
        count, place = self._counts[self._slot], journey.place
        if place < 0 or count - place >= RECORDS:
            journey.place = place = count
            self._counts[self._slot] = count + 1
        data = self._encode(journey.record)
        if len(data) > RECORD_BYTES - _LENGTH:
            data = self._shortened(journey.record)
        at = self._begin + place % RECORDS * RECORD_BYTES
        self._memory[at : at + _LENGTH + len(data)] = len(data).to_bytes(_LENGTH, "little") + data

    def _shortened(self, record: Record) -> bytes:
        """With the chosen and the least loaded instances only; without any, if that is not enough."""
        described = list(zip(record.names, record.capacities, record.loads, strict=True))
        described.sort(key=lambda each: (each[0] != record.instance, each[2] / each[1]))
        described = described[:_SHOWN_MAX]
        shorter = msgspec.structs.replace(
            record,
            names=tuple(name for name, _, _ in described),
            capacities=tuple(capacity for _, capacity, _ in described),
            loads=[load for _, _, load in described],
            avoided=record.avoided[:2],
            tries=record.tries[-2:],
        )
        data = self._encode(shorter)
        if len(data) <= RECORD_BYTES - _LENGTH:
            return data
        return self._encode(
            msgspec.structs.replace(
                shorter,
                names=(),
                capacities=(),
                loads=[],
                avoided=(),
                tries=(),
                path=record.path[:_TEXT_MAX],
                alias=record.alias[:_TEXT_MAX],
                instance=record.instance[:_TEXT_MAX],
                caller=record.caller[:_TEXT_MAX],
            )
        )

    def _slots(self) -> list[int]:
        return [slot for slot in range(SLOTS) if self._counts[slot]]

    def _find_in(self, slot: int, id_: bytes) -> Iterator[Found]:
        begin = slot * _PART
        at = self._map.find(id_, begin, begin + _PART)
        while at >= 0:
            number = (at - begin) // RECORD_BYTES
            if (record := self._read(slot, number)) and record.id == id_:
                yield Found(record, slot)
            at = self._map.find(id_, begin + (number + 1) * RECORD_BYTES, begin + _PART)

    def _oldest(self, slot: int) -> Record | None:
        count = self._counts[slot]
        return self._read(slot, count % RECORDS if count > RECORDS else 0)

    def _read(self, slot: int, number: int) -> Record | None:
        """None while it is being written, or where its writer died in the middle of it."""
        at = slot * _PART + number * RECORD_BYTES
        raw = bytes(self._memory[at : at + RECORD_BYTES])
        length = int.from_bytes(raw[:_LENGTH], "little")
        try:
            return self._decoder.decode(raw[_LENGTH : _LENGTH + length])
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
