"""What is said of a model in each state: what comes next, when, why; what a request does; who may take its memory."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from modelpool.core.demand import Seen
from modelpool.core.events import DemandHeard, ModelRegistered
from modelpool.core.learned import What, learn
from modelpool.core.lifecycle import InstanceState
from modelpool.core.pool import Pool
from modelpool.manager.outlook import in_words, outlook
from tests.unit.controller import asked, changed, heard, model, play, report, serving, up

S = InstanceState
LEARNED = learn(learn(learn({}, "w", What.START, 8.0), "w", What.WAKE_1, 0.3), "w", What.WAKE_1, 0.1)


def said(pool: Pool, now: float, alias: str = "a") -> list[str]:
    mine = [each for each in pool.instances.values() if each.alias == alias]
    return list(outlook(pool, pool.models[alias], mine, now))


def test_an_idle_model_goes_down_at_a_time_that_is_said_and_gives_way() -> None:
    pool, _ = play((50, heard(report("a"))), pool=up("a"))
    assert said(pool, 60) == [
        "Next: a goes to sleep at level 1 in 40 s, unless it is asked for.",
        "It gives way to a model that is asked for and needs its memory; while it is busy, once that one has waited "
        "for 30 s.",
    ]
    assert said(up("a"), 3)[1].endswith("but not in the next 2 s.")


def test_a_busy_model_says_its_load() -> None:
    pool, _ = play((50, serving(a=5)), (55, serving(a=5)), (80, serving(a=5)), pool=up("a"))
    assert said(pool, 80)[0] == "Next: nothing by itself; load 0.50."


def test_a_sleeper_says_what_wakes_it_and_how_long_that_takes() -> None:
    pool, _ = play((100, heard(report("a"))), (101, heard(report("a", S.SLEEP_1, held=1))), pool=up("a"))
    pool = replace(pool, learned={"a": LEARNED})
    assert said(pool, 101) == [
        "Next: a goes to sleep at level 2 in 99 s, unless it is asked for.",
        "A request wakes it, which takes 0.1 s, 0.3 s at worst.",
        "It gives way to a model that is asked for and needs its memory.",
    ]


def test_one_that_falls_asleep_says_so() -> None:
    pool, _ = play((100, heard(report("a"))), pool=up("a"))
    assert said(pool, 101) == ["Next: a falls asleep once its requests have ended."]


def test_an_unloaded_model_says_how_long_a_start_takes() -> None:
    pool, _ = play((0, heard()), (0, ModelRegistered(model("a"), LEARNED, True)), (5, heard()))
    assert said(pool, 6) == [
        "Next: nothing by itself; nobody asks for it.",
        "A request starts it, which takes 8 s.",
    ]
    new, _ = play((0, heard()), (0, ModelRegistered(model("a"), {}, True)), (5, heard()))
    assert said(new, 6)[1] == "A request starts it; how long that takes was not seen yet."


def test_one_on_its_way_says_when_it_is_ready_and_one_that_failed_when_it_is_tried_again() -> None:
    pool, _ = play((0, heard()), (1, ModelRegistered(model("a"), LEARNED)), (2, heard(report("a", S.STARTING))))
    assert said(pool, 4) == ["Next: a is ready, in 5 s as a rule."]
    assert said(pool, 14) == ["Next: a is ready soon."]
    pool, _ = play((5, heard(replace(report("a", S.FAILED), reason="boom", changed_at=5))), pool=pool)
    assert said(pool, 5.5) == ["Next: a is tried again in 0.5 s."]


def test_one_that_has_no_room_says_what_is_in_the_way() -> None:
    pool, _ = play((1, ModelRegistered(model("b", pinned=True, gb=3))), (1, asked(b=1)), pool=up("a"))
    pool, _ = play((2, ModelRegistered(model("c", 8))), (2, heard(report("a"))), pool=pool)
    first, *rest = said(pool, 3, "c")
    assert first.startswith("Next, when it can be: c is started; 0 of at least 1 replicas are there. In the way: w: ")
    assert rest == ["A request starts it; how long that takes was not seen yet."]
    pool, _ = play((4, ModelRegistered(model("d", 80))), pool=pool)
    assert len(said(pool, 5, "d")) == 1


@pytest.mark.parametrize(
    ("settings", "why", "who"),
    [
        ({"pinned": True}, "it is pinned, idle for", "It gives way to nobody: it is pinned."),
        ({"min_replicas": 1}, "min_replicas keeps 1 of it awake, idle", "It gives way to nobody: min_replicas is 1."),
        ({"preload": True}, "it stays while there is room (preload), idle for", "It gives way to a model that"),
    ],
)
def test_one_that_stays_says_why(settings: dict[str, object], why: str, who: str) -> None:
    pool, _ = play((50, changed("a", **settings)), pool=up("a"))
    first, second = said(pool, 60)
    assert first.startswith(f"Next: nothing by itself; {why}")
    assert second.startswith(who)


def test_load_that_asks_for_another_replica_says_when_it_comes() -> None:
    full = DemandHeard("g", {"a": Seen(inflight={"a": 10}, waiting=10)})
    pool, _ = play((2, full), pool=up("a", gb=3))
    assert said(pool, 2)[0] == "Next: another replica of a is started in 3 s, if its load stays as it is."


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.052, "0.052 s"), (1.94, "1.9 s"), (40.4, "40 s"), (252, "4 min 12 s"), (840, "14 min"), (7500, "2 h 5 min")],
)
def test_times_are_said_as_people_do(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
