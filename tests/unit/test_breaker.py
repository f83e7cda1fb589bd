"""The breaker of an instance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelpool.core.breaker import CLOSED, FAILURES_MAX, PAUSE_INITIAL_S, PAUSE_MAX_S, Breaker


def opened(now: float = 0.0) -> Breaker:
    breaker = CLOSED
    for _ in range(FAILURES_MAX):
        assert breaker.admits(now)
        breaker = breaker.begun().failed(now)
    return breaker


def test_failures_in_a_row_open_it_for_a_pause() -> None:
    breaker = opened(now=10)
    assert not breaker.closed
    assert not breaker.admits(10 + PAUSE_INITIAL_S - 0.01)
    assert breaker.admits(10 + PAUSE_INITIAL_S)


def test_one_trial_at_a_time() -> None:
    trying = opened().begun()
    assert not trying.admits(1e9)
    assert trying.gave_up().admits(1e9)


def test_a_failed_trial_doubles_the_pause_up_to_the_longest() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(8):
        now = breaker.until
        breaker = breaker.begun().failed(now)
        pauses.append(breaker.until - now)
    assert pauses == [2, 4, 8, 16, 30, 30, 30, PAUSE_MAX_S]


def test_one_that_began_to_answer_is_trusted_and_one_failure_is_enough_until_a_success() -> None:
    answered = opened().begun().answered()
    assert answered.closed
    assert answered.admits(0.0)
    again = answered.begun().failed(5.0)
    assert (again.closed, again.until) == (False, 5.0 + 2 * PAUSE_INITIAL_S)


def test_requests_sent_before_it_opened_do_not_make_the_pause_longer() -> None:
    breaker = opened(now=0)
    assert breaker.failed(0.5).until == breaker.until


@given(st.lists(st.sampled_from(["failed", "gave_up", "wait"]), max_size=60))
def test_whatever_happened_a_request_is_admitted_within_the_longest_pause(events: list[str]) -> None:
    breaker, now = CLOSED, 0.0
    for event in events:
        if breaker.admits(now):
            breaker = breaker.begun()
            breaker = breaker.failed(now) if event == "failed" else breaker.gave_up()
        else:
            now += PAUSE_INITIAL_S
    assert breaker.admits(now + PAUSE_MAX_S)
    assert breaker.pause_s <= PAUSE_MAX_S
