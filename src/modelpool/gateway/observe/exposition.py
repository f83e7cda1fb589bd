"""The metrics of all gateways of this node, as Prometheus reads them."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator
from itertools import accumulate
from time import monotonic

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from modelpool import __version__
from modelpool.gateway.observe.metrics import (
    COUNTERS,
    HISTOGRAMS,
    Histogram,
    Metrics,
    Said,
)
from modelpool.gateway.observe.rows import OTHERS, Labels, Rows


def expose(metrics: Metrics, accept: str) -> tuple[str, bytes]:
    """The content type for what the reader accepts, and the text. Reads only what is shared, so any thread may."""
    encode, content_type = choose_encoder(accept)
    return content_type, encode(_Collector(metrics))


class _Collector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield _counter("modelpool_requests", "Requests that ended.", ("model", "status", "reason"), metrics.requests)
        yield _counter(
            "modelpool_retries",
            "Times that a request went on to another instance, or to a new connection.",
            ("model", "reason"),
            metrics.retries,
        )
        models = {labels: row for labels, row in _sum(metrics.models.all()).items() if labels != (OTHERS,) or any(row)}
        for histogram in HISTOGRAMS:
            yield _histogram(histogram, models)
        for counter in COUNTERS:
            family = CounterMetricFamily(counter.name, counter.help, labels=("model",))
            for labels, numbers in models.items():
                family.add_metric(labels, numbers[counter.at])
            yield family
        yield _gauge("modelpool_requests_in_flight", "At an instance.", ("model", "instance"), metrics.inflight)
        yield _gauge("modelpool_requests_waiting", "In the waiting room.", ("model",), metrics.waiting)
        breakers = GaugeMetricFamily(
            "modelpool_instance_breaker_state", "0 closed, 1 open, 2 half open.", labels=("gateway", "instance")
        )
        for slot, labels, (state,) in metrics.breakers.all():
            if not math.isnan(state) and labels != (OTHERS,):
                breakers.add_metric((str(slot), *labels), state)
        yield breakers
        yield from _processes((str(slot), numbers) for slot, _, numbers in metrics.processes.all())
        build = GaugeMetricFamily("modelpool_build_info", "Always 1.", labels=("version", "python"))
        build.add_metric((__version__, platform.python_version()), 1)
        yield build


def _sum(rows: Iterable[tuple[int, Labels, list[float]]]) -> dict[Labels, list[float]]:
    """Over the slots."""
    summed: dict[Labels, list[float]] = {}
    for _, labels, numbers in rows:
        before = summed.get(labels)
        summed[labels] = numbers if before is None else [a + b for a, b in zip(before, numbers, strict=True)]
    return summed


def _counter(name: str, text: str, labels: Labels, rows: Rows) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, (number,) in _sum(rows.all()).items():
        if number:
            family.add_metric(values, number)
    return family


def _gauge(name: str, text: str, labels: Labels, rows: Rows) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, (number,) in _sum(rows.all()).items():
        if number or OTHERS not in values:
            family.add_metric(values, number)
    return family


def _histogram(histogram: Histogram, models: dict[Labels, list[float]]) -> Metric:
    family = HistogramMetricFamily(histogram.name, histogram.help, labels=("model",))
    bounds = [*map(str, histogram.buckets), "+Inf"]
    for labels, numbers in models.items():
        counts = accumulate(numbers[histogram.at : histogram.sum_at])
        buckets = list(zip(bounds, counts, strict=True))
        family.add_metric(labels, buckets=buckets, sum_value=numbers[histogram.sum_at])
    return family


def _processes(rows: Iterable[tuple[str, list[float]]]) -> Iterator[Metric]:
    """Of each gateway process: what it says, and what the system says of it."""

    def gauge(name: str, text: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(name, text, labels=("gateway",))

    age = gauge("modelpool_snapshot_age_seconds", "Since the manager was last heard; it speaks every 5 s.")
    connections = gauge("modelpool_client_connections", "Open connections of clients.")
    cpu = CounterMetricFamily("process_cpu_seconds", "CPU time, user and system.", labels=("gateway",))
    memory = gauge("process_resident_memory_bytes", "Resident memory.")
    descriptors = gauge("process_open_fds", "Open descriptors.")
    limit = gauge("process_max_fds", "The most descriptors it may have.")
    started = gauge("process_start_time_seconds", "When it started, since 1970.")
    for slot, numbers in rows:
        if not numbers[Said.PID]:
            continue
        connections.add_metric((slot,), numbers[Said.CONNECTIONS])
        if numbers[Said.HEARD_AT]:
            age.add_metric((slot,), monotonic() - numbers[Said.HEARD_AT])
        try:
            process = psutil.Process(int(numbers[Said.PID]))
            with process.oneshot():
                times = process.cpu_times()
                cpu.add_metric((slot,), times.user + times.system)
                memory.add_metric((slot,), process.memory_info().rss)
                descriptors.add_metric((slot,), process.num_fds())
                limit.add_metric((slot,), process.rlimit(psutil.RLIMIT_NOFILE)[0])
                started.add_metric((slot,), process.create_time())
        except psutil.Error:
            continue  # it ended meanwhile
    yield from (age, connections, cpu, memory, descriptors, limit, started)
