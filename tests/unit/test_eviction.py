"""Who gives way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from modelpool.core.eviction import Holder, NoPlan, Plan, Way, plan
from modelpool.core.lifecycle import InstanceState
from modelpool.core.scaling import Step

GB = 10**9


def holder(name: str, gigabytes: int, *, chance: float = 0.5, back_s: float = 5.0, kept: str = "") -> Holder:
    """Awake: asleep it frees three quarters and is back in a second, unloaded everything and is back in `back_s`."""
    held = gigabytes * GB
    return Holder(
        instance=name,
        alias=name,
        state=InstanceState.ACTIVE,
        holds={0: held},
        ways=(
            Way(step=Step.SLEEP_1, frees={0: held * 3 // 4}, back_s=1.0),
            Way(step=Step.UNLOAD, frees={0: held}, back_s=back_s),
        ),
        chance=chance,
        kept=kept,
    )


def chosen(result: Plan | NoPlan) -> list[tuple[str, Step]]:
    assert isinstance(result, Plan), result
    return [(each.instance, each.step) for each in result.evictions]


def test_the_one_least_likely_to_be_asked_for_gives_way() -> None:
    holders = [holder("often", 8, chance=0.9), holder("seldom", 8, chance=0.1)]
    assert chosen(plan({0: 5 * GB}, holders, "m")) == [("seldom", Step.SLEEP_1)]


def test_sleep_is_enough_where_it_is_enough() -> None:
    assert chosen(plan({0: 6 * GB}, [holder("a", 8)], "m")) == [("a", Step.SLEEP_1)]
    assert chosen(plan({0: 7 * GB}, [holder("a", 8)], "m")) == [("a", Step.UNLOAD)]


def test_nobody_gives_way_who_is_not_needed() -> None:
    holders = [holder("small", 1, chance=0.0), holder("large", 20, chance=0.5)]
    assert chosen(plan({0: 12 * GB}, holders, "m")) == [("large", Step.SLEEP_1)]


def test_when_nothing_helps_it_says_who_holds_what_and_why_they_stay() -> None:
    result = plan({0: 12 * GB}, [holder("a", 8, kept="2 requests in flight"), holder("b", 4)], "m")
    assert isinstance(result, NoPlan)
    assert result.reason == "a (ACTIVE) holds 8.0 GB, 2 requests in flight; b (ACTIVE) holds 4.0 GB"


@given(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1), st.booleans()), max_size=8),
    st.integers(1, 60),
)
def test_a_plan_frees_enough_spares_whom_it_must_and_takes_nobody_in_vain(
    rows: list[tuple[int, float, bool]], short: int
) -> None:
    holders = [
        holder(f"h{number}", size, chance=chance, kept="busy" if busy else "")
        for number, (size, chance, busy) in enumerate(rows)
    ]
    by_name = {each.instance: each for each in holders}
    result = plan({0: short * GB}, holders, "m")
    free = {each.instance: sum(each.holds.values()) for each in holders if not each.kept}
    if isinstance(result, NoPlan):
        assert sum(free.values()) < short * GB
        return
    freed = {
        each.instance: next(way.frees[0] for way in by_name[each.instance].ways if way.step is each.step)
        for each in result.evictions
    }
    assert set(freed) <= set(free)
    assert sum(freed.values()) >= short * GB
    assert all(sum(freed.values()) - gain < short * GB for gain in freed.values())
