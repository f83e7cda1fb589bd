"""A key's limits against a plain model of them: lists of what was admitted and used, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from modelpool.core.limits import RUNNING_RETRY_S, STEP_S, WINDOW_S, Limit, Limits, Row, Use, Verdict, Window

SLOTS = 4
ERA = 7
A_BIT = 1e-6


class Key:
    """A row, and the processes that use it."""

    def __init__(self, limits: Limits) -> None:
        self.cells = memoryview(bytearray(Row.size(limits, SLOTS)))
        self.generations = memoryview(bytearray(8 * SLOTS)).cast("q")
        self.row = Row(self.cells, limits, slots=SLOTS, era=ERA)
        for slot in range(SLOTS):
            self.begin(slot)

    def begin(self, slot: int, now: float = 0.0) -> None:
        self.generations[slot] += 1
        self.row.enter(now, slot, self.generations[slot])

    def die(self, slot: int) -> None:
        self.generations[slot] += 1

    def admit(self, now: float, slot: int = 0, tokens: int = 0) -> Verdict:
        return self.row.admit(now, slot, self.generations, SLOTS, tokens)


@dataclass(eq=False)
class Running:
    slot: int
    reserved: int


@dataclass
class Model:
    admitted: list[float] = field(default_factory=list)
    used: list[tuple[float, int]] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    dead: list[Running] = field(default_factory=list)

    def requests(self, now: float, longer: float = 0.0) -> int:
        return sum(each > now - WINDOW_S - longer for each in self.admitted)

    def tokens(self, now: float, longer: float = 0.0) -> int:
        used = sum(tokens for at, tokens in self.used if at > now - WINDOW_S - longer)
        return used + sum(each.reserved for each in self.running)

    def settle(self, now: float) -> bool:
        """What the dead had reserved counts as used from now on. Whether there was something."""
        orphaned = [(now, each.reserved) for each in self.dead if each.reserved]
        self.used += orphaned
        self.dead.clear()
        return bool(orphaned)


class LimitsMachine(RuleBasedStateMachine):
    """Any order of requests, ends and deaths of processes."""

    running = Bundle("running")

    @initialize(
        requests=st.none() | st.integers(1, 6),
        tokens=st.none() | st.integers(1, 40),
        concurrency=st.none() | st.integers(1, 4),
    )
    def begin(self, requests: int | None, tokens: int | None, concurrency: int | None) -> None:
        self.limits = Limits(requests=requests, tokens=tokens, concurrency=concurrency)
        self.key = Key(self.limits)
        self.model = Model()
        self.now = 1000.0
        self.dead: set[int] = set()

    @rule(seconds=st.sampled_from([0.0, 0.03, 0.5, 7.0, 29.5, 59.9, 60.0, 61.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=running, slot=st.integers(0, SLOTS - 1), tokens=st.integers(0, 15))
    def request(self, slot: int, tokens: int) -> Running | None:
        if slot in self.dead:
            self.dead.discard(slot)
            self.key.begin(slot, self.now)
        settles = self.model.settle(self.now)
        before = bytes(self.key.cells)
        verdict = self.key.admit(self.now, slot, tokens)
        if verdict.refused is None:
            return self._admitted(slot, tokens, verdict)
        assert settles or bytes(self.key.cells) == before
        self._refused(tokens, verdict)
        if verdict.retry_after is not None and verdict.refused is not Limit.CONCURRENCY and not self.model.running:
            self.now += verdict.retry_after + A_BIT
            assert self.key.admit(self.now, slot, tokens).refused is None
            return self._counted(slot, tokens)
        return None

    def _admitted(self, slot: int, tokens: int, verdict: Verdict) -> Running:
        limits, model, now = self.limits, self.model, self.now
        assert limits.concurrency is None or len(model.running) < limits.concurrency
        assert limits.requests is None or model.requests(now) < limits.requests
        assert limits.tokens is None or model.tokens(now) + tokens <= limits.tokens
        running = self._counted(slot, tokens)
        if limits.requests is not None:
            assert verdict.requests is not None
            counted = limits.requests - verdict.requests.remaining
            assert model.requests(now) <= counted <= model.requests(now, STEP_S + A_BIT)
        if limits.tokens is not None:
            assert verdict.tokens is not None
            remaining = limits.tokens - verdict.tokens.remaining
            assert model.tokens(now) <= remaining <= model.tokens(now, STEP_S + A_BIT)
        return running

    def _counted(self, slot: int, tokens: int) -> Running:
        running = Running(slot, tokens if self.limits.tokens is not None else 0)
        self.model.admitted.append(self.now)
        self.model.running.append(running)
        return running

    def _refused(self, tokens: int, verdict: Verdict) -> None:
        limits, model, now = self.limits, self.model, self.now
        full = {
            Limit.CONCURRENCY: limits.concurrency is not None and len(model.running) >= limits.concurrency,
            Limit.REQUESTS: limits.requests is not None and model.requests(now, STEP_S + A_BIT) >= limits.requests,
            Limit.TOKENS: limits.tokens is not None and model.tokens(now, STEP_S + A_BIT) + tokens > limits.tokens,
        }
        assert verdict.refused is not None
        assert full[verdict.refused]
        if verdict.retry_after is None:
            assert limits.tokens is not None
            assert tokens > limits.tokens
        else:
            assert 0 <= verdict.retry_after <= WINDOW_S + A_BIT  # 0: by rounding it is neither in nor out of the window

    @rule(running=consumes(running), used=st.integers(0, 20))
    def end(self, running: Running | None, used: int) -> None:
        if running is None or running not in self.model.running:
            return  # refused, or its process died
        self.model.running.remove(running)
        self.key.row.leave(self.now, running.slot, running.reserved, used)
        self.model.used.append((self.now, used))

    @rule(slot=st.integers(0, SLOTS - 1))
    def die(self, slot: int) -> None:
        self.key.die(slot)
        self.dead.add(slot)
        self.model.dead += [each for each in self.model.running if each.slot == slot]
        self.model.running = [each for each in self.model.running if each.slot != slot]

    @invariant()
    def what_counts_is_what_the_model_has(self) -> None:
        if not hasattr(self, "key"):
            return
        copy = Key(self.limits)
        copy.cells[:] = self.key.cells
        copy.generations[:] = self.key.generations
        held = copy.row._held(self.now, copy.generations, SLOTS)
        assert held == (len(self.model.running), sum(each.reserved for each in self.model.running))


LimitsMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestLimits = LimitsMachine.TestCase


def test_a_thousand_requests_a_minute_are_never_more_in_any_minute() -> None:
    key = Key(Limits(requests=1000))
    admitted = []
    for step in range(40_000):
        now = step * 0.01
        if key.admit(now).refused is None:
            admitted.append(now)
    assert all(later - earlier >= WINDOW_S - A_BIT for earlier, later in zip(admitted, admitted[1000:], strict=False))
    assert len(admitted) == 7000


def test_tokens_are_counted_over_many_rounds_of_their_ring() -> None:
    key = Key(Limits(tokens=100))
    for step in range(5000):
        now = 1000 + step * 0.7
        verdict = key.admit(now, tokens=1)
        assert verdict.refused is None
        key.row.leave(now, 0, 1, 1)
        assert verdict.tokens is not None
        assert 100 - min(step + 1, 87) <= verdict.tokens.remaining <= 100 - min(step + 1, 86)


def test_of_two_limits_that_are_full_the_one_that_stays_so_for_longer_is_named() -> None:
    key = Key(Limits(requests=1, tokens=10, concurrency=1))
    assert key.admit(0.0, tokens=10).refused is None
    full = key.admit(1.0, tokens=10)
    assert (full.refused, full.retry_after) == (Limit.REQUESTS, 59.0)
    key.row.leave(30.0, 0, 10, 10)
    full = key.admit(40.0, tokens=10)
    assert full.refused is Limit.TOKENS
    assert full.retry_after == pytest.approx(50.0)
    full = key.admit(89.0, tokens=11)
    assert (full.refused, full.retry_after) == (Limit.TOKENS, None)


def test_what_runs_may_end_at_any_moment() -> None:
    key = Key(Limits(tokens=10))
    key.admit(0.0, tokens=8)
    assert (key.admit(1.0, tokens=3).retry_after, key.admit(1.0, tokens=2).refused) == (RUNNING_RETRY_S, None)


def test_used_tokens_leave_the_window_one_after_the_other() -> None:
    key = Key(Limits(tokens=10))
    for now in (0.0, 10.0, 20.0):
        key.admit(now, tokens=1)
        key.row.leave(now, 0, 1, 3)
    waits = [key.admit(30.0, tokens=tokens).retry_after for tokens in (2, 4, 5, 7, 8, 10)]
    assert waits == [pytest.approx(wait) for wait in (30, 30, 40, 40, 50, 50)]


def test_a_row_of_another_clock_is_wiped() -> None:
    limits = Limits(requests=1)
    key = Key(limits)
    assert key.admit(10_000.0).refused is None
    assert key.admit(10_000.0).refused is Limit.REQUESTS
    Row(key.cells, limits, slots=SLOTS, era=ERA)
    assert key.admit(10_000.0).refused is Limit.REQUESTS
    Row(key.cells, limits, slots=SLOTS, era=ERA + 1)
    assert key.admit(5.0).refused is None


def test_what_a_dead_process_had_reserved_counts_as_used_from_when_it_is_noticed() -> None:
    key = Key(Limits(tokens=10, concurrency=2))
    assert key.admit(0.0, slot=1, tokens=6).refused is None
    key.die(1)
    refused = key.admit(20.0, tokens=5)
    assert (refused.refused, refused.retry_after) == (Limit.TOKENS, WINDOW_S)
    assert key.admit(20.0, tokens=4).refused is None
    key.row.leave(20.0, 0, 4, 0)
    assert key.admit(20.0 + WINDOW_S, tokens=10).refused is None


def test_a_process_that_takes_the_place_of_a_dead_one_begins_with_nothing_running() -> None:
    key = Key(Limits(tokens=10, concurrency=1))
    assert key.admit(0.0, slot=1, tokens=6).refused is None
    key.begin(1, now=5.0)
    verdict = key.admit(5.0, slot=1, tokens=4)
    assert verdict.refused is None
    assert verdict.tokens == Window(0, WINDOW_S)


def test_a_high_limit_takes_no_more_memory_than_a_low_one_and_holds() -> None:
    high = Limits(requests=10**12, tokens=10**12)
    assert Row.size(high, SLOTS) == Row.size(Limits(requests=1, tokens=1), SLOTS) < 25_000
    key = Key(high)
    assert key.admit(0.0).refused is None
    key.row.leave(0.0, 0, 0, 10**12 - 3)
    verdict = key.admit(1.0, tokens=3)
    assert verdict.refused is None
    assert verdict.requests == Window(10**12 - 2, WINDOW_S)
    assert key.admit(1.0, tokens=1).refused is Limit.TOKENS


def test_a_nodes_part_is_kept_to_and_the_latest_counts() -> None:
    key = Key(Limits(requests=10, tokens=100, concurrency=5))
    assert key.row.part() is None
    key.row.allow(7, Limits(requests=2, tokens=50, concurrency=5))
    key.row.allow(6, Limits(requests=9, tokens=99, concurrency=9))
    assert key.row.part() == Limits(requests=2, tokens=50, concurrency=5)
    short = key.admit(0.0, tokens=60)
    assert (short.refused, short.short, short.retry_after) == (Limit.TOKENS, True, RUNNING_RETRY_S)
    assert key.admit(0.0, tokens=20).refused is None
    assert key.admit(0.0, slot=1, tokens=20).refused is None
    assert key.admit(0.0).refused is Limit.REQUESTS
    assert key.row.use(0.0, key.generations, SLOTS) == Use(requests=2, tokens=40, running=2)
    key.row.allow(8, Limits(requests=10, tokens=100, concurrency=2))
    assert key.admit(0.0).refused is Limit.CONCURRENCY
    key.row.allow(9, Limits(requests=10, tokens=100, concurrency=None))
    assert key.admit(0.0).refused is None


def test_the_limit_itself_is_named_before_the_part_of_it() -> None:
    key = Key(Limits(requests=1))
    key.row.allow(1, Limits(requests=1))
    assert key.admit(0.0).refused is None
    refused = key.admit(1.0)
    assert (refused.refused, refused.short, refused.retry_after) == (Limit.REQUESTS, False, WINDOW_S - 1.0)
