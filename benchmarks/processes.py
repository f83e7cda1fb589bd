"""What a second gateway process brings.

    python -m benchmarks.processes [--processes 2] [--rounds 5]

The gateway as one process and as several on one port, in turns, under the same plain requests. Where there are cores
for all, requests a second say it. On fewer cores the clients and engines of the benchmark take a good part of them; so
CPU is counted for each process, and the figure that stands is how many more requests a second the gateway could carry
until its busiest process fills a core: CPU of a request with one process, over the busiest one's part of it with
several. That counts what they cost each other (shared counters) and how evenly the kernel spreads connections.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarks.gateway import load
from benchmarks.machine import Watch, cpu_seconds
from benchmarks.report import table
from benchmarks.routers import Running, Upstreams, gateways, upstreams
from modelpool.home import Home

CONNECTIONS = 256
SECONDS = 3.0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One round. Microseconds of CPU for each request."""

    per_second: float
    gateways_us: list[float]
    clients_us: float
    engines_us: float

    @property
    def gateway_us(self) -> float:
        return sum(self.gateways_us)


def measure(running: Running, engines: Upstreams) -> Measured:
    load(running, CONNECTIONS, SECONDS / 6)
    groups = [*((each,) for each in running.processes), engines.processes]
    before = [cpu_seconds(each) for each in groups]
    seen = load(running, CONNECTIONS, SECONDS)
    spent = [cpu_seconds(each) - was for each, was in zip(groups, before, strict=True)]
    *own, engine = (seconds / seen.requests * 1e6 for seconds in spent)
    return Measured(
        per_second=seen.requests / seen.seconds,
        gateways_us=own,
        clients_us=seen.cpu_s / seen.requests * 1e6,
        engines_us=engine,
    )


def run(processes: int, rounds: int) -> tuple[list[Measured], list[Measured]]:
    """Rounds with one process, and with several."""
    one, several = [], []
    with tempfile.TemporaryDirectory(prefix="modelpool-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        homes = Home(folder / "one"), Home(folder / "several")
        engines = [stack.enter_context(upstreams(folder, control=home.control_socket)) for home in homes]
        alone = stack.enter_context(gateways(homes[0].path))
        together = stack.enter_context(gateways(homes[1].path, processes))
        for _ in range(rounds):
            one.append(measure(alone, engines[0]))
            several.append(measure(together, engines[1]))
    return one, several


def ratio(one: list[Measured], several: list[Measured]) -> float:
    """How many times the requests until the busiest process fills its core: the median of the rounds."""
    ratios = sorted(alone.gateway_us / max(together.gateways_us) for alone, together in zip(one, several, strict=True))
    return ratios[len(ratios) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    watch = Watch()
    one, several = run(given.processes, given.rounds)

    def row(name: str, rounds: list[Measured]) -> list[str]:
        median = sorted(rounds, key=lambda each: each.gateway_us)[len(rounds) // 2]
        parts = " + ".join(f"{each:.1f}" for each in median.gateways_us)
        fastest = max(each.per_second for each in rounds)
        return [name, parts, f"{median.clients_us:.1f}", f"{median.engines_us:.1f}", f"{fastest:,.0f}"]

    head = ["gateway processes", "their CPU µs a request", "clients' µs", "engines' µs", "requests/s"]
    print(table(head, [row("1", one), row(str(given.processes), several)]))
    machine = watch.machine()
    print(f"\nuntil the busiest process fills a core: {ratio(one, several):.2f} times the requests of one process")
    print(f"{os.cpu_count()} cores of {machine.processor}, of which others took {machine.others:.0%}")


if __name__ == "__main__":
    main()
