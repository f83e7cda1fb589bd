"""The phases of a start add up to its time."""

from __future__ import annotations

from modelpool.engines.start_clock import StartClock
from modelpool.messages.engine import StartPhase as P


def test_phases_follow_each_other_and_what_parts_leave_keeps_the_name_of_the_whole() -> None:
    times = iter([1.0, 3.0, 3.5, 10.0, 10.0, 12.5])
    clock = StartClock(lambda: next(times))
    clock.begin("configuration")
    clock.begin("processes")
    clock.end()
    clock.split([P("weights", 4.0), P("kv_cache", 2.0)])
    clock.begin("app")
    clock.end()
    clock.end()
    assert clock.phases() == (
        P("configuration", 2.0),
        P("processes", 0.5),
        P("weights", 4.0),
        P("kv_cache", 2.0),
        P("app", 2.5),
    )


def test_parts_measured_elsewhere_cannot_leave_less_than_nothing() -> None:
    times = iter([0.0, 1.0])
    clock = StartClock(lambda: next(times))
    clock.split([P("weights", 1.0)])
    clock.begin("processes")
    clock.end()
    clock.split([])
    clock.split([P("weights", 1.5)])
    assert clock.phases() == (P("processes", 0.0), P("weights", 1.5))
