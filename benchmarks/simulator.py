"""Whether the simulator foretells how long requests wait in a pool of real engines.

    python -m benchmarks.simulator TRACE [--keep FOLDER]
    python -m benchmarks.simulator --again FOLDER

Two pieces of a real trace (Azure's or Mooncake's; see docs/simulator.md) are played to a pool on this machine that has
memory for two models of six, and both are recorded with `modelpool record`. What steps cost, and how long requests
take, is taken from the first recording; with that the simulator foretells the waits of the second one, of which it is
told when which model was asked for and nothing else. `--again` foretells anew from recordings that were kept.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import msgspec

from benchmarks.cold_start import Pool, eventually, pool, say
from benchmarks.machine import Machine, Watch, commit
from benchmarks.report import table
from benchmarks.routers import end_on_sigterm
from modelpool.cli.simulate import SCENARIO_SUFFIX
from modelpool.manager.policy import policy_of
from modelpool.settings import load
from modelpool.simulator.report import quantile
from modelpool.simulator.scenario import Scenario, read_scenario
from modelpool.simulator.simulation import Gateway, Simulation
from modelpool.simulator.trace import Arrival, model_names, read_trace, spread
from modelpool.testing.tiny_models import make_text_model

MODELS, AWAKE = 6, 2
SPAN_S, PLAYED_S, EVERY = 600.0, 165.0, 15
"""So much of the trace is played in so many seconds, and of its requests one of so many."""
BEGINS_S = {"first": 1080.0, "second": 1680.0}
"""Where in the trace the pieces begin."""
SETTINGS = {"MODEL_IDLE_SLEEP_1": "20", "MODEL_IDLE_SLEEP_2": "40", "MODEL_IDLE_UNLOAD": "90"}
"""Idle times that fit into the time played; all else is as it is by default."""
NEEDS_GB, HOST_GB = 1.0, 3.2
"""Awake a model has so much of the declared accelerator, asleep nothing; the machine's memory is for about five."""
ENGINE = {"enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
SEEDS = 21
LIMIT = 0.25
WAITED_S = 0.1
_TOKENS_IN, _TOKENS_OUT = 400, 256
_IN_SHARE = 16
_RESULTS = Path(__file__).parent / "results" / "simulator.md"


class Waits(msgspec.Struct, frozen=True, kw_only=True):
    """Of the requests that were answered, in seconds. `waited`: those that waited for more than a tenth of one."""

    requests: int
    waited: int
    p50: float
    p95: float
    """Of those that waited."""
    p95_of_all: float
    mean: float


class Results(msgspec.Struct, frozen=True, kw_only=True):
    when: str
    commit: str
    machine: Machine
    trace: str
    fitted: Waits
    """Of the recording that the costs are from: measured."""
    fitted_again: Waits
    """And simulated."""
    measured: Waits
    foretold: Waits
    starts: float
    wakes: float
    """Of the second run, as foretold."""

    @property
    def off(self) -> dict[str, float]:
        """By how much of the measured figure the foretold one differs."""
        return {
            name: getattr(self.foretold, name) / getattr(self.measured, name) - 1
            for name in ("p50", "p95", "p95_of_all")
        }


# ------------------------------------------------------------ the real pool


def piece(trace: Sequence[Arrival], begins_s: float) -> list[Arrival]:
    """Arrivals of a part of the trace, in the time and number that this machine is for, spread over the models."""
    part = [each for each in trace if begins_s <= each.time < begins_s + SPAN_S][::EVERY]
    scaled = [msgspec.structs.replace(each, time=(each.time - begins_s) * PLAYED_S / SPAN_S) for each in part]
    return spread(scaled, MODELS, seed=int(begins_s))


async def play(url: str, key: str, arrivals: Sequence[Arrival]) -> None:
    """Each request at its time, however many wait."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers={"Authorization": key}, timeout=600, limits=limits, trust_env=False
    ) as client:
        begun = time.monotonic()

        async def ask(arrival: Arrival) -> None:
            await asyncio.sleep(begun + arrival.time - time.monotonic())
            body = {
                "model": arrival.model,
                "prompt": [7] * max(1, min(_TOKENS_IN, (arrival.tokens_in or 0) // _IN_SHARE)),
                "max_tokens": max(1, min(_TOKENS_OUT, arrival.tokens_out or 0)),
                "ignore_eos": True,
                "temperature": 0,
            }
            answer = await client.post("/v1/completions", json=body)
            answer.raise_for_status()

        async with asyncio.TaskGroup() as requests:
            for each in arrivals:
                requests.create_task(ask(each))


@contextmanager
def recording(home: Path, trace: Path) -> Iterator[None]:
    """`modelpool record` runs, and has recorded all at the end."""
    command = [sys.executable, "-m", "modelpool.cli", "record", "--for", "1h", str(trace)]
    with subprocess.Popen(command, env={**os.environ, "MODELPOOL_HOME": str(home)}) as process:
        eventually(trace.exists)
        try:
            yield
            time.sleep(3)  # it asks once a second what has ended
        finally:
            process.terminate()
    if process.returncode:
        raise RuntimeError("nothing was recorded")


def rest(running: Pool) -> None:
    """Unload all models, and wait until nothing is to be done any more."""

    def unloaded() -> bool:
        models = running.gateway.get("/admin/status").json()["models"]
        for instance in (each["instance"] for model in models for each in model["instances"]):
            running.worker.post(f"/instances/{instance}/sleep", json={"level": 3})
        return all(not each["instances"] and each["decision"].startswith("none:") for each in models)

    eventually(unloaded)


def warm_up(running: Pool, folder: Path) -> None:
    """Each model takes every step of the ladder, so that what this costs is known."""
    for number, name in enumerate(model_names(MODELS)):
        body = {
            "alias": name,
            "model_name": str(make_text_model(folder / name, seed=number)),
            "gpu_memory_gb": NEEDS_GB,
            "engine_args": ENGINE,
            "max_replicas": 1,
        }
        running.gateway.post("/admin/models/register", json=body).raise_for_status()
    for name in model_names(MODELS):
        running.alias = name
        for level in (1, 2, 3):
            running.first_token()
            running.sleep(level)


def record_both(trace: Path, folder: Path) -> None:
    """Two runs, each of a pool that begins with all models unloaded, into `first.csv` and `second.csv`."""
    arrivals = read_trace(trace)
    devices = folder / "devices.yaml"
    devices.write_text(f"{{host_gb: {HOST_GB}, devices: [{{gb: {AWAKE * NEEDS_GB + NEEDS_GB / 10}}}]}}")
    environ = {**SETTINGS, "MODELPOOL_FAKE_DEVICES": str(devices)}
    with pool(folder, **environ) as running:
        say("each model once")
        warm_up(running, folder)
    for name, begins_s in BEGINS_S.items():
        with pool(folder, **environ) as running:
            part = piece(arrivals, begins_s)
            say(f"the {name} run: {len(part)} requests in {PLAYED_S:.0f} s")
            with recording(folder / "home", folder / f"{name}.csv"):
                key = running.gateway.headers["authorization"]
                asyncio.run(play(str(running.gateway.base_url), key, part))
            rest(running)


# ------------------------------------------------------------ what is foretold


def foretell(arrivals: Sequence[Arrival], costs: Scenario) -> tuple[Waits, float, float]:
    """The median of each figure over some seeds; starts and wakes."""
    settings = load(SETTINGS)
    gateway = Gateway(max_wait_s=settings.gateway.waiting_max_s, drain_s=settings.worker.drain_timeout_s)
    bare = [Arrival(time=each.time, model=each.model) for each in arrivals]
    outcomes = [
        Simulation(costs, bare, policy=policy_of(settings), gateway=gateway, seed=seed).run() for seed in range(SEEDS)
    ]
    found = [waits([each.wait_s for each in outcome.served if not each.refused]) for outcome in outcomes]
    figures = {name: statistics.median_high(getattr(each, name) for each in found) for name in Waits.__struct_fields__}
    starts = statistics.median(each.starts for each in outcomes)
    return Waits(**figures), starts, statistics.median(sum(each.wakes.values()) for each in outcomes)


def waits(seconds: Sequence[float]) -> Waits:
    ordered = sorted(seconds)
    waited = [each for each in ordered if each > WAITED_S]
    return Waits(
        requests=len(ordered),
        waited=len(waited),
        p50=quantile(waited, 0.5),
        p95=quantile(waited, 0.95),
        p95_of_all=quantile(ordered, 0.95),
        mean=statistics.fmean(ordered),
    )


def measured(arrivals: Sequence[Arrival]) -> Waits:
    """As it was recorded."""
    return waits([each.wait_s or 0.0 for each in arrivals if each.status == 200])


def judge(folder: Path, machine: Machine, trace: str) -> Results:
    """What the second recording shows, beside what is foretold with the costs of the first."""
    first, second = (read_trace(folder / f"{name}.csv") for name in BEGINS_S)
    costs = read_scenario((folder / "first.csv").with_suffix(SCENARIO_SUFFIX))
    foretold, starts, wakes = foretell(second, costs)
    return Results(
        when=datetime.now().strftime("%Y-%m-%d %H:%M"),
        commit=commit(),
        machine=machine,
        trace=trace,
        fitted=measured(first),
        fitted_again=foretell(first, costs)[0],
        measured=measured(second),
        foretold=foretold,
        starts=starts,
        wakes=wakes,
    )


def report(results: Results) -> str:
    machine = results.machine
    rows = [
        _cells("first run, measured", results.fitted),
        _cells("first run, simulated", results.fitted_again),
        _cells("second run, measured", results.measured),
        _cells("second run, foretold", results.foretold),
    ]
    about = (
        f"{results.when}, commit {results.commit}, Python {machine.python}, {machine.cores} cores of "
        f"{machine.processor}, of which others took {machine.others:.0%} meanwhile. {results.trace}. {MODELS} models, "
        f"memory for {AWAKE}. Seconds from a request's arrival until an instance has it; p50 and p95 are of those that "
        f"waited for more than {WAITED_S:g} s. Simulated: medians of {SEEDS} seeds."
    )
    off = {name: f"{share:+.0%}" for name, share in results.off.items()}
    verdict = "within" if all(abs(each) <= LIMIT for each in results.off.values()) else "not within"
    said = (
        f"Foretold and measured differ by {off['p50']} (p50), {off['p95']} (p95), {off['p95_of_all']} (p95 of all): "
        f"{verdict} {LIMIT:.0%}. Foretold for the second run: {results.starts:.0f} starts, {results.wakes:.0f} wakes."
    )
    head = ["what", "requests", "waited", "p50", "p95", "p95 of all", "mean of all"]
    return "\n".join([textwrap.fill(about, 120), "", table(head, rows), "", textwrap.fill(said, 120)])


def _cells(what: str, found: Waits) -> list[str]:
    seconds = (found.p50, found.p95, found.p95_of_all, found.mean)
    return [what, str(found.requests), str(found.waited), *(f"{each:.2f}" for each in seconds)]


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?", help="Azure's CSV or Mooncake's JSON lines")
    parser.add_argument("--keep", type=Path, help="a folder that the recordings stay in")
    parser.add_argument("--again", type=Path, help="the folder of recordings that were kept: no pool is run")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="the Markdown file that is written")
    given = parser.parse_args()
    if (given.trace is None) == (given.again is None):
        parser.error("give a trace, or --again and a folder")
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="modelpool-bench-") as name:
        folder = given.again or given.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if given.trace is not None:
            (folder / "trace").write_text(given.trace.name)
            record_both(given.trace, folder)
        results = judge(folder, watch.machine(), (folder / "trace").read_text())
    text = report(results)
    print(text)
    given.out.write_text(f"# Foretold waits\n\nWritten by `python -m benchmarks.simulator`.\n\n{text}\n")
    sys.exit(any(abs(each) > LIMIT for each in results.off.values()))


if __name__ == "__main__":
    main()
