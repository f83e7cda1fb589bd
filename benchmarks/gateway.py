"""What the gateway costs beside what else one could put there: CPU, latency added, memory.

    python -m benchmarks.gateway [--quick] [--rivals FOLDER] [--out FOLDER]

One upstream that listens as eight engines and answers at once; the gateway as it runs in a pool (its own process, keys
on, routing over all eight); the bare pass-through of benchmarks/passthrough.py; and what is found of HAProxy, nginx,
vllm-router, sglang-router and LiteLLM, in FOLDER (also MODELPOOL_BENCH_RIVALS; `make rivals` fills benchmarks/.rivals)
or on the PATH. The same load from another process, one router after the other, in rounds over all of them, of which the
best counts. CPU is that of the router's processes only, so that a busy machine matters little; latency is at its mercy.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import msgspec

from benchmarks.keys import KEY, LIMITED
from benchmarks.load import Measured
from benchmarks.machine import Watch, commit, cpu_seconds, pss_bytes
from benchmarks.pace import CHUNKS
from benchmarks.picture import picture
from benchmarks.report import DIRECT, USUAL, Load, Memory, Results, Row, best, report
from benchmarks.routers import OURS, OURS_LIMITED, Running, end_on_sigterm, routers, upstreams
from modelpool import __version__
from modelpool.home import Home

CONNECTIONS = {Load.PLAIN: (1, 16, 64, 256), Load.STREAM: (1, 16, 64, 256), Load.PACED: (USUAL[Load.PACED],)}
SLOW = frozenset({"LiteLLM"})
"""Takes milliseconds for a request: one round, and fewer connections, or nothing would be measured but its queue."""
SETTLE_S = 0.5
PACE_S = 0.01
_STREAMS = {Load.PLAIN: [], Load.STREAM: ["--stream"], Load.PACED: ["--stream", "--every", str(PACE_S)]}
_HERE = Path(__file__).parent
_TITLE = """# What the gateway costs

Written by `make bench`.

![The figures as bars](gateway.svg)

"""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How long everything takes."""

    rounds: int
    seconds: float
    held: int


FULL = Plan(rounds=4, seconds=0.9, held=1000)
QUICK = Plan(rounds=1, seconds=0.4, held=300)


def load(
    running: Running, connections: int, seconds: float, kind: Load = Load.PLAIN, *, pause: float = 0.0
) -> Measured:
    """Run a load from a process of its own. Raises RuntimeError if a request failed."""
    command = [sys.executable, "-m", "benchmarks.load", "--key", running.key, "--port", str(running.port)]
    command += ["--connections", str(connections), "--seconds", str(seconds), "--pause", str(pause), *_STREAMS[kind]]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    measured = msgspec.json.decode(done.stdout, type=Measured)
    if measured.failures:
        raise RuntimeError(f"{measured.failures} of {measured.requests} requests failed")
    return measured


