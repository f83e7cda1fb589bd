"""What the benchmarks see, and what is made of it."""

from __future__ import annotations

import asyncio
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from benchmarks import caches, cold_start, controller, costs, processes, simulator
from benchmarks.hold import Connection
from benchmarks.machine import Machine
from benchmarks.pace import Pace
from benchmarks.picture import picture
from benchmarks.report import DIRECT, USUAL, Load, Memory, Results, Row, aims, best, report, table

from modelpool.messages.engine import StartPhase
from modelpool.simulator.trace import Arrival


def row(router: str, load: Load = Load.PLAIN, connections: int = 0, **figures: float) -> Row:
    usual = {"cpu_us": 40.0, "p50_us": 100.0, "p99_us": 200.0, "p999_us": 300.0, "per_second": 1e3, "segments": 1.0}
    return msgspec.convert(
        {
            "router": router,
            "load": load,
            "connections": connections or USUAL[load],
            "requests": 5000,
            "median_cpu_us": figures.get("cpu_us", 40.0),
            **usual,
            **figures,
        },
        Row,
    )


def results(**cpu_us: float) -> Results:
    names = [name.replace("_", "-") for name in cpu_us]
    rows = [row(name, load, cpu_us=cpu) for name, cpu in zip(names, cpu_us.values(), strict=True) for load in Load]
    direct = [row(DIRECT, load, p50_us=90.0, p99_us=150.0, p999_us=250.0) for load in Load]
    return Results(
        ours=names[0],
        when="2026-01-01 00:00",
        commit="abc",
        machine=Machine(cores=2, processor="a processor", python="3.11", others=0.25),
        rounds=1,
        versions=dict.fromkeys(names, "1.0"),
        keyed=dict.fromkeys(names, True),
        missing=["nginx"],
        rows=[*rows, *direct],
        memory=[Memory(router=name, count=10, start=10**7, idle=1e3, stream=1e4) for name in names],
    )


def test_of_several_rounds_the_least_of_each_figure_counts() -> None:
    first, second = row("a", cpu_us=50, p50_us=10, per_second=5), row("a", cpu_us=40, p50_us=20, per_second=9)
    other = row("b", cpu_us=1)
    merged = {each.router: each for each in best([first, other, second])}
    assert (merged["a"].cpu_us, merged["a"].p50_us, merged["a"].per_second) == (40, 10, 9)
    assert merged["b"] == other


def test_of_streams_a_round_whose_chunks_were_joined_does_not_count() -> None:
    joined, apart = row("a", Load.PACED, cpu_us=500, segments=20.0), row("a", Load.PACED, cpu_us=900, segments=64.0)
    disturbed = row("a", Load.PACED, cpu_us=1200, segments=65.0)
    (merged,) = best([joined, disturbed, apart])
    assert (merged.cpu_us, merged.segments, merged.median_cpu_us) == (900, 64, 900)
    assert best([msgspec.structs.replace(each, load=Load.STREAM) for each in (joined, disturbed)])[0].cpu_us == 500


def test_rows_of_other_loads_and_connections_are_not_merged() -> None:
    assert len(best([row("a"), row("a", Load.STREAM), row("a", connections=64)])) == 3


def test_a_ratio_above_its_limit_is_not_kept() -> None:
    found = {aim.what: aim for aim in aims(results(ours=40, vllm_router=100, sglang_router=70))}
    assert found["CPU of a plain request"].rival == "sglang-router"
    assert found["CPU of a plain request"].ratio == pytest.approx(4 / 7)
    text = report(results(ours=40, vllm_router=100, sglang_router=70))
    assert "CPU of a plain request, of vllm-router's" in text
    kept = {line.split("|")[1].strip(): line.split("|")[5].strip() for line in text.splitlines() if "CPU of a" in line}
    assert kept["CPU of a plain request, of vllm-router's"] == "yes"
    assert kept["CPU of a plain request, of sglang-router's"] == "no"


def test_without_rivals_there_is_a_report_that_says_what_is_missing() -> None:
    text = report(results(ours=40))
    assert "left out: nginx" in " ".join(text.split())
    assert aims(results(ours=40)) == []


