"""Who may go on, who waits, who is next."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelpool.core.admission import Admission, Bounds, Refusal, State, Ticket

ROOMY = Bounds(tickets=10_000, bytes=1 << 20)


def admission(*available: str, max_ongoing: int = 1, bounds: Bounds = ROOMY) -> Admission:
    made = Admission(max_ongoing=max_ongoing, bounds=bounds)
    for alias in available:
        made.available(alias)
    return made


def ticket(caller: str = "", *, alias: str = "m", priority: int = 0, size: int = 1, deadline: float = 100.0) -> Ticket:
    return Ticket(alias, caller=caller, priority=priority, size=size, deadline=deadline)


def joined(room: Admission, *tickets: Ticket) -> None:
    for each in tickets:
        assert room.join(each) is None
        assert each.state is State.WAITING


def order(room: Admission) -> list[Ticket]:
    """All that wait, in the order of their grants, each `done` before the next."""
    granted: list[Ticket] = []
    while room.ongoing:
        granted += room.done()
    return granted


def test_who_comes_while_there_is_room_goes_on_at_once() -> None:
    room = admission("m", max_ongoing=2)
    assert [room.enter("m"), room.enter("m"), room.enter("m")] == [True, True, False]
    assert room.ongoing == 2
    assert room.done() == ()
    late = ticket()
    assert room.join(late) is None
    assert (late.state, room.ongoing, room.waiting) == (State.GRANTED, 2, 0)


def test_nobody_enters_a_model_that_is_not_there() -> None:
    room = admission("other")
    assert not room.enter("m")
    joined(room, first := ticket(), second := ticket())
    assert room.available("m") == [first]
    assert room.available("m") == ()
    room.unavailable("m")
    assert room.done() == ()
    assert room.available("m") == [second]
    assert second.state is State.GRANTED


def test_a_model_that_is_not_there_holds_up_no_other() -> None:
    room = admission("here")
    joined(room, ticket(alias="away"))
    assert room.enter("here")
    joined(room, mine := ticket(alias="here"))
    assert room.done() == [mine]


def test_first_come_first_served_whatever_the_model() -> None:
    room = admission("a", "b")
    room.enter("a")
    tickets = [ticket(alias=alias) for alias in "abbaab"]
    joined(room, *tickets)
    assert order(room) == tickets


def test_higher_priorities_go_first() -> None:
    room = admission("m")
    room.enter("m")
    tickets = {priority: ticket(priority=priority) for priority in (0, 2, -1, 1)}
    joined(room, *tickets.values())
    assert order(room) == [tickets[priority] for priority in (2, 1, 0, -1)]


def test_callers_take_turns_however_much_one_of_them_asks_for() -> None:
    room = admission("m")
    room.enter("m")
    greedy = [ticket("greedy") for _ in range(100)]
    joined(room, *greedy)
    modest = [ticket("modest") for _ in range(2)]
    joined(room, *modest)
    assert order(room)[:5] == [greedy[0], modest[0], greedy[1], modest[1], greedy[2]]


def test_when_a_model_comes_the_callers_turns_begin_with_who_waits_longest() -> None:
    room = admission()
    first, second, third = ticket("x"), ticket("y"), ticket("x")
    joined(room, first, second, third)
    room.leave(first)
    assert room.available("m") == [second]
    assert order(room) == [third]


def test_one_that_leaves_waits_no_more_and_a_grant_that_it_missed_goes_to_the_next() -> None:
    room = admission("m")
    room.enter("m")
    joined(room, gone := ticket(), missing := ticket(), following := ticket())
    assert room.leave(gone) == ()
    assert room.done() == [missing]
    assert room.leave(missing) == [following]
    assert room.leave(missing) == ()
    assert (room.ongoing, room.waiting) == (1, 0)


@pytest.mark.parametrize(
    ("bounds", "refusal"),
    [(Bounds(tickets=2, bytes=99), Refusal.TICKETS), (Bounds(tickets=99, bytes=9), Refusal.BYTES)],
)
def test_each_models_queue_is_bounded(bounds: Bounds, refusal: Refusal) -> None:
    room = admission(bounds=bounds)
    joined(room, first := ticket(size=4), ticket(size=4))
    refused = ticket(size=4)
    assert room.join(refused) is refusal
    assert (room.waiting_for("m"), room.bytes_for("m")) == (2, 8)
    joined(room, ticket(alias="other", size=4))
    room.leave(first)
    joined(room, refused)


def test_what_has_waited_until_its_deadline_is_taken_out() -> None:
    room = admission()
    assert room.next_deadline is None
    joined(room, late := ticket(deadline=9.0), gone := ticket(deadline=1.0), early := ticket(deadline=5.0))
    room.leave(gone)
    assert room.next_deadline == 5.0
    assert room.expire(4.9) == []
    assert room.expire(5.0) == [early]
    assert room.available("m") == [late]
    assert room.next_deadline is None
    assert room.expire(99.0) == []


def test_a_models_tickets_can_be_sent_away_together_in_their_order() -> None:
    room = admission("other")
    room.enter("other")
    tickets = [ticket("x"), ticket("y", priority=1), ticket("x")]
    joined(room, *tickets, kept := ticket(alias="other"))
    assert room.evict("m") == tickets
    assert room.evict("m") == ()
    assert room.wanted == ("other",)
    assert room.available("m") == ()
    assert order(room) == [kept]


def test_clients_that_come_and_go_leave_nothing_behind() -> None:
    room = admission()
    kept: list[Ticket] = []
    gone: list[Ticket] = []
    for number in range(10_000):
        each = ticket(deadline=float(10_000 - number * 7919 % 10_000))
        (gone if number % 100 else kept).append(each)
        joined(room, each)
    for each in gone:
        room.leave(each)
    assert len(room._deadlines) <= 2 * len(kept) + 64
    assert room.expire(10_000.0) == sorted(kept, key=lambda each: each.deadline)
    assert room.wanted == ()


def test_thousands_are_granted_in_their_order() -> None:
    room = admission(max_ongoing=10_000)
    tickets = [ticket(deadline=100.0 - number) for number in range(5000)]
    joined(room, *tickets)
    assert room.available("m") == tickets


def test_what_is_full_is_granted_as_places_are_freed_callers_in_turn() -> None:
    room = admission("m", max_ongoing=10)
    assert room.enter("m")
    room.full("m")
    assert not room.enter("m")
    greedy = [ticket("greedy") for _ in range(4)]
    joined(room, *greedy, modest := ticket("modest"), urgent := ticket("modest", priority=1))
    assert room.freed("m", 2) == [urgent, greedy[0]]
    assert room.freed("m") == [modest]
    room.leave(greedy[1])
    assert room.freed("m", 5) == greedy[2:]
    assert room.enter("m")


def test_one_that_was_granted_a_place_and_found_none_has_its_turn_back() -> None:
    room = admission("m", max_ongoing=10)
    room.full("m")
    joined(room, first := ticket(), second := ticket(), third := ticket())
    assert room.freed("m", 2) == [first, second]
    for back in (second, first):
        room.full("m")
        room.done()
        joined(room, back)
    assert room.freed("m", 3) == [first, second, third]


class TicketsAreServed(RuleBasedStateMachine):
    """Any order of events, against what the order of grants promises and a plain list of what waits."""

    ALIASES = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.here: dict[str, float] = {}
        """Of each alias that is available: so many more may be granted."""
        self.waiting: list[Ticket] = []
        self.ongoing: list[Ticket | None] = []
        self.returned: set[Ticket] = set()
        # (priority, caller) → who was granted since it last was, while it had something that could be granted.
        self.passed: dict[tuple[int, str], list[str]] = {}

    @initialize(most=st.integers(1, 4), tickets=st.integers(1, 6), size=st.integers(5, 20))
    def begin(self, most: int, tickets: int, size: int) -> None:
        self.room = Admission(max_ongoing=most, bounds=Bounds(tickets=tickets, bytes=size))

    # What may happen

    @rule(alias=st.sampled_from(ALIASES))
    def enter(self, alias: str) -> None:
        could = self.may_go_on(alias)
        assert self.room.enter(alias) is could
        if could:
            self.ongoing.append(None)

    @rule(
        alias=st.sampled_from(ALIASES),
        caller=st.sampled_from("xyz"),
        priority=st.integers(0, 2),
        size=st.integers(0, 6),
        patience=st.integers(0, 20),
    )
    def join(self, alias: str, caller: str, priority: int, size: int, patience: int) -> None:
        new = Ticket(alias, caller=caller, priority=priority, size=size, deadline=self.now + patience)
        mine = [each for each in self.waiting if each.alias == alias]
        could = self.may_go_on(alias)
        full = len(mine) >= self.room.bounds.tickets
        heavy = sum(each.size for each in mine) + size > self.room.bounds.bytes
        refusal = self.room.join(new)
        if could:
            assert (refusal, new.state) == (None, State.GRANTED)
            self.ongoing.append(new)
        elif full or heavy:
            assert refusal is (Refusal.TICKETS if full else Refusal.BYTES)
        else:
            assert (refusal, new.state) == (None, State.WAITING)
            self.waiting.append(new)
        self.forget_the_ineligible()

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 99))
    def leave(self, which: int) -> None:
        self.waits_no_more(gone := self.waiting[which % len(self.waiting)])
        self.forget_the_ineligible()
        assert self.room.leave(gone) == ()
        assert gone.state is State.ENDED

    @precondition(lambda self: any(self.ongoing))
    @rule(which=st.integers(0, 99))
    def leave_granted(self, which: int) -> None:
        held = [each for each in self.ongoing if each is not None]
        missed = held[which % len(held)]
        self.ongoing.remove(missed)
        self.free(missed.alias, 1)
        self.granted(self.room.leave(missed))

    @precondition(lambda self: self.ongoing)
    @rule(which=st.integers(0, 99))
    def done(self, which: int) -> None:
        self.ongoing.pop(which % len(self.ongoing))
        self.granted(self.room.done())

    @precondition(lambda self: any(each and each.number for each in self.ongoing))
    @rule(which=st.integers(0, 99))
    def find_it_full(self, which: int) -> None:
        """One that has waited finds no place after all, and is back where it was."""
        held = [each for each in self.ongoing if each and each.number]
        back = held[which % len(held)]
        self.full(back.alias)
        self.ongoing.remove(back)
        self.granted(self.room.done())
        could = self.may_go_on(back.alias)
        assert self.room.join(back) is None
        if could:
            self.ongoing.append(back)
        else:
            insort(self.waiting, back, key=lambda each: each.number)
            self.returned.add(back)
        self.forget_the_ineligible()

    @rule(alias=st.sampled_from(ALIASES))
    def available(self, alias: str) -> None:
        self.here.setdefault(alias, math.inf)
        self.granted(self.room.available(alias))

    @rule(alias=st.sampled_from(ALIASES))
    def unavailable(self, alias: str) -> None:
        self.here.pop(alias, None)
        self.forget_the_ineligible()
        self.room.unavailable(alias)

    @rule(alias=st.sampled_from(ALIASES))
    def full(self, alias: str) -> None:
        if alias in self.here:
            self.here[alias] = 0
        self.forget_the_ineligible()
        self.room.full(alias)
        assert self.room.is_full(alias) == (alias in self.here)

    @rule(alias=st.sampled_from(ALIASES), places=st.integers(0, 3))
    def freed(self, alias: str, places: int) -> None:
        self.free(alias, places)
        self.granted(self.room.freed(alias, places))

    @rule(seconds=st.integers(0, 8))
    def expire(self, seconds: int) -> None:
        self.now += seconds
        due = sorted(
            (each for each in self.waiting if each.deadline <= self.now), key=lambda each: (each.deadline, each.number)
        )
        assert list(self.room.expire(self.now)) == due
        self.taken_out(due)

    @rule(alias=st.sampled_from(ALIASES))
    def evict(self, alias: str) -> None:
        mine = [each for each in self.waiting if each.alias == alias]
        assert list(self.room.evict(alias)) == mine
        self.taken_out(mine)

    # What is promised

    def may_go_on(self, alias: str) -> bool:
        return len(self.ongoing) < self.room.max_ongoing and self.here.get(alias, 0) > 0

    def free(self, alias: str, places: int) -> None:
        if places and alias in self.here:
            self.here[alias] += places if self.waits_for(alias) else math.inf

    def waits_no_more(self, ticket: Ticket) -> None:
        self.waiting.remove(ticket)
        if ticket.alias in self.here and not self.waits_for(ticket.alias):
            self.here[ticket.alias] = math.inf

    def waits_for(self, alias: str) -> bool:
        return any(each.alias == alias for each in self.waiting)

    def granted(self, tickets: Sequence[Ticket]) -> None:
        for each in tickets:
            eligible = [other for other in self.waiting if self.here.get(other.alias)]
            assert each in eligible  # so it waited, and was not granted before
            assert each.priority == max(other.priority for other in eligible)
            rivals = [other for other in eligible if other.priority == each.priority]
            assert each is next(other for other in rivals if other.caller == each.caller)
            for caller in {other.caller for other in rivals} - {each.caller}:
                passed = self.passed.setdefault((each.priority, caller), [])
                assert each.caller not in passed
                passed.append(each.caller)
            self.passed.pop((each.priority, each.caller), None)
            self.here[each.alias] -= 1
            self.waits_no_more(each)
            self.ongoing.append(each)
            self.forget_the_ineligible()

    def forget_the_ineligible(self) -> None:
        eligible = {(each.priority, each.caller) for each in self.waiting if self.here.get(each.alias)}
        self.passed = {who: passed for who, passed in self.passed.items() if who in eligible}

    def taken_out(self, tickets: Iterable[Ticket]) -> None:
        for each in tickets:
            assert each.state is State.ENDED
            self.waits_no_more(each)
        self.forget_the_ineligible()

    @invariant()
    def counts_are_right_and_within_bounds(self) -> None:
        room = self.room
        assert room.ongoing == len(self.ongoing) <= room.max_ongoing
        assert room.waiting == len(self.waiting)
        assert set(room.wanted) == {each.alias for each in self.waiting}
        for alias in self.ALIASES:
            mine = [each for each in self.waiting if each.alias == alias]
            assert room.waiting_for(alias) == len(mine)
            assert room.bytes_for(alias) == sum(each.size for each in mine)
            counted = [each for each in mine if each not in self.returned]
            assert len(counted) <= room.bounds.tickets
            assert sum(each.size for each in counted) <= room.bounds.bytes
            assert room.is_available(alias) == (alias in self.here)
        assert room.next_deadline == min((each.deadline for each in self.waiting), default=None)

    @invariant()
    def nobody_waits_who_could_go_on(self) -> None:
        if self.room.ongoing < self.room.max_ongoing:
            assert not any(self.here.get(each.alias) for each in self.waiting)
        assert all(each.state is State.WAITING for each in self.waiting)
        assert all(each is None or each.state is State.GRANTED for each in self.ongoing)

    def teardown(self) -> None:
        """Everybody who waits is served in the end, and nothing is left."""
        for alias in self.ALIASES:
            self.available(alias)
            self.freed(alias, 1000)
        while self.ongoing:
            self.done(0)
        room = self.room
        assert (room.ongoing, room.waiting, self.waiting, room.wanted) == (0, 0, [], ())
        assert room.next_deadline is None
        assert (room._queues, room._eligible, room._priorities, room._deadlines) == ({}, {}, [], [])


TestTicketsAreServed = TicketsAreServed.TestCase
TestTicketsAreServed.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