@contextmanager
def held(port: int, count: int, *, chunks: int = 0, first: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """So many connections, all open: idle, or streams of so many chunks, one a second."""
    command = [sys.executable, "-m", "benchmarks.hold", "--key", KEY, "--port", str(port)]
    command += ["--count", str(count), "--chunks", str(chunks), "--first", str(first)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            if not holder.stdout.readline():
                raise RuntimeError(f"{count} connections could not be opened")
            yield holder
        finally:
            holder.communicate()


def checked(name: str, running: Running) -> bool:
    """Whether it refuses a wrong key. Raises RuntimeError if it does not do what it is measured at."""
    url = f"http://127.0.0.1:{running.port}/v1/chat/completions"
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    with httpx.Client(timeout=60, trust_env=False) as client:
        right, wrong = ({"Authorization": f"Bearer {key}"} for key in (running.key, "wrong"))
        plain = client.post(url, json=body, headers=right)
        stream = client.post(url, json={**body, "stream": True}, headers=right)
        if plain.status_code != 200 or not CHUNKS < stream.text.count("data: ") <= CHUNKS + 2:
            raise RuntimeError(f"{name} does not pass requests: {plain.status_code} {plain.text} {stream.text}")
        return client.post(url, json=body, headers=wrong).status_code != 200


def measure(name: str, running: Running, kind: Load, connections: int, seconds: float) -> Row:
    load(running, connections, seconds / 8, kind)  # warm: connections open, code paths seen
    before = cpu_seconds(running.processes)
    measured = load(running, connections, seconds, kind)
    cpu_us = (cpu_seconds(running.processes) - before) / measured.requests * 1e6
    return Row(
        router=name,
        load=kind,
        connections=connections,
        requests=measured.requests,
        cpu_us=cpu_us,
        median_cpu_us=cpu_us,
        p50_us=measured.p50_us,
        p99_us=measured.p99_us,
        p999_us=measured.p999_us,
        per_second=measured.requests / measured.seconds,
        segments=measured.segments / measured.requests,
    )


def memory(name: str, running: Running, plan: Plan) -> Memory:
    """Before any load has filled its heaps. Idle connections stay while streams come, so that both are growth."""
    count = plan.held // 10 if name in SLOW else plan.held
    load(running, 4, 0.2)
    load(running, 4, 0.2, Load.STREAM)
    start = _settled(running)
    with held(running.port, count):
        idle = _settled(running)
        with held(running.port, count, chunks=3600):
            stream = _settled(running)
    return Memory(router=name, count=count, start=start, idle=(idle - start) / count, stream=(stream - idle) / count)


def _settled(running: Running) -> int:
    time.sleep(SETTLE_S)
    return pss_bytes(running.processes)


def measure_all(running: Mapping[str, Running], plan: Plan) -> list[Row]:
    rows = []
    for number in range(plan.rounds):
        for kind, several in CONNECTIONS.items():
            for connections in several:
                for name, each in running.items():
                    if name not in SLOW or (number == 0 and connections <= USUAL[kind]):
                        rows.append(measure(name, each, kind, connections, plan.seconds))
    return best(rows)


def run(plan: Plan, rivals: Path | None) -> Results:
    """Start all that is there, measure it, end it."""
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="modelpool-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        home = Home(folder / "home")
        engines = stack.enter_context(upstreams(folder, control=home.control_socket))
        found, missing = routers(engines, home, folder, rivals)
        running = {}
        for router, each in found.items():
            say(f"starting {router}")
            running[router] = stack.enter_context(each.start())
        running[OURS_LIMITED] = running[OURS]._replace(key=LIMITED)
        keyed = {router: checked(router, each) for router, each in running.items()}
        say("measuring memory")
        sizes = [memory(router, running[router], plan) for router in found]
        say(f"measuring CPU and latency, {plan.rounds} rounds")
        rows = measure_all({DIRECT: Running(engines.ports[0], engines.processes), **running}, plan)
        versions = {OURS: __version__, OURS_LIMITED: "", **{router: each.version for router, each in found.items()}}
    return Results(
        ours=OURS,
        when=datetime.now().strftime("%Y-%m-%d %H:%M"),
        commit=commit(),
        machine=watch.machine(),
        rounds=plan.rounds,
        versions=versions,
        keyed=keyed,
        missing=missing,
        rows=rows,
        memory=sizes,
    )


def say(what: str) -> None:
    print(f"{what} …", file=sys.stderr, flush=True)


def write(results: Results, folder: Path) -> None:
    """Into `gateway.md`, `gateway.svg` and `gateway.json` there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gateway.md").write_text(_TITLE + report(results) + "\n")
    (folder / "gateway.svg").write_text(picture(results))
    (folder / "gateway.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)))


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one short round: figures are rough, and kept only with --out"
    )
    parser.add_argument(
        "--rivals", type=Path, default=Path(os.environ.get("MODELPOOL_BENCH_RIVALS", _HERE / ".rivals"))
    )
    parser.add_argument("--out", type=Path, help="where the results go (default: benchmarks/results)")
    given = parser.parse_args()
    results = run(QUICK if given.quick else FULL, given.rivals)
    print(report(results))
    if given.out or not given.quick:
        write(results, given.out or _HERE / "results")


if __name__ == "__main__":
    main()
