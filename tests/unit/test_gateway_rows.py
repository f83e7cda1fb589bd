"""Numbers by label in shared memory: kept for a successor, wiped for a gauge, and bounded."""

from __future__ import annotations

from pathlib import Path

from modelpool.gateway.observe.rows import OTHERS, Rows
from modelpool.gateway.shared import Node, joined


def rows(node: Node, count: int = 4) -> Rows:
    return Rows(node, "test", rows=count, labels_bytes=32, cells=2, arity=2)


def read(table: Rows) -> dict[tuple[str, ...], list[float]]:
    return {labels: numbers for _, labels, numbers in table.all() if any(numbers)}


def test_a_successor_goes_on_with_the_numbers_it_finds(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        table = rows(node)
        table.numbers[table.at(("a", "b")) + 1] = 3
    with joined(tmp_path) as node:
        table = rows(node)
        table.numbers[table.at(("a", "b")) + 1] += 1
        table.numbers[table.at(("c", "d"))] = 7
        assert read(table) == {("a", "b"): [0, 4], ("c", "d"): [7, 0]}


def test_what_finds_no_room_is_counted_with_the_others(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        table = rows(node)
        for number in range(10):
            table.numbers[table.at((f"label {number}", ""))] += 1
        table.numbers[table.at(("too long " * 10, ""))] += 1
        assert read(table) == {
            (OTHERS, OTHERS): [8, 0],
            ("label 0", ""): [1, 0],
            ("label 1", ""): [1, 0],
            ("label 2", ""): [1, 0],
        }


def test_wiped_rows_are_gone_and_their_room_is_free(tmp_path: Path) -> None:
    with joined(tmp_path) as node:
        table = rows(node)
        for number in range(3):
            table.numbers[table.at((f"label {number}", ""))] = 1
        table.wipe(node.slot)
        assert read(table) == {}
        table.numbers[table.at(("new", ""))] = 1
        assert read(table) == {("new", ""): [1, 0]}
