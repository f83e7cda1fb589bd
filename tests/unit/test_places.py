"""What an instance takes at once, shared by the gateway processes of a node."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpool.core.places import Others, may_follow, places


def test_while_nobody_waits_whoever_comes_has_what_is_free() -> None:
    assert places(8, 0, Others(inflight=0)) == 8
    assert places(8, 5, Others(inflight=2)) == 1
    assert places(8, 6, Others(inflight=3)) == 0
    assert may_follow(8, 7, Others(inflight=0))


@pytest.mark.parametrize(
    ("limit", "own", "others", "most"),
    [
        (8, 4, Others(inflight=2, waiting=1), 0),
        (8, 3, Others(inflight=2, waiting=1), 1),
        (8, 2, Others(inflight=5, waiting=2), 1),
        (8, 2, Others(inflight=5, settled=3, waiting=1), 1),
        (8, 2, Others(inflight=5, settled=4, waiting=1), 0),
        (1, 0, Others(inflight=0, waiting=3), 1),
        (8, 0, Others(inflight=9, settled=9, waiting=1), 0),
    ],
)
def test_while_another_waits_nobody_takes_more_than_an_equal_part_of_what_the_settled_leave(
    limit: int, own: int, others: Others, most: int
) -> None:
    assert places(limit, own, others) == most


def test_what_the_settled_leave_is_used_by_those_who_wait() -> None:
    assert places(64, 16, Others(inflight=39, settled=23, waiting=1)) == 5
    assert places(64, 16, Others(inflight=44, settled=23, waiting=1)) == 4


def test_who_would_have_more_than_an_equal_part_leaves_a_place_that_it_freed_to_the_others() -> None:
    assert may_follow(8, 3, Others(inflight=4, waiting=1))
    assert not may_follow(8, 4, Others(inflight=3, waiting=1))
    assert may_follow(8, 2, Others(inflight=5, settled=2, waiting=1))
    assert not may_follow(8, 3, Others(inflight=4, settled=2, waiting=1))
    assert not may_follow(1, 0, Others(inflight=0, waiting=1))


class Process:
    def __init__(self) -> None:
        self.own = 0
        self.waiting = 0


class Node:
    """As gateway/full_models.py does it, one event after the other."""

    def __init__(self, limit: int, processes: int) -> None:
        self.limit = limit
        self.processes = [Process() for _ in range(processes)]

    @property
    def inflight(self) -> int:
        return sum(each.own for each in self.processes)

    @property
    def somebody_waits(self) -> bool:
        return any(each.waiting for each in self.processes)

    def asks(self, one: Process) -> None:
        one.waiting += 1
        if one.waiting == 1:
            self.looks(one)

    def ends(self, one: Process) -> None:
        if one.own:
            one.own -= 1
            if may_follow(self.limit, one.own, self._others(one)):
                self.looks(one)

    def looks(self, one: Process) -> None:
        while one.waiting and places(self.limit, one.own, self._others(one)):
            one.waiting -= 1
            one.own += 1
        assert self.inflight <= self.limit

    def settle(self) -> None:
        """All look until nothing changes: after a round either one more waits for nothing, or nobody takes more."""
        for _ in range(len(self.processes) + 1):
            for each in self.processes:
                self.looks(each)

    def _others(self, one: Process) -> Others:
        rest = [each for each in self.processes if each is not one]
        return Others(
            inflight=sum(each.own for each in rest),
            settled=sum(each.own for each in rest if not each.waiting),
            waiting=sum(bool(each.waiting) for each in rest),
        )


STEPS = st.lists(st.tuples(st.sampled_from(["asks", "ends", "looks"]), st.integers(0, 5)), max_size=200)


@settings(deadline=None)
@given(limit=st.integers(1, 9), count=st.integers(1, 6), steps=STEPS)
def test_in_any_order_the_limit_holds_and_who_waits_is_served(
    limit: int, count: int, steps: list[tuple[str, int]]
) -> None:
    node = Node(limit, count)
    for what, number in steps:
        getattr(node, what)(node.processes[number % count])
    for _ in range(len(steps)):
        for each in node.processes:
            node.ends(each)
        for each in reversed(node.processes):
            node.looks(each)
    assert not node.somebody_waits


@st.composite
def demands(draw: st.DrawFn) -> Sequence[int]:
    """Which process is asked, one request after the other: some much more than others, in any order."""
    counts = draw(st.lists(st.integers(0, 15), min_size=2, max_size=6))
    return draw(st.permutations([number for number, count in enumerate(counts) for _ in range(count)]))


@settings(deadline=None)
@given(limit=st.integers(1, 32), asked=demands(), ends=st.lists(st.integers(0, 5), max_size=30))
def test_no_place_is_left_free_while_somebody_waits(limit: int, asked: Sequence[int], ends: Sequence[int]) -> None:
    node = Node(limit, 6)
    for number in asked:
        node.asks(node.processes[number])
    for number in ends:
        node.ends(node.processes[number])
    node.settle()
    assert node.inflight == limit or not node.somebody_waits


@settings(deadline=None)
@given(limit=st.integers(1, 32), asked=demands(), seed=st.integers(0, 1000))
def test_nobody_who_waits_stays_behind_the_others(limit: int, asked: Sequence[int], seed: int) -> None:
    node, random = Node(limit, 6), Random(seed)
    for number in asked:
        node.asks(node.processes[number])
    for _ in range(50):
        for each in node.processes:
            if each.own:
                node.ends(each)
                node.asks(each)
            for other in random.sample(node.processes, 6):
                node.looks(other)
    most = max(each.own for each in node.processes)
    assert all(each.own >= most - 1 for each in node.processes if each.waiting)
