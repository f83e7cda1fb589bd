"""The results as a picture."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.report import USUAL, Load, Results, Row
from modelpool.picture import Panel, draw


def panels(results: Results) -> list[Panel]:
    def of(title: str, unit: str, load: Load, value: Callable[[Row], float]) -> Panel:
        rows = {name: results.row(name, load) for name in results.routers}
        return Panel(title, unit, {name: value(row) for name, row in rows.items() if row})

    def memory(title: str, what: str) -> Panel:
        return Panel(title, "KB", {each.router: getattr(each, what) / 1e3 for each in results.memory})

    latency = f"Latency added at {USUAL[Load.PLAIN]} connections"
    return [
        of("CPU of a plain request", "µs", Load.PLAIN, lambda row: row.cpu_us),
        of("CPU of a stream of 64 chunks, 10 ms apart", "µs", Load.PACED, lambda row: row.cpu_us),
        of(f"{latency}, median", "µs", Load.PLAIN, lambda row: results.added_us(row, "p50_us")),
        of(f"{latency}, 99 %", "µs", Load.PLAIN, lambda row: results.added_us(row, "p99_us")),
        memory("Memory of an idle connection", "idle"),
        memory("Memory of a stream", "stream"),
    ]


def picture(results: Results) -> str:
    """Two panels side by side, less is better."""
    return draw(panels(results), results.ours)