def test_a_slow_router_is_absent_where_it_was_not_measured() -> None:
    every = results(ours=40, slow=400)
    some = [each for each in every.rows if not (each.router == "slow" and each.load is Load.PACED)]
    extra = row("ours", connections=256), row(DIRECT, connections=256)
    text = report(msgspec.structs.replace(every, rows=[*some, *extra]))
    assert "| slow 1.0 |" in text.replace("  ", " ")
    assert "slow" in picture(msgspec.structs.replace(every, rows=some))


def test_a_table_reads_as_text() -> None:
    assert table(["a", "bb"], [["ccc", "1"]]).splitlines() == ["| a   | bb |", "| --- | -: |", "| ccc |  1 |"]


def test_the_picture_is_svg_with_every_router() -> None:
    root = ET.fromstring(picture(results(ours=40, vllm_router=100)))
    texts = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("ours") == texts.count("vllm-router") == 6
    assert "100 µs (2.5×)" in texts


def test_a_paced_stream_is_as_long_as_asked_and_no_two_events_are_the_same() -> None:
    pace = Pace(7, 60, 0.5)
    assert Pace.of(pace.prompt()) == pace
    assert Pace.of("pace is a word") is None
    events = {Pace(number, 60, 0.5).event(index) for number in range(20) for index in range(60)}
    assert len(events) == 20 * 60
    assert {len(event) for event in events} == {200}


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        (lambda body: body, False),
        (lambda body: body[:500] + b"?" + body[501:], True),
        (lambda body: body[:400] + body[600:], True),
        (lambda body: body[:400] + body[200:], True),
        (lambda body: body + b"more", True),
    ],
)
def test_a_stream_with_a_byte_changed_lost_doubled_or_added_is_wrong(
    changed: Callable[[bytes], bytes], wrong: bool
) -> None:
    async def held() -> Connection:
        pace = Pace(3, 4, 0.0)
        body = b"".join(map(pace.event, range(4))) + b"data: [DONE]\n\n"
        connection = Connection(b"", pace)
        for piece in batched(changed(body), 150):
            connection.on_body(piece)
        return connection

    assert asyncio.run(held()).wrong is wrong


