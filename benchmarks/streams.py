"""Many streams at once through one gateway process: is each byte right, what memory do they take, who else suffers?

    python -m benchmarks.streams [--streams 9000] [--seconds 60]

Each stream has a chunk of 200 bytes a second, different from all others. Clients, engines and the gateway are processes
apart. Meanwhile another client sends plain requests, one after the other on a few connections.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from benchmarks.gateway import held, load
from benchmarks.hold import Held
from benchmarks.load import Measured
from benchmarks.machine import Machine, Watch, cpu_seconds, pss_bytes
from benchmarks.routers import Running, end_on_sigterm, gateways, upstreams
from modelpool.home import Home

A_CLIENT = 4500
"""Streams of one client process, so that checking them does not fill its core."""
OPENED_A_SECOND = 500
"""Streams run for longer by the time that opening them may take, so that all are open for the whole time."""
OTHERS, PAUSE_S = 4, 0.02
MARGIN_S = 1.0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the streams, and what they took of the gateway."""

    streams: int
    complete: int
    """Ended as they should, with each byte as it should be."""
    wrong: int
    bytes: int
    all_open_s: float
    """For how long all of them were open at once."""
    late_p50_s: float
    late_p99_s: float
    """How much later than its pace a stream's latest chunk came, over the streams."""
    stream_bytes: float
    """By how much the gateway's memory (PSS) grew with each stream, at most."""
    cpu_share: float
    """Of one core, that the gateway took while all were open."""
    others: Measured
    """Plain requests meanwhile."""
    machine: Machine

    def text(self) -> str:
        others, machine = self.others, self.machine
        return "\n".join(
            (
                f"{self.complete} of {self.streams} streams complete, {self.wrong} with a wrong byte, "
                f"{self.bytes / 1e6:.0f} MB; all open at once for {self.all_open_s:.0f} s",
                f"gateway: {self.stream_bytes / 1e3:.1f} KB a stream, {self.cpu_share:.0%} of a core",
                f"latest chunk of a stream: p50 {self.late_p50_s * 1e3:.0f}, p99 {self.late_p99_s * 1e3:.0f} ms late",
                f"{others.requests} other requests: p50 {others.p50_us / 1e3:.1f}, p99 {others.p99_us / 1e3:.1f}, "
                f"p99.9 {others.p999_us / 1e3:.1f} ms",
                f"{machine.cores} cores of {machine.processor}; others took {machine.others:.0%} of them",
            )
        )


class Peak:
    """The most memory that processes took, looked at twice a second."""

    def __init__(self, running: Running) -> None:
        self.bytes = 0
        self._running = running
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.5):
            self.bytes = max(self.bytes, pss_bytes(self._running.processes))


def run(streams: int, seconds: float) -> Outcome:
    """Raises RuntimeError if connections cannot be opened, or another request failed."""
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="modelpool-bench-") as name, ExitStack() as stack:
        home = Home(Path(name) / "home")
        stack.enter_context(upstreams(Path(name), control=home.control_socket))
        running = stack.enter_context(gateways(home.path))
        load(running, OTHERS, 0.3)
        before = pss_bytes(running.processes)
        with Peak(running) as peak:
            with opened(running.port, streams, round(seconds + MARGIN_S + streams / OPENED_A_SECOND)) as clients:
                cpu, since = cpu_seconds(running.processes), time.monotonic()
                others = load(running, OTHERS, seconds - MARGIN_S, pause=PAUSE_S)
                cpu_share = (cpu_seconds(running.processes) - cpu) / (time.monotonic() - since)
                ends = [_end(client) for client in clients]
    return Outcome(
        streams=streams,
        complete=sum(each.complete for each in ends),
        wrong=sum(each.wrong for each in ends),
        bytes=sum(each.bytes for each in ends),
        all_open_s=min(each.closed_at for each in ends) - max(each.opened_at for each in ends),
        late_p50_s=max(each.late_p50_s for each in ends),
        late_p99_s=max(each.late_p99_s for each in ends),
        stream_bytes=(peak.bytes - before) / streams,
        cpu_share=cpu_share,
        others=others,
        machine=watch.machine(),
    )


@contextmanager
def opened(port: int, streams: int, chunks: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """That many streams, all open, held by as many client processes as they need."""
    with ExitStack() as stack:
        firsts = range(0, streams, A_CLIENT)
        yield [
            stack.enter_context(held(port, min(A_CLIENT, streams - first), chunks=chunks, first=first))
            for first in firsts
        ]


def _end(client: subprocess.Popen[bytes]) -> Held:
    assert client.stdout is not None
    return msgspec.json.decode(client.stdout.read(), type=Held)


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=9000)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    outcome = run(given.streams, given.seconds)
    print(outcome.text())
    sys.exit(outcome.complete != outcome.streams)


if __name__ == "__main__":
    main()
