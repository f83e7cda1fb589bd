"""What an instance takes at once, shared by the gateway processes of a node."""

from __future__ import annotations

import pytest
from hypothesis import given
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
        (8, 4, Others(inflight=2, busy=1, wanting=True), 0),
        (8, 3, Others(inflight=2, busy=1, wanting=True), 1),
        (8, 2, Others(inflight=5, busy=2, wanting=True), 1),
        (1, 0, Others(inflight=0, busy=3, wanting=True), 1),
    ],
)
def test_while_another_waits_nobody_takes_more_than_an_equal_part(
    limit: int, own: int, others: Others, most: int
) -> None:
    assert places(limit, own, others) == most


def test_who_would_have_more_than_an_equal_part_leaves_a_place_that_it_freed_to_the_others() -> None:
    assert may_follow(8, 3, Others(inflight=4, busy=1, wanting=True))
    assert not may_follow(8, 4, Others(inflight=3, busy=1, wanting=True))
    assert not may_follow(1, 0, Others(inflight=0, busy=1, wanting=True))


class Process:
    def __init__(self) -> None:
        self.own = 0
        self.waiting = 0


@given(
    limit=st.integers(1, 9),
    count=st.integers(1, 4),
    steps=st.lists(st.tuples(st.sampled_from(["asks", "ends", "looks"]), st.integers(0, 3)), max_size=200),
)
def test_in_any_order_the_limit_holds_and_who_waits_is_served(
    limit: int, count: int, steps: list[tuple[str, int]]
) -> None:
    processes = [Process() for _ in range(count)]

    def others(one: Process) -> Others:
        rest = [each for each in processes if each is not one]
        busy = sum(bool(each.own or each.waiting) for each in rest)
        return Others(inflight=sum(each.own for each in rest), busy=busy, wanting=any(each.waiting for each in rest))

    def take(one: Process) -> None:
        while one.waiting and places(limit, one.own, others(one)):
            one.waiting -= 1
            one.own += 1
        assert sum(each.own for each in processes) <= limit

    def end(one: Process) -> None:
        if one.own:
            one.own -= 1
            if may_follow(limit, one.own, others(one)):
                take(one)

    for what, number in steps:
        one = processes[number % count]
        if what == "asks":
            one.waiting += 1
            if one.waiting == 1:
                take(one)
        elif what == "ends":
            end(one)
        else:
            take(one)
    for _ in range(len(steps)):
        for each in processes:
            end(each)
        for each in reversed(processes):
            take(each)
    assert not any(each.waiting for each in processes)
