"""What was measured, and as a table: in Markdown, aligned so that it reads as text too."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec

from benchmarks.machine import Machine

DIRECT = "(no router)"
_ABOUT = """\
CPU is that of the router's processes; × is the ratio to Model Pool's; `key`: whether it refuses a wrong one; `limits`:
with a key whose requests, tokens and concurrency are limited. A paced
stream has a chunk every 10 ms, the other streams' chunks come at once; `pieces` says in how many reads they came."""
FEW = 1000
"""Below so many requests there is no 99.9th percentile."""


class Load(StrEnum):
    """What is asked for."""

    PLAIN = "plain request"
    STREAM = "64-chunk stream"
    """All chunks at once, so that a router joins those that it has not passed on yet: fewer pieces, less work."""
    PACED = "paced 64-chunk stream"
    """A chunk every 10 ms, as engines do it: 64 pieces, whatever the router and however busy the machine."""


USUAL = {Load.PLAIN: 16, Load.STREAM: 16, Load.PACED: 64}
"""The number of connections whose CPU figures stand for a router's."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One router under one load. Microseconds; latency is what the client saw."""

    router: str
    load: Load
    connections: int
    requests: int
    cpu_us: float
    median_cpu_us: float
    """Of several rounds, the middle one."""
    p50_us: float
    p99_us: float
    p999_us: float
    per_second: float
    segments: float
    """In how many pieces an answer came."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """By how much the router's memory (PSS) grew, in bytes, with each of `count` connections."""

    router: str
    count: int
    start: int
    """All of its memory, before."""
    idle: float
    stream: float


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `versions` has the routers in the order of the tables; `ours` is the one that the others are held to."""

    ours: str
    when: str
    commit: str
    machine: Machine
    rounds: int
    versions: dict[str, str]
    keyed: dict[str, bool]
    """Whether it refused a wrong key."""
    missing: list[str]
    rows: list[Row]
    memory: list[Memory]

    def row(self, router: str, load: Load, connections: int = 0) -> Row | None:
        """With the usual number of connections, if none is given. Slow routers are not put under every load."""
        wanted = router, load, connections or USUAL[load]
        return next((row for row in self.rows if (row.router, row.load, row.connections) == wanted), None)

    def memory_of(self, router: str) -> Memory | None:
        return next((each for each in self.memory if each.router == router), None)

    def added_us(self, row: Row, share: str) -> float:
        """By how much a percentile (`p50_us`, …) of the latency exceeds the one without a router."""
        direct = self.row(DIRECT, row.load, row.connections)
        return float(getattr(row, share) - getattr(direct, share))

    @property
    def connections(self) -> list[int]:
        return sorted({row.connections for row in self.rows if row.load is Load.PLAIN})

    @property
    def routers(self) -> list[str]:
        return list(self.versions)


class Aim(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of ours may be at most `limit` times a rival's. `median`: of the rounds, where it was looked at."""

    rival: str
    what: str
    ratio: float
    limit: float
    median: float | None = None


def best(rows: Iterable[Row]) -> list[Row]:
    """Of several rounds the least of each figure: what disturbs a measurement mostly adds to it.

    Not to the CPU of streams: a router that has to wait for a core joins chunks, which is less work. So of paced ones
    only those rounds count whose answers came in about as many pieces as in any; of the others, whose chunks are always
    joined, the median tells how far the least can be trusted.
    """
    by_load: dict[tuple[str, Load, int], list[Row]] = {}
    for row in rows:
        by_load.setdefault((row.router, row.load, row.connections), []).append(row)
    return [_best(same) for same in by_load.values()]


def _best(same: Sequence[Row]) -> Row:
    most = max(row.segments for row in same) if same[0].load is Load.PACED else 0.0
    chosen = min((row for row in same if row.segments >= 0.9 * most), key=lambda row: row.cpu_us)
    return msgspec.structs.replace(
        chosen,
        median_cpu_us=statistics.median(row.cpu_us for row in same),
        requests=min(row.requests for row in same),
        p50_us=min(row.p50_us for row in same),
        p99_us=min(row.p99_us for row in same),
        p999_us=min(row.p999_us for row in same),
        per_second=max(row.per_second for row in same),
    )


