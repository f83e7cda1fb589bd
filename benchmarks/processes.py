"""What a second gateway process brings.

    python -m benchmarks.processes [--processes 2] [--rounds 5]

The gateway as one process and as several on one port, in turns, under the same plain requests. Where there are cores
for all, requests a second say it. On fewer cores the clients and engines of the benchmark take a good part of them, and
whoever else is there. So the figure that stands is made of what does not depend on that: CPU of a request with one
process, over CPU of a request with several times the part of the connections that the kernel gave to the process with
most. That is how many times the requests of one process they carry until the first of them fills a core; it counts what
they cost each other and how evenly connections are spread.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from benchmarks.gateway import load
from benchmarks.machine import Watch, cpu_seconds
from benchmarks.report import table
from benchmarks.routers import Running, Upstreams, end_on_sigterm, gateways, upstreams
from modelpool.home import Home

CONNECTIONS = 256
SECONDS = 3.0


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One round. Microseconds of CPU for each request; `most` is the part of the connections that one process has."""

    per_second: float
    gateway_us: float
    clients_us: float
    engines_us: float
    most: float


def most_of(running: Running) -> float:
    """Which part of so many connections the kernel gives to the process that gets most."""
    before = [process.num_fds() for process in running.processes]
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        for _ in range(100):
            taken = [process.num_fds() - was for process, was in zip(running.processes, before, strict=True)]
            if sum(taken) >= CONNECTIONS:
                return max(taken) / sum(taken)
            time.sleep(0.05)
    raise RuntimeError(f"of {CONNECTIONS} connections {taken} were taken")


def measure(running: Running, engines: Upstreams) -> Measured:
    most = most_of(running)
    load(running, CONNECTIONS, SECONDS / 6)
    groups = running.processes, engines.processes
    before = [cpu_seconds(each) for each in groups]
    seen = load(running, CONNECTIONS, SECONDS)
    gateway, engine = (cpu_seconds(each) - was for each, was in zip(groups, before, strict=True))
    return Measured(
        per_second=seen.requests / seen.seconds,
        gateway_us=gateway / seen.requests * 1e6,
        clients_us=seen.cpu_s / seen.requests * 1e6,
        engines_us=engine / seen.requests * 1e6,
        most=most,
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
    """How many times the requests, until the first process fills its core: the median of the rounds."""
    pairs = zip(one, several, strict=True)
    ratios = sorted(alone.gateway_us / (together.gateway_us * together.most) for alone, together in pairs)
    return ratios[len(ratios) // 2]


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    watch = Watch()
    one, several = run(given.processes, given.rounds)

    def row(name: str, rounds: list[Measured]) -> list[str]:
        median = sorted(rounds, key=lambda each: each.gateway_us)[len(rounds) // 2]
        figures = median.gateway_us, median.clients_us, median.engines_us
        fastest = max(each.per_second for each in rounds)
        return [name, *(f"{each:.1f}" for each in figures), f"{median.most:.0%}", f"{fastest:,.0f}"]

    head = ["gateway processes", "CPU µs a request", "clients' µs", "engines' µs", "connections of one", "requests/s"]
    print(table(head, [row("1", one), row(str(given.processes), several)]))
    machine = watch.machine()
    print(f"\nuntil the first process fills a core: {ratio(one, several):.2f} times the requests of one process")
    print(f"{os.cpu_count()} cores of {machine.processor}, of which others took {machine.others:.0%}")


if __name__ == "__main__":
    main()
