"""The simulator: the controller in virtual time, against workers that need for each step what they were said to."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from typer.testing import CliRunner

from modelpool.cli.app import app
from modelpool.cli.simulate import scenario_of
from modelpool.core.pool import Policy
from modelpool.core.scaling import ScalingPolicy
from modelpool.simulator.policies import Named, applied
from modelpool.simulator.report import Figures, figures
from modelpool.simulator.scenario import ModelCosts, Scenario, ScenarioError, WorkerKind, read_scenario, write_scenario
from modelpool.simulator.simulation import HOP_S, LEAD_S, REPORT_S, Gateway, Outcome, Served, Simulation
from modelpool.simulator.trace import Arrival, TraceError, generate, read_trace, spread, write_trace

POLICY = Policy(
    scaling=ScalingPolicy(idle_sleep_1_s=60, idle_sleep_2_s=120, idle_unload_s=180), min_residence_s=5, turn_max_s=30
)
COSTS = ModelCosts(
    memory_gb=6, held_gb=(1, 0.5), start_s=10, stop_s=1, sleep_s=(0.3, 0.3), wake_s=(0.5, 2), service_s=1, capacity=4
)
ONE = (WorkerKind(device_gb=10),)
SLACK = 20 * HOP_S + 4 * REPORT_S
"""What orders, reports and snapshots take on their way."""


def simulated(*arrivals: tuple[float, str], workers: tuple[WorkerKind, ...] = ONE, seed: int = 0) -> Outcome:
    scenario = Scenario(workers=workers, default=COSTS)
    trace = [Arrival(time=time, model=model) for time, model in arrivals]
    return Simulation(scenario, trace, policy=POLICY, seed=seed).run()


def waits(outcome: Outcome) -> list[float]:
    return [each.wait_s for each in outcome.served]


def test_who_is_awake_answers_at_once() -> None:
    outcome = simulated((0, "a"), (5, "a"))
    assert waits(outcome) == [0, 0]
    assert (outcome.starts, outcome.swaps) == (0, 0)  # it was started before the first request


@pytest.mark.parametrize(
    ("idle_s", "wait_s", "woken"),
    [(20, 0, {1: 0, 2: 0}), (90, 0.5, {1: 1, 2: 0}), (150, 2, {1: 0, 2: 1}), (300, 10, {1: 0, 2: 0})],
)
def test_the_longer_nobody_asked_the_longer_the_next_request_waits(
    idle_s: float, wait_s: float, woken: dict[int, int]
) -> None:
    outcome = simulated((0, "a"), (idle_s, "a"))
    assert waits(outcome)[1] == pytest.approx(wait_s, abs=SLACK)
    assert outcome.wakes == woken
    assert outcome.starts == (1 if wait_s == 10 else 0)


def test_of_two_that_cannot_live_together_the_idle_one_gives_way() -> None:
    outcome = simulated((0, "a"), (30, "b"))
    assert outcome.swaps == 1
    assert waits(outcome)[1] == pytest.approx(0.3 + 10, abs=SLACK)  # the other falls asleep, it starts


def test_sleep_is_enough_to_give_way_where_it_leaves_enough() -> None:
    slept = ModelCosts(memory_gb=6, held_gb=(4.5, 0.5), start_s=10, stop_s=1, sleep_s=(0.3, 0.4), wake_s=(0.5, 2))
    scenario = Scenario(workers=ONE, default=slept)
    trace = [Arrival(time=0, model="a"), Arrival(time=30, model="b"), Arrival(time=60, model="a")]
    outcome = Simulation(scenario, trace, policy=POLICY).run()
    assert waits(outcome)[1:] == pytest.approx([0.4 + 10, 0.4 + 2], abs=SLACK)
    assert (outcome.swaps, outcome.sleeps, outcome.wakes) == (2, {1: 0, 2: 2}, {1: 0, 2: 1})


@pytest.mark.parametrize(("host_gb", "sleeps"), [(None, {1: 1, 2: 0}), (3, {1: 1, 2: 0}), (2, {1: 0, 2: 1})])
def test_level_1_needs_room_in_the_machines_memory(host_gb: float | None, sleeps: dict[int, int]) -> None:
    costs = replace(COSTS, held_on_host_gb=(1.0, 1.5, 0.2))
    scenario = Scenario(workers=(WorkerKind(device_gb=10, host_gb=host_gb),), default=costs)
    trace = [Arrival(time=0, model="a"), Arrival(time=30, model="b")]
    outcome = Simulation(scenario, trace, policy=POLICY).run()
    assert outcome.sleeps == sleeps
    assert waits(outcome)[1] == pytest.approx(0.3 + 10, abs=SLACK)


def test_where_the_machine_is_the_device_its_memory_is_not_counted_twice() -> None:
    costs = replace(COSTS, held_on_host_gb=(6.0, 1.5, 0.2))
    scenario = Scenario(workers=(WorkerKind(device_gb=10, host_gb=10, accelerated=False),), default=costs)
    trace = [Arrival(time=0, model="a"), Arrival(time=30, model="b")]
    assert Simulation(scenario, trace, policy=POLICY).run().sleeps == {1: 1, 2: 0}


def test_what_rests_at_first_is_started_by_its_first_request() -> None:
    scenario = Scenario(workers=ONE, default=replace(COSTS, resting=True))
    outcome = Simulation(scenario, [Arrival(time=0, model="a"), Arrival(time=20, model="a")], policy=POLICY).run()
    assert waits(outcome) == pytest.approx([10, 0], abs=SLACK)
    assert outcome.starts == 1


def test_without_sleep_each_turn_is_a_start_and_without_turns_there_are_more_of_them() -> None:
    arrivals = generate(models=3, seconds=300, rate=0.5, seed=5)
    found = simulated_by(list(Named), arrivals)
    assert found["ladder"].starts < found["unload"].starts
    assert found["ladder"].swaps < found["first-come"].swaps
    assert found["ladder"].wait_mean < found["unload"].wait_mean
    assert {each.requests for each in found.values()} == {len(arrivals)}


def simulated_by(policies: list[Named], arrivals: list[Arrival]) -> dict[str, Figures]:
    found = {}
    for name in policies:
        policy, world = applied(name, POLICY, Scenario(workers=ONE, default=COSTS))
        found[name.value] = figures(Simulation(world, arrivals, policy=policy).run(), world, arrivals)
    return found


def test_figures_are_those_of_the_requests() -> None:
    served = [Served(each, "m", wait_s=each) for each in range(100)]
    served.append(Served(0, "n", 1.0, refused="no room"))
    outcome = Outcome(
        served=tuple(served),
        seconds=3600,
        starts=3,
        stops=1,
        sleeps={1: 2, 2: 1},
        wakes={1: 4, 2: 5},
        swaps=6,
        device_s=1800,
        steps=0,
    )
    kinds = (WorkerKind(devices=2, device_gb=10),)
    scenario = Scenario(workers=kinds, models={name: ModelCosts(memory_gb=6) for name in "abc"})
    seen = figures(outcome, scenario, [])
    assert (seen.requests, seen.answered, seen.refused, seen.waited) == (101, 100, {"no room": 1}, 99)
    assert (seen.wait_p50, seen.wait_p95, seen.wait_p99, seen.wait_max) == (49, 94, 98, 99)
    assert (seen.device_hours, seen.always_on_hours) == (0.5, 3.0)


def test_more_than_an_instance_takes_at_once_wait_for_it() -> None:
    outcome = simulated(*((0, "a") for _ in range(6)))
    first = waits(outcome)[0]
    assert waits(outcome) == pytest.approx([first] * 4 + [first + 1] * 2, abs=0.01)


def test_what_can_never_have_room_is_refused_with_the_reason() -> None:
    scenario = Scenario(workers=ONE, default=COSTS, models={"large": ModelCosts(memory_gb=11)})
    outcome = Simulation(scenario, [Arrival(time=0, model="large")], policy=POLICY).run()
    assert [each.refused for each in outcome.served] == ["there is no room for its model"]


def test_who_waits_longer_than_may_be_is_told() -> None:
    scenario = Scenario(workers=ONE, default=COSTS)
    trace = [Arrival(time=0, model="a"), Arrival(time=30, model="b")]
    outcome = Simulation(scenario, trace, policy=POLICY, gateway=Gateway(max_wait_s=3)).run()
    assert [each.refused for each in outcome.served] == ["", "it waited too long"]
    assert waits(outcome)[1] == 3


def test_devices_that_sleep_do_not_count() -> None:
    short, long = simulated((0, "a"), (50, "a")), simulated((0, "a"), (500, "a"))
    assert short.device_s == pytest.approx(50, abs=1)
    assert long.device_s == pytest.approx(60 + 10, abs=2)  # until it slept, and its start


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 300), st.sampled_from("abcd")), min_size=1, max_size=30),
    st.integers(1, 2),
    st.integers(0, 3),
)
def test_every_request_is_answered_or_told_why_and_the_same_seed_gives_the_same_outcome(
    arrivals: list[tuple[float, str]], workers: int, seed: int
) -> None:
    arrivals.sort()
    kinds = (WorkerKind(count=workers, device_gb=10),)
    outcome = simulated(*arrivals, workers=kinds, seed=seed)
    assert sorted((each.time, each.model) for each in outcome.served) == sorted(arrivals)
    assert all(each.refused == "" for each in outcome.served)
    assert outcome == simulated(*arrivals, workers=kinds, seed=seed)


def test_a_trace_comes_back_as_it_was_written(tmp_path: Path) -> None:
    arrivals = [Arrival(time=0, model="a", status=200, wait_s=0.5, service_s=1.25), Arrival(time=2.5, model="b")]
    with (tmp_path / "t.csv").open("w") as file:
        write_trace(file, arrivals)
    assert read_trace(tmp_path / "t.csv") == arrivals


def test_traces_of_others_are_read(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    head = "TIMESTAMP,ContextTokens,GeneratedTokens"
    azure.write_text(f"{head}\n2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:05,3,8\n")
    first, second = read_trace(azure)
    assert first == Arrival(time=0, tokens_in=48, tokens_out=10)
    assert second.time == pytest.approx(1.02004)
    assert (second.tokens_in, second.tokens_out) == (3, 8)
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text('{"timestamp": 500, "input_length": 7, "output_length": 2, "hash_ids": [1]}\n')
    assert read_trace(mooncake) == [Arrival(time=0, tokens_in=7, tokens_out=2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no request"),
        ("when,model\n1,a\n", "must have `time` and `model`"),
        ("time,model\n1,a\nx,a\n", "line 3"),
        ("time,model,wait_s\n", "no request"),
        ('{"timestamp": 1}\n', "line 1"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(TraceError, match=said):
        read_trace(tmp_path / "t")


def test_a_trace_is_spread_by_the_law_of_zipf_and_the_seed() -> None:
    arrivals = spread([Arrival(time=each) for each in range(1000)], 3, seed=1)
    counts = [sum(each.model == f"model-{number}" for each in arrivals) for number in (1, 2, 3)]
    assert counts == pytest.approx([545, 273, 182], rel=0.2)
    assert arrivals == spread([Arrival(time=each) for each in range(1000)], 3, seed=1)


def test_a_day_has_its_night() -> None:
    arrivals = generate(models=2, seconds=1000, rate=1, daily=1.0, day_s=1000, seed=3)
    by_day = sum(250 <= each.time < 750 for each in arrivals)
    assert 900 < len(arrivals) < 1100
    assert by_day > 0.75 * len(arrivals)


def test_a_scenario_comes_back_as_it_was_written(tmp_path: Path) -> None:
    scenario = Scenario(workers=ONE, models={"m": ModelCosts(start_s=(1.0, 2.5), wake_s=((0.1, 0.2), 3.0))})
    write_scenario(tmp_path / "s.pool.yaml", scenario)
    assert read_scenario(tmp_path / "s.pool.yaml") == scenario
    assert scenario_of(tmp_path / "s.csv", None) == scenario
    assert scenario_of(tmp_path / "other.csv", None) == Scenario()


def test_the_documented_files_can_be_used(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    blocks = dict(re.findall(r"```(csv|yaml)\n(.*?)```", text, re.DOTALL))
    (tmp_path / "trace").write_text(blocks["csv"])
    (tmp_path / "scenario").write_text(blocks["yaml"])
    assert [each.model for each in read_trace(tmp_path / "trace")] == ["chat", "code"]
    assert read_scenario(tmp_path / "scenario").models["chat"].pinned


def test_the_command_prints_a_column_a_policy_and_draws_them(tmp_path: Path) -> None:
    svg = tmp_path / "waits.svg"
    policies = ["--policy", "ladder", "--policy", "unload", "--svg", str(svg)]
    done = CliRunner().invoke(app, ["simulate", "--minutes", "2", "--rate", "0.2", "--models", "2", *policies])
    assert done.exit_code == 0, done.output
    assert done.output.split()[:2] == ["ladder", "unload"]
    assert ET.parse(svg).getroot().tag.endswith("svg")
    wrong = CliRunner().invoke(app, ["simulate", "--set", "models.idle=1"])
    assert (wrong.exit_code, "models.idle" in wrong.output) == (2, True)


def test_what_is_wrong_with_a_scenario_is_said(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("default: {start_s: -1}")
    with pytest.raises(ScenarioError, match=r"start_s"):
        read_scenario(tmp_path / "s.yaml")


def test_the_pool_is_up_before_the_first_request() -> None:
    assert COSTS.start_s < LEAD_S  # type: ignore[operator]