def batched(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_the_clock_finds_every_function_that_it_is_to_time() -> None:
    for path in (path for paths in costs.STAGES.values() for path in paths):
        holder, attribute, function = costs.found(path)
        assert callable(function), path
        assert vars(holder)[attribute], f"{path} is inherited, so that timing it would time others too"


def test_the_clock_counts_a_call_for_who_spent_the_time() -> None:
    def spend() -> None:
        until = time.perf_counter_ns() + 50_000
        while time.perf_counter_ns() < until:
            pass

    clock = costs.Clock()
    inner = clock.timed("inner", spend)
    outer = clock.timed("outer", lambda: [inner(), inner()])
    for _ in range(50):
        outer()
    seen = clock.functions
    assert (seen["inner"].calls, seen["outer"].calls) == (100, 50)
    assert seen["inner"].ns > 4 * seen["outer"].ns


def test_a_coroutine_is_timed_step_by_step_and_keeps_its_result_and_its_errors() -> None:
    clock = costs.Clock()

    async def sleep(result: int) -> int:
        await asyncio.sleep(0)
        if result < 0:
            raise ValueError(result)
        return result

    async def cancelled() -> int:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return 7
        return 0

    async def run() -> int:
        assert await clock.stepped("sleep", sleep)(5) == 5
        with pytest.raises(ValueError, match="-1"):
            await clock.stepped("sleep", sleep)(-1)
        task = asyncio.create_task(clock.stepped("cancelled", cancelled)())
        await asyncio.sleep(0)
        task.cancel()
        return int(await task)

    assert asyncio.run(run()) == 7
    assert clock.functions["sleep"].calls == 4


def test_a_second_process_brings_what_the_one_with_most_connections_leaves() -> None:
    def round_of(gateway_us: float, most: float) -> processes.Measured:
        return processes.Measured(per_second=1, gateway_us=gateway_us, clients_us=1, engines_us=1, most=most)

    assert processes.ratio([round_of(50, 1)] * 3, [round_of(50, 0.5)] * 3) == 2
    assert processes.ratio([round_of(50, 1)], [round_of(50, 0.625)]) == 1.6
    assert processes.ratio([round_of(60, 1)], [round_of(80, 0.5)]) == 1.5


def starts(**changes: Any) -> cold_start.Results:
    usual = cold_start.Results(
        when="2026-01-01 00:00",
        commit="abc",
        machine=Machine(cores=2, processor="a processor", python="3.11", others=0.25),
        server_first=50.0,
        pool_first=2.0,
        server=[30.0, 24.0, 40.0],
        pool=[1.0, 3.0, 2.0],
        phases={"fork": [0.1, 0.2, 0.3]},
        awake=[0.1, 0.2, 0.3],
        asleep={1: [0.3, 0.4, 9.0], 2: [2.0, 2.1, 2.2]},
        spare_bytes=10**7,
    )
    return msgspec.structs.replace(usual, **changes)


def verdicts(results: cold_start.Results) -> list[bool]:
    """Of the rows that have a bound."""
    rows = [line for line in cold_start.report(results).splitlines() if line.startswith("| ")]
    kept = [row.split("|")[-2].strip() for row in rows[1:]]
    return [each == "yes" for each in kept if each in ("yes", "no")]


def test_cold_starts_are_held_to_their_bounds_by_medians() -> None:
    assert verdicts(starts()) == [True, True, False]
    assert verdicts(starts(server=[23.0])) == [False, True, False]
    assert verdicts(starts(asleep={1: [0.8], 2: [1.6]})) == [True, False, True]


def test_phases_of_several_starts_go_together() -> None:
    first, second = (StartPhase("fork", 0.1), StartPhase("app", 0.2)), (StartPhase("fork", 0.3),)
    assert cold_start.by_name([first, second]) == {"fork": [0.1, 0.3], "app": [0.2]}


def test_a_piece_of_a_trace_is_scaled_and_spread() -> None:
    trace = [Arrival(time=each / 10, tokens_in=each, tokens_out=1) for each in range(20_000)]
    part = simulator.piece(trace, 300.0)
    assert len(part) == simulator.SPAN_S * 10 / simulator.EVERY
    assert part[0] == Arrival(time=0.0, model=part[0].model, tokens_in=3000, tokens_out=1)
    assert 0.95 * simulator.PLAYED_S < part[-1].time < simulator.PLAYED_S
    assert len({each.model for each in part}) == simulator.MODELS


def test_waits_are_foretold_where_both_quantiles_are_near() -> None:
    measured = simulator.waits([0.0, 0.05, 1.0, 2.0, 10.0])
    assert (measured.requests, measured.waited, measured.p50, measured.p95) == (5, 3, 2.0, 10.0)
    usual = simulator.Results(
        when="2026-01-01 00:00",
        commit="abc",
        machine=Machine(cores=2, processor="a processor", python="3.11", others=0.25),
        trace="trace.csv",
        fitted=measured,
        fitted_again=measured,
        measured=measured,
        foretold=simulator.waits([0.0, 0.05, 1.0, 2.4, 9.0]),
        starts=1.0,
        wakes=2.0,
    )
    assert usual.off == pytest.approx({"p50": 0.2, "p95": -0.1, "p95_of_all": -0.1})
    assert "+20% (p50), -10% (p95), -10% (p95 of all): within 25%." in " ".join(simulator.report(usual).split())
    late = msgspec.structs.replace(usual, foretold=simulator.waits([0.0, 0.05, 1.0, 2.6, 9.0]))
    assert ": not within 25%." in " ".join(simulator.report(late).split())


def test_where_most_of_a_start_went_is_said() -> None:
    starts = [(2.0, (StartPhase("fork", 0.1), StartPhase("weights", 1.5))), (1.0, (StartPhase("weights", 0.7),))]
    last = caches.report({"on the disk": starts}, "about").splitlines()[-1]
    assert [each.strip() for each in last.split("|")[1:3]] == ["on the disk", "1.50"]
    assert "weights 1.10, fork 0.10" in last


def test_the_controller_thinks_for_milliseconds_whatever_happens() -> None:
    took = controller.measured(models=200, workers=20, seconds=8.0)
    assert len(took) == 12
    for what, steps in took.items():
        assert max(steps) < 0.5, what


def test_a_step_with_10_000_models_on_1_000_workers_takes_less_than_half_a_second() -> None:
    """With tenfold slack: `python -m benchmarks.controller` measures what it takes on a quiet machine."""
    for what, steps in controller.measured(seconds=0.25).items():
        assert max(steps) < 0.5, what
