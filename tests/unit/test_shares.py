"""A key's limit over several nodes: kept whatever arrives late, and used up wherever it is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelpool.core.shares import Claim, first_part, parts


def test_while_there_is_enough_who_is_not_asked_has_room_too() -> None:
    claims = {"a": Claim(used=0, asked=30, granted=0), "b": Claim(used=0, asked=10, granted=0)}
    assert parts(1000, claims) == {"a": 510, "b": 490}
    few = {"a": Claim(used=2, asked=8, granted=16), "b": Claim(used=0, asked=0, granted=16)}
    assert parts(50, few) == {"a": 30, "b": 20}


def test_where_it_is_not_enough_it_goes_to_those_who_are_asked_and_a_tenth_to_all_alike() -> None:
    claims = {"a": Claim(used=0, asked=3000, granted=0), "b": Claim(used=0, asked=1000, granted=0)}
    assert parts(1000, claims) == {"a": 725, "b": 275}
    assert parts(1000, {node: Claim(used=0, asked=0, granted=0) for node in "abcd"}) == dict.fromkeys("abcd", 250)


def test_a_single_one_goes_to_who_is_asked_for_it() -> None:
    claims = {"a": Claim(used=0, asked=0, granted=0), "b": Claim(used=0, asked=0.1, granted=0)}
    assert parts(1, claims) == {"a": 0, "b": 1}


def test_a_part_grows_only_by_what_others_are_known_to_have_given_up() -> None:
    before = {"a": Claim(used=10, asked=0, granted=90), "b": Claim(used=10, asked=500, granted=10)}
    assert parts(100, before) == {"a": 14, "b": 10}
    heard = {"a": Claim(used=10, asked=0, granted=14), "b": Claim(used=10, asked=500, granted=10)}
    assert parts(100, heard) == {"a": 14, "b": 86}


@pytest.mark.parametrize(("limit", "nodes", "part"), [(100, 1, 100), (100, 3, 33), (2, 3, 1), (1, 2, 1)])
def test_a_key_that_is_new_may_be_used_everywhere(limit: int, nodes: int, part: int) -> None:
    assert first_part(limit, nodes) == part


class Nodes:
    """Nodes that use what they may, in the hands of hypothesis: parts and reports arrive late."""

    def __init__(self, limit: int, count: int) -> None:
        self.limit = limit
        self.names = [f"n{number}" for number in range(count)]
        self.used = dict.fromkeys(self.names, 0)
        self.allowed = dict.fromkeys(self.names, limit // count)
        self.asked = dict.fromkeys(self.names, 0)
        self.sent: dict[str, list[int]] = {name: [] for name in self.names}
        """Parts that are on their way."""
        self.claims = {name: Claim(used=0, asked=0, granted=limit // count) for name in self.names}

    def ask(self, name: str, times: int) -> None:
        self.asked[name] += times
        self.used[name] += min(times, max(0, self.allowed[name] - self.used[name]))
        assert sum(self.used.values()) <= self.limit

    def hear(self, name: str) -> None:
        if self.sent[name]:
            self.allowed[name] = self.sent[name].pop(0)

    def report(self, name: str) -> None:
        granted = max([self.allowed[name], *self.sent[name]])
        self.claims[name] = Claim(used=self.used[name], asked=self.asked[name], granted=granted)
        self.asked[name] = 0

    def share(self) -> None:
        for name, part in parts(self.limit, self.claims).items():
            self.sent[name].append(part)
            claim = self.claims[name]
            granted = max(claim.granted, part)
            self.claims[name] = Claim(used=claim.used, asked=claim.asked, granted=granted)

    def settle(self, asking: str) -> None:
        for _ in range(12):
            self.ask(asking, self.limit)
            for name in self.names:
                while self.sent[name]:
                    self.hear(name)
                self.report(name)
            self.share()


steps = st.lists(st.tuples(st.sampled_from(["ask", "hear", "report", "share"]), st.integers(0, 4), st.integers(1, 50)))


@settings(deadline=None)
@given(st.integers(5, 500), st.integers(1, 5), steps, st.integers(0, 4))
def test_whatever_arrives_late_all_together_keep_to_the_limit_and_use_it_up(
    limit: int, count: int, script: list[tuple[str, int, int]], asking: int
) -> None:
    nodes = Nodes(limit, count)
    for action, number, times in script:
        name = nodes.names[number % count]
        if action == "ask":
            nodes.ask(name, times)
        elif action == "hear":
            nodes.hear(name)
        elif action == "report":
            nodes.report(name)
        else:
            nodes.share()
    nodes.settle(nodes.names[asking % count])
    assert sum(nodes.used.values()) >= 0.9 * limit
