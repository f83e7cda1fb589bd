"""Traces of requests: `record` writes one, `simulate` plays one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from modelpool.cli.options import ConfigOption, JsonOption, UrlOption, assignments, client_of, settings_of
from modelpool.cli.output import fail, report, show
from modelpool.cli.record import Services, at_rest, recorded, scenario_of_pool, seconds_of, writing
from modelpool.cli.simulate import (
    SCENARIO_SUFFIX,
    arrivals_of,
    figures_table,
    picture,
    refusals,
    scenario_of,
    simulated,
)
from modelpool.simulator.policies import Named
from modelpool.simulator.scenario import ScenarioError, write_scenario
from modelpool.simulator.trace import TraceError, generate, write_rows, write_trace


def record(
    trace: Annotated[Path, typer.Argument(help="The CSV file to write; what models cost goes beside it.")],
    for_: Annotated[str, typer.Option("--for", help="How long: 90s, 10m, 2h.")] = "10m",
    url: UrlOption = None,
) -> None:
    """Write what requests a pool finishes, and when, to a trace for `simulate`; nothing of what they say."""
    try:
        for_s = seconds_of(for_)
    except ValueError:
        fail(f"--for={for_!r} is no time such as 90s, 10m or 2h.", code=2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    count, missed = 0, False
    with client_of(url) as client, writing(trace) as file:
        services, resting = Services(), at_rest(client.status().models)
        write_trace(file, ())
        try:
            for arrivals, some_missed in recorded(client, for_s):
                write_rows(file, arrivals)
                services.add(arrivals)
                count, missed = count + len(arrivals), missed or some_missed
        except KeyboardInterrupt:
            pass
        status = client.status()
        scenario = scenario_of_pool(status.models, status.workers, services, resting)
        write_scenario(trace.with_suffix(SCENARIO_SUFFIX), scenario)
    print(f"{count:,} requests in {trace}, what their models cost in {trace.with_suffix(SCENARIO_SUFFIX)}")
    if missed:
        report("more requests came than the gateway remembers: some are not in it")


def simulate(
    trace: Annotated[Path | None, typer.Argument(help="Arrivals: our CSV, Azure's, or Mooncake's JSON lines.")] = None,
    policy: Annotated[
        list[Named] | None, typer.Option("--policy", help="Several may be compared; the first is ladder, by default.")
    ] = None,
    scenario: Annotated[
        Path | None, typer.Option(help="Workers, models and costs (YAML); else NAME.pool.yaml beside NAME.csv.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting: models.idle_sleep_1_s=60.")] = None,
    models: Annotated[int, typer.Option(min=1, help="Where the trace names none: spread it over so many.")] = 10,
    skew: Annotated[float, typer.Option(min=0, help="How uneven, by Zipf's law.")] = 1.0,
    rate: Annotated[float, typer.Option(min=0.001, help="Without a trace: requests a second.")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0.1, help="Without a trace: how long.")] = 60.0,
    daily: Annotated[float, typer.Option(min=0, max=1, help="Without a trace: how far a day swings.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same figures.")] = 0,
    svg: Annotated[Path | None, typer.Option(help="Write a picture there.")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Play arrivals to the controller in virtual time, and print what it would make of them."""
    settings = settings_of(config, assignments(set_))
    try:
        world = scenario_of(trace, scenario)
        if trace is None:
            arrivals = generate(
                models=models, seconds=minutes * 60, rate=rate, skew=skew, daily=daily, day_s=minutes * 60, seed=seed
            )
        else:
            arrivals = arrivals_of(trace, models=models, skew=skew, seed=seed)
    except (TraceError, ScenarioError) as error:
        fail(str(error), "docs/simulator.md describes the files.", code=2)
    if not arrivals:
        fail("no request comes in that time; give more --minutes, or a higher --rate.", code=2)
    found = simulated(arrivals, world, settings, policy or [Named.LADDER], seed=seed)
    if svg is not None:
        svg.write_text(picture(found))
    show(found, json, lambda: figures_table(found))
    if not json:
        for line in refusals(found):
            print(line)
