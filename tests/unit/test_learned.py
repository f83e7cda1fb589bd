"""What is learned of models by watching them: estimates, what news teaches what, and who is at rest."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from modelpool.core.events import ModelRegistered, OrderAnswered, Tick, WorkerGone, WorkerLeft
from modelpool.core.learned import (
    ANYWHERE,
    REMEMBERED,
    WORKERS_MAX,
    Learned,
    What,
    expected,
    from_record,
    learn,
    measure,
    to_record,
    typical,
)
from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import GB
from modelpool.core.pool import Pool, at_rest
from tests.unit.controller import POLICY, asked, heard, model, play, report, told, up

S = InstanceState


def learned(*values: float, what: What = What.START, worker: str = "w") -> Learned:
    seen: Learned = {}
    for value in values:
        seen = learn(seen, worker, what, value)
    return seen


def test_one_slow_start_changes_nothing_and_a_lasting_change_is_believed_after_four() -> None:
    usual = [2.0, 2.2, 1.9, 2.1, 2.0, 2.2]
    assert 1.9 <= measure(usual).typical <= 2.2
    assert measure([*usual, 600.0]).typical <= 2.2
    assert measure([*usual, 600.0]).slow == 600.0
    assert measure([*usual, 5.0, 5.0, 5.0, 5.0]).typical == 5.0
    assert measure([*usual, *[5.0] * REMEMBERED]).slow == 5.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_an_estimate_is_one_of_the_latest_observations_and_slow_is_no_less_than_typical(values: list[float]) -> None:
    found = measure(values)
    assert found.recent == tuple(values[-REMEMBERED:])
    assert found.typical in found.recent
    assert found.typical <= found.slow <= max(found.recent)


def test_a_worker_without_observations_is_taken_to_be_like_the_others() -> None:
    seen = learn(learned(2.0, 2.0), "slow", What.START, 9.0)
    assert typical(seen, What.START, "slow", unknown=1) == 9.0
    assert typical(seen, What.START, "w", unknown=1) == 2.0
    assert typical(seen, What.START, "new", unknown=1) == 2.0
    assert typical(seen, What.WAKE_1, "w", unknown=1) == 1
    assert expected(seen, What.WAKE_1) is None


def test_workers_that_are_heard_of_no_more_are_forgotten() -> None:
    seen: Learned = {}
    for number in range(WORKERS_MAX + 3):
        seen = learn(seen, "old", What.START, 1.0)
        seen = learn(seen, f"w{number}", What.START, float(number))
    workers = {worker for worker, _ in seen}
    assert len(workers) == WORKERS_MAX + 1
    assert {ANYWHERE, "old", f"w{WORKERS_MAX + 2}"} <= workers
    assert "w0" not in workers


def test_what_was_learned_is_the_same_again_after_it_was_kept() -> None:
    seen = learn(learn(learned(2.0, 3.0), "v", What.WAKE_1, 0.1), "w", What.HELD_1, 7e9)
    assert from_record(json.loads(json.dumps(to_record(seen)))) == seen
    assert from_record({"w": {"another version's": [1.0], "start": []}}) == {}


# ---------------------------------------------------------------- what news teaches


def learned_of(pool: Pool, what: What) -> tuple[float, ...]:
    seen = expected(pool.learned["a"], what, "w")
    return seen.recent if seen else ()


def test_starts_sleeps_wakes_and_ends_are_learned_from_what_workers_report() -> None:
    pool, _ = play((0, heard()), (1, ModelRegistered(model("a"))), (2, OrderAnswered(("w", "a"))))
    pool, _ = play((3, heard(report("a", S.STARTING))), (8, heard(report("a"))), pool=pool)
    assert learned_of(pool, What.START) == (7,)
    pool, _ = play((9, heard(report("a", held=5))), (14, heard(report("a", held=5))), pool=pool)
    assert learned_of(pool, What.HELD_AWAKE) == (5e9,)
    slept = replace(report("a", S.SLEEP_1, held=2), slept_s=0.5)
    pool, _ = play((108, heard(report("a", held=5))), (109, heard(slept)), (114, heard(slept)), pool=pool)
    assert (learned_of(pool, What.SLEEP_1), learned_of(pool, What.HELD_1)) == ((0.5,), (2e9,))
    pool, _ = play((120, asked(a=1)), (123, heard(report("a", S.WAKING, held=2))), (124, heard(report("a"))), pool=pool)
    assert learned_of(pool, What.WAKE_1) == (4,)
    slept = replace(report("a", S.SLEEP_2, held=1), slept_s=0.7)
    pool, _ = play((125, asked()), (240, heard(report("a"))), (241, heard(slept)), pool=pool)
    assert learned_of(pool, What.SLEEP_2) == (0.7,)
    pool, effects = play((541, heard(slept)), pool=pool)
    assert told(effects) == [("stop", "a")]
    pool, _ = play((544, heard()), (545, heard()), pool=pool)
    assert learned_of(pool, What.UNLOAD) == (3,)


def test_memory_that_is_measured_again_and_again_is_learned_when_it_changes() -> None:
    pool = up("a")
    for now, held in ((10, 4.0), (20, 4.1), (30, 4.15), (40, 5.0), (50, 4.95)):
        pool, _ = play((now, heard(report("a", held=held))), pool=pool)
    assert learned_of(pool, What.HELD_AWAKE) == (4e9, 5e9)


def test_the_machines_memory_is_learned_where_a_device_does_not_tell_what_is_held_of_it() -> None:
    silent = replace(report("a", held=0), host_bytes=6 * GB)
    pool, _ = play((10, heard(silent)), (20, heard(silent)), pool=up("a"))
    assert learned_of(pool, What.HELD_ON_HOST_AWAKE) == (6e9,)


def test_a_download_is_no_part_of_what_a_start_takes() -> None:
    pool, _ = play((0, heard()), (1, ModelRegistered(model("a"))), (3, heard(report("a", S.STARTING))))
    pool, _ = play((61, heard(replace(report("a"), aside_s=58.0))), pool=pool)
    assert learned_of(pool, What.START) == (2,)


def test_nothing_is_learned_of_what_somebody_else_began() -> None:
    """When it began is not known: by a manager that has just started, or of a wake by hand."""
    pool, _ = play((0, ModelRegistered(model("a"))), (1, heard(report("a", S.STARTING))), (2, heard(report("a"))))
    assert learned_of(pool, What.START) == ()
    pool, _ = play((3, heard(report("a", S.SLEEP_1))), (4, heard(report("a", S.WAKING))), pool=pool)
    pool, _ = play((5, heard(report("a"))), pool=pool)
    assert learned_of(pool, What.WAKE_1) == ()


def test_what_was_learned_goes_with_the_model() -> None:
    pool = up("a")
    pool = replace(pool, learned={"a": learned(3.0)})
    again, _ = play((1, ModelRegistered(model("a"))), pool=pool)
    assert learned_of(again, What.START) == ()


# ---------------------------------------------------------------- who rests


def test_who_went_down_because_nobody_asked_rests_and_a_new_manager_leaves_it_so() -> None:
    pool = up("a")
    assert at_rest(pool) == frozenset()
    pool, _ = play((100, heard(report("a"))), pool=pool)
    assert at_rest(pool) == {"a"}
    pool, effects = play((0, ModelRegistered(model("a"), {}, True)), (0, heard()), (50, Tick()))
    assert effects == ()
    assert at_rest(pool) == {"a"}
    pool, effects = play((60, asked(a=1)), pool=pool)
    assert told(effects) == [("start", "a")]
    assert at_rest(pool) == frozenset()


def test_who_was_up_when_all_ended_does_not_rest() -> None:
    for end in (WorkerLeft("w", "1"), WorkerGone("w", "1", "its process has ended")):
        pool, _ = play((1, end), pool=up("a"))
        assert at_rest(pool) == frozenset()
    new, _ = play((0, ModelRegistered(model("a"))))
    assert at_rest(new) == frozenset()


def test_who_failed_does_not_rest() -> None:
    pool, _ = play((1, heard(report("a", S.FAILED))), pool=up("a"))
    assert at_rest(pool) == frozenset()


def test_a_turn_is_as_long_as_what_was_learned_says() -> None:
    """Four times what it takes to unload it and start it again: not less, and no more than the bound."""
    for start_s, until in ((3.0, 16.0), (300.0, POLICY.turn_max_s)):
        seen = learn(learned(start_s), "w", What.UNLOAD, 1.0)
        pool = replace(up("a"), learned={"a": seen})
        pool, _ = play((1, ModelRegistered(model("b"))), (2, asked(b=1)), pool=pool)
        pool, effects = play((until - 1, heard(report("a"))), pool=pool)
        assert effects == ()
        _, effects = play((until, heard(report("a"))), pool=pool)
        assert told(effects) == [("stop", "a")]
