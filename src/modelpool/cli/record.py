"""`modelpool record`: the requests that a pool finishes, as a trace, and beside it what its models cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from modelpool.cli.client import PoolClient
from modelpool.cli.output import fail
from modelpool.core.learned import ANYWHERE
from modelpool.core.placement import GB
from modelpool.messages.admin import LearnedView, ModelView, WorkerView
from modelpool.messages.requests import Finished
from modelpool.simulator.scenario import ModelCosts, Scenario, WorkerKind
from modelpool.simulator.trace import Arrival

POLL_S = 1.0
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """`90s`, `10m`, `2h`, or a number of seconds. Raises ValueError."""
    unit = UNITS.get(text[-1:], 0.0)
    seconds = float(text[:-1]) * unit if unit else float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """The file, written line by line."""
    try:
        file = path.open("w", newline="", buffering=1)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}.")
    with file:
        yield file


def recorded(client: PoolClient, for_s: float) -> Iterator[tuple[list[Arrival], bool]]:
    """What ended since the time before, about once a second; and whether some may have been missed. Raises Trouble."""
    begun = told = client.finished(float("inf")).until
    deadline = time.monotonic() + for_s
    while (left_s := deadline - time.monotonic()) > 0:
        time.sleep(min(POLL_S, left_s))
        news = client.finished(told)
        missed, told = news.complete_since > told, news.until
        yield [_arrival(each, begun) for each in news.requests if each.accepted >= begun], missed


def _arrival(request: Finished, begun: float) -> Arrival:
    return Arrival(
        time=request.accepted - begun,
        model=request.model,
        status=request.status,
        wait_s=request.wait_s,
        first_byte_s=request.first_byte_s,
        service_s=request.service_s,
    )


def scenario_of_pool(models: Iterable[ModelView], workers: Iterable[WorkerView]) -> Scenario:
    """What a running pool has, and has learned of its models so far; defaults where it has learned nothing."""
    kinds = tuple(
        WorkerKind(devices=len(each.devices), device_gb=round(min(one.total_bytes for one in each.devices) / GB, 3))
        for each in workers
        if each.alive and each.devices
    )
    return Scenario(workers=kinds or Scenario().workers, models={each.alias: _costs(each) for each in models})


def _costs(model: ModelView) -> ModelCosts:
    usual, spec = ModelCosts(), model.spec
    seen = {each.what: each for each in model.learned if each.worker_id == ANYWHERE}

    def times(what: str, default: float | tuple[float, ...]) -> float | tuple[float, ...]:
        return _drawn(seen[what]) if what in seen else default

    def held(what: str, default: float) -> float:
        return round(seen[what].typical / GB, 3) if what in seen else default

    return ModelCosts(
        memory_gb=held("held_awake", usual.memory_gb) if spec.gpu_memory_gb is None else spec.gpu_memory_gb,
        devices=spec.tensor_parallel_size,
        capacity=spec.capacity or usual.capacity,
        held_gb=(held("held_1", usual.held_gb[0]), held("held_2", usual.held_gb[1])),
        start_s=times("start", usual.start_s),
        stop_s=times("unload", usual.stop_s),
        sleep_s=(times("sleep_1", usual.sleep_s[0]), times("sleep_2", usual.sleep_s[1])),
        wake_s=(times("wake_1", usual.wake_s[0]), times("wake_2", usual.wake_s[1])),
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        pinned=spec.pinned,
        idle_sleep_1_s=spec.idle_sleep_1_s,
        idle_sleep_2_s=spec.idle_sleep_2_s,
        idle_unload_s=spec.idle_unload_s,
    )


def _drawn(seen: LearnedView) -> tuple[float, ...]:
    """One in ten is slow."""
    return (*[round(seen.typical, 4)] * 9, round(seen.slow, 4))
