"""What the gateway costs: CPU per request and latency added, beside what else one could put there.

    python -m benchmarks.gateway [--quick] [--json FILE]

One upstream that answers at once; the gateway as it runs in a pool (its own process, API key on, eight instances); the
bare pass-through of benchmarks/passthrough.py; HAProxy and nginx where they are installed. The same load from another
process, in rounds over all routers, of which the best counts. CPU is that of the routing process only, so that a busy
machine matters little.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psutil

from benchmarks.load import Measured
from benchmarks.routers import KEY, routers
from modelpool.home import Home

CONNECTIONS = (1, 16)
DIRECT = "(no router)"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One router under one load. Microseconds; latency is what the client saw."""

    router: str
    stream: bool
    connections: int
    cpu_us: float
    p50_us: float
    p99_us: float
    per_second: float


def load(port: int, connections: int, requests: int, *, stream: bool) -> Measured:
    command = [sys.executable, "-m", "benchmarks.load", "--key", KEY, "--port", str(port)]
    command += ["--connections", str(connections), "--requests", str(requests)]
    done = subprocess.run([*command, *(["--stream"] if stream else [])], stdout=subprocess.PIPE, check=True)
    measured = msgspec.json.decode(done.stdout, type=Measured)
    if measured.failures:
        raise RuntimeError(f"{measured.failures} of {measured.requests} requests failed")
    return measured


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(name: str, port: int, process: psutil.Process, *, stream: bool, connections: int, requests: int) -> Row:
    load(port, connections, requests // 10, stream=stream)  # warm: connections open, code paths seen
    before = cpu_seconds(process)
    measured = load(port, connections, requests, stream=stream)
    return Row(
        router=name,
        stream=stream,
        connections=connections,
        cpu_us=(cpu_seconds(process) - before) / measured.requests * 1e6,
        p50_us=measured.p50_us,
        p99_us=measured.p99_us,
        per_second=measured.requests / measured.seconds,
    )


def run(*, requests: int, rounds: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="modelpool-bench-") as folder, ExitStack() as stack:
        home = Home(Path(folder))
        command = [sys.executable, "-m", "benchmarks.upstream", "--control", str(home.control_socket)]
        engine = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stack.callback(engine.terminate)
        assert engine.stdout is not None
        upstream = int(engine.stdout.readline())
        running = {DIRECT: (upstream, psutil.Process(engine.pid))}
        for name, start in routers(upstream, Path(folder)).items():
            running[name] = stack.enter_context(start())
        for _ in range(rounds):
            for stream in (False, True):
                for connections in CONNECTIONS:
                    for name, (port, process) in running.items():
                        count = requests // 8 if stream else requests
                        rows.append(
                            measure(name, port, process, stream=stream, connections=connections, requests=count)
                        )
    return rows


def best(rows: Iterable[Row]) -> list[Row]:
    """Of several rounds the least of each figure: what disturbs a measurement only ever adds to it."""
    by_load: dict[tuple[str, bool, int], list[Row]] = {}
    for row in rows:
        by_load.setdefault((row.router, row.stream, row.connections), []).append(row)
    return [
        msgspec.structs.replace(
            same[0],
            cpu_us=min(row.cpu_us for row in same),
            p50_us=min(row.p50_us for row in same),
            p99_us=min(row.p99_us for row in same),
            per_second=max(row.per_second for row in same),
        )
        for same in by_load.values()
    ]


def table(rows: Iterable[Row]) -> str:
    """As text: per load, CPU and added latency, and their ratio to the bare pass-through's CPU."""
    lines = [f"{'router':<18} {'CPU µs':>8} {'× bare':>7} {'added p50 µs':>13} {'added p99 µs':>13} {'requests/s':>11}"]
    rows = list(rows)
    for stream in (False, True):
        for connections in CONNECTIONS:
            same = {row.router: row for row in rows if (row.stream, row.connections) == (stream, connections)}
            direct, bare = same[DIRECT], same["bare pass-through"]
            what = "64-chunk stream" if stream else "plain request"
            lines.append(f"\n{what}, {connections} connection{'s' if connections > 1 else ''}")
            for name, row in same.items():
                if name != DIRECT:
                    lines.append(
                        f"{name:<18} {row.cpu_us:>8.0f} {row.cpu_us / bare.cpu_us:>7.2f} "
                        f"{row.p50_us - direct.p50_us:>13.0f} {row.p99_us - direct.p99_us:>13.0f} "
                        f"{row.per_second:>11.0f}"
                    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round: figures are rough")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    given = parser.parse_args()
    rows = best(run(requests=2_000, rounds=1) if given.quick else run(requests=16_000, rounds=3))
    print(table(rows))
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))


if __name__ == "__main__":
    main()