def aims(results: Results) -> list[Aim]:
    """What Model Pool promises beside the routers that are written in Rust, as far as those were measured."""
    found: list[Aim] = []
    for rival, plain_limit in (("vllm-router", 0.5), ("sglang-router", 0.55)):
        for load, limit in ((Load.PLAIN, plain_limit), (Load.STREAM, 0.4)):
            ours, theirs = (results.row(name, load) for name in (results.ours, rival))
            if ours and theirs:
                what = f"CPU of a {load}"
                ratio, median = ours.cpu_us / theirs.cpu_us, ours.median_cpu_us / theirs.median_cpu_us
                found.append(Aim(rival=rival, what=what, ratio=ratio, limit=limit, median=median))
        for share in ("p50", "p99"):
            ours, theirs = (results.row(name, Load.PLAIN) for name in (results.ours, rival))
            if ours and theirs:
                own, other = (results.added_us(row, f"{share}_us") for row in (ours, theirs))
                what = f"added {share} latency of a plain request at {USUAL[Load.PLAIN]} connections"
                found.append(Aim(rival=rival, what=what, ratio=own / other if other > 0 else 1.0, limit=1.0))
    return found


def report(results: Results) -> str:
    """All tables of a run."""
    machine = results.machine
    about = (
        f"{results.when}, commit {results.commit}, Python {machine.python}, {machine.cores} cores of "
        f"{machine.processor}, of which others took {machine.others:.0%} meanwhile. "
        f"Of {results.rounds} rounds the best of each figure. {_ABOUT}"
    )
    if results.missing:
        about += f" Not installed, so left out: {', '.join(results.missing)}."
    lines = [textwrap.fill(about, 120)]
    lines += ["", "CPU of requests and streams, and memory (PSS) for each connection:", "", _costs(results)]
    for load in (Load.PLAIN, Load.STREAM):
        lines += ["", f"Latency added to a {load}, p50 / p99 / p99.9 in µs, by connections:", ""]
        lines.append(_latencies(results, load))
    if found := aims(results):
        lines += ["", "Model Pool beside the routers that are written in Rust:", "", _aims(found)]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, with columns of one width each; the first to the left, the others to the right."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        first, *rest = row
        aligned = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        return f"| {' | '.join(aligned)} |"

    return "\n".join(map(line, [cells[0], rule, *cells[1:]]))


def _costs(results: Results) -> str:
    def cells(name: str) -> list[str]:
        found = [f"{name} {results.versions[name]}".strip(), "yes" if results.keyed[name] else "no"]
        for load in Load:
            ours, row = (results.row(each, load) for each in (results.ours, name))
            found += [f"{row.cpu_us:,.0f}", _ratio(row.cpu_us, ours.cpu_us)] if row and ours else ["", ""]
            if load is not Load.PLAIN:
                found.append(f"{row.segments:.0f}" if row else "")
        own, memory = results.memory_of(results.ours), results.memory_of(name)
        if memory is None or own is None:
            return [*found, "", "", "", ""]
        found += [f"{memory.idle / 1e3:.1f}", _ratio(memory.idle, own.idle)]
        return [*found, f"{memory.stream / 1e3:.1f}", _ratio(memory.stream, own.stream)]

    head = ["router", "key", "plain µs", "×", "stream µs", "×", "pieces", "paced µs", "×", "pieces"]
    return table([*head, "idle KB", "×", "stream KB", "×"], map(cells, results.routers))


def _latencies(results: Results, load: Load) -> str:
    def cell(name: str, connections: int) -> str:
        row = results.row(name, load, connections)
        shares = ["p50_us", "p99_us", *(["p999_us"] if row.requests >= FEW else [])] if row else []
        return " / ".join([f"{results.added_us(row, share):,.0f}" for share in shares if row])

    rows = [[name, *(cell(name, each) for each in results.connections)] for name in results.routers]
    return table(["router", *map(str, results.connections)], rows)


def _aims(found: Iterable[Aim]) -> str:
    def cells(aim: Aim) -> list[str]:
        median = "" if aim.median is None else f"{aim.median:.2f}"
        kept = "yes" if aim.ratio <= aim.limit else "no"
        return [f"{aim.what}, of {aim.rival}'s", f"{aim.ratio:.2f}", median, f"{aim.limit:.2f}", kept]

    return table(["what", "ratio", "of medians", "at most", "kept"], map(cells, found))


def _ratio(value: float, own: float) -> str:
    ratio = value / own if own > 0 else 0.0
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"
