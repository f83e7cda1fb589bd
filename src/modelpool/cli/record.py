"""`modelpool record`: the requests that a pool finishes, as a trace, and beside it what its models cost."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from modelpool.cli.client import PoolClient
from modelpool.cli.output import fail
from modelpool.core.learned import ANYWHERE
from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import GB
from modelpool.messages.admin import LearnedView, ModelView, WorkerView
from modelpool.messages.requests import Finished
from modelpool.simulator.scenario import ModelCosts, Scenario, WorkerKind
from modelpool.simulator.trace import Arrival

POLL_S = 1.0
_REMEMBERED, _KEPT = 1000, 50
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


class Services:
    """How long instances worked on requests, by model: of each the latest thousand."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def add(self, arrivals: Iterable[Arrival]) -> None:
        """Of those that were answered."""
        for each in arrivals:
            if each.service_s is not None and each.status == 200:
                self._seconds[each.model].append(each.service_s)

    def of(self, alias: str) -> tuple[float, ...]:
        """Some of them that stand for all."""
        ordered = sorted(self._seconds[alias])
        step = max(1, len(ordered) // _KEPT)
        return tuple(round(each, 4) for each in ordered[step // 2 :: step])


def at_rest(models: Iterable[ModelView]) -> frozenset[str]:
    """The models that are unloaded, and not on their way up."""
    return frozenset(each.alias for each in models if each.state is InstanceState.UNLOADED and not each.wanted)


def scenario_of_pool(
    models: Iterable[ModelView], workers: Iterable[WorkerView], services: Services, resting: Collection[str]
) -> Scenario:
    """What a running pool has, and has learned of its models so far; defaults where it has learned nothing.

    `resting`: the models that were unloaded when the recording began.
    """
    kinds = tuple(_kind(each) for each in workers if each.alive and each.devices)
    costs = {each.alias: _costs(each, services.of(each.alias), resting=each.alias in resting) for each in models}
    return Scenario(workers=kinds or Scenario().workers, models=costs)


def _kind(worker: WorkerView) -> WorkerKind:
    accelerated = any(each.kind != "cpu" for each in worker.devices)
    host = worker.host if accelerated else None
    return WorkerKind(
        devices=len(worker.devices),
        device_gb=_gb(min(each.total_bytes for each in worker.devices)),
        accelerated=accelerated,
        host_gb=None if host is None else _gb(host.total_bytes),
    )


def _costs(model: ModelView, services: tuple[float, ...], *, resting: bool) -> ModelCosts:
    usual, spec = ModelCosts(), model.spec
    seen = {each.what: each for each in model.learned if each.worker_id == ANYWHERE}

    def times(what: str, default: float | tuple[float, ...]) -> float | tuple[float, ...]:
        return _drawn(seen[what]) if what in seen else default

    def held(what: str, default: float) -> float:
        return _gb(seen[what].typical) if what in seen else default

    weights = max((_gb(each.weights_bytes) for each in model.instances), default=0.0)
    on_host = [held(f"held_on_host_{where}", 0.0) for where in ("awake", "1", "2")]
    return ModelCosts(
        memory_gb=held("held_awake", usual.memory_gb) if spec.gpu_memory_gb is None else spec.gpu_memory_gb,
        devices=spec.tensor_parallel_size,
        capacity=spec.capacity or usual.capacity,
        held_gb=(held("held_1", usual.held_gb[0]), held("held_2", usual.held_gb[1])),
        held_on_host_gb=(on_host[0], max(on_host[1], weights), on_host[2]),
        start_s=times("start", usual.start_s),
        stop_s=times("unload", usual.stop_s),
        sleep_s=(times("sleep_1", usual.sleep_s[0]), times("sleep_2", usual.sleep_s[1])),
        wake_s=(times("wake_1", usual.wake_s[0]), times("wake_2", usual.wake_s[1])),
        service_s=services or usual.service_s,
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        pinned=spec.pinned,
        resting=resting,
        idle_sleep_1_s=spec.idle_sleep_1_s,
        idle_sleep_2_s=spec.idle_sleep_2_s,
        idle_unload_s=spec.idle_unload_s,
    )


def _gb(bytes_: float) -> float:
    return round(bytes_ / GB, 3)


def _drawn(seen: LearnedView) -> tuple[float, ...]:
    """One in ten is slow."""
    return (*[round(seen.typical, 4)] * 9, round(seen.slow, 4))
