"""What is simulated beside the arrivals: workers, models and what their steps cost, as measured or typed by hand.

A YAML file; all values have defaults, and `default` is for models of the trace that are not named:

    workers: [{count: 2, devices: 4, device_gb: 80}]
    default: {memory_gb: 20, capacity: 64, start_s: 20, service_s: 2}
    models:
      chat: {memory_gb: 60, start_s: [31.2, 33.0], wake_s: [0.9, 4.1], pinned: true}

Where several seconds were measured, one of them is drawn at each step.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import yaml
from msgspec import Meta

from modelpool.core.learned import ANYWHERE, HELD, HELD_ON_HOST, SLEEP, WAKE, Learned, What, measure
from modelpool.core.placement import GB
from modelpool.core.pool import Model
from modelpool.simulator.trace import Arrival
from modelpool.yaml_file import BadFile, read_struct

Seconds = Annotated[float, Meta(ge=0)]
Times = Seconds | Annotated[tuple[Seconds, ...], Meta(min_length=1)]
"""One duration, or those that were measured."""
Gigabytes = Annotated[float, Meta(ge=0)]
ENGINE = "simulated"


class ScenarioError(Exception):
    """A scenario that cannot be used. The message names the file, the field, its value and what is allowed."""


class WorkerKind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """So many equal workers.

    `accelerated`: its devices have memory of their own, beside which `host_gb` is the machine's; None where that never
    is too little. Else the machine is its one device.
    """

    count: Annotated[int, Meta(ge=1)] = 1
    devices: Annotated[int, Meta(ge=1)] = 1
    device_gb: Annotated[float, Meta(gt=0)] = 80.0
    accelerated: bool = True
    host_gb: Annotated[float, Meta(gt=0)] | None = None


class ModelCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one model. Memory is on each of its devices. Steps last from the order until the manager hears of their end.

    `held_gb`, `sleep_s`, `wake_s`: at level 1 and level 2. A sleep begins when requests in flight have ended.
    `held_on_host_gb`: of the machine's memory, awake and at both levels; level 1 has the weights more than level 2.
    `resting`: the trace begins with it unloaded; else it is brought up at first.
    """

    memory_gb: Gigabytes = 16.0
    devices: Annotated[int, Meta(ge=1)] = 1
    capacity: Annotated[int, Meta(ge=1)] = 64
    """Requests that an instance runs at once; more of them queue there."""
    sleeps: bool = True
    held_gb: tuple[Gigabytes, Gigabytes] = (1.0, 1.0)
    held_on_host_gb: tuple[Gigabytes, Gigabytes, Gigabytes] = (0.0, 0.0, 0.0)
    start_s: Times = 20.0
    stop_s: Times = 2.0
    sleep_s: tuple[Times, Times] = (0.5, 0.5)
    wake_s: tuple[Times, Times] = (0.5, 2.0)
    service_s: Times = 1.0
    """Of a request whose tokens are not known."""
    first_token_s: Times = 0.1
    token_in_s: Seconds = 0.0
    """What each token that is read adds."""
    token_out_s: Seconds = 0.02

    min_replicas: Annotated[int, Meta(ge=0)] | None = None
    max_replicas: Annotated[int, Meta(ge=1)] | None = None
    pinned: bool = False
    resting: bool = False
    idle_sleep_1_s: Seconds | None = None
    idle_sleep_2_s: Seconds | None = None
    idle_unload_s: Seconds | None = None

    def serves(self, arrival: Arrival, draw: random.Random) -> float:
        """Seconds from when it is begun to the end of its answer: as recorded, else by its tokens, else as usual."""
        if arrival.service_s is not None:
            return arrival.service_s
        if arrival.tokens_out is None:
            return drawn(self.service_s, draw)
        read = self.token_in_s * (arrival.tokens_in or 0)
        return drawn(self.first_token_s, draw) + read + self.token_out_s * arrival.tokens_out

    def learned(self) -> Learned:
        """As a pool knows them that has run each of these steps."""
        amounts = {What.START: self.start_s, What.UNLOAD: self.stop_s}
        amounts[HELD_ON_HOST[0]] = self.held_on_host_gb[0] * GB
        for level in (1, 2) if self.sleeps else ():
            amounts[SLEEP[level]] = self.sleep_s[level - 1]
            amounts[WAKE[level]] = self.wake_s[level - 1]
            amounts[HELD[level]] = self.held_gb[level - 1] * GB
            amounts[HELD_ON_HOST[level]] = self.held_on_host_gb[level] * GB
        return {(ANYWHERE, what): measure(_all(times)) for what, times in amounts.items()}

    def model(self, alias: str, number: int) -> Model:
        return Model(
            alias=alias,
            key=alias,
            engine=ENGINE,
            created=number,
            devices=self.devices,
            memory_bytes=int(self.memory_gb * GB),
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            pinned=self.pinned,
            idle_sleep_1_s=self.idle_sleep_1_s,
            idle_sleep_2_s=self.idle_sleep_2_s,
            idle_unload_s=self.idle_unload_s,
        )


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    workers: Annotated[tuple[WorkerKind, ...], Meta(min_length=1)] = (WorkerKind(),)
    models: dict[str, ModelCosts] = {}
    default: ModelCosts = ModelCosts()

    def costs(self, alias: str) -> ModelCosts:
        return self.models.get(alias, self.default)

    def aliases(self, arrivals: Iterable[Arrival]) -> list[str]:
        """All models, those of the scenario first."""
        return list(dict.fromkeys([*self.models, *(each.model for each in arrivals)]))

    def machines(self) -> list[tuple[str, WorkerKind]]:
        """The workers, and what they are called."""
        kinds = [kind for kind in self.workers for _ in range(kind.count)]
        return [(f"worker-{number}", kind) for number, kind in enumerate(kinds, start=1)]


def read_scenario(path: Path) -> Scenario:
    """Raises ScenarioError."""
    try:
        return read_struct(path, Scenario)
    except BadFile as error:
        raise ScenarioError(str(error)) from error


def write_scenario(path: Path, scenario: Scenario) -> None:
    path.write_text(yaml.safe_dump(msgspec.to_builtins(scenario), sort_keys=False, default_flow_style=None))


def _all(times: Times) -> tuple[float, ...]:
    return times if isinstance(times, tuple) else (times,)


def drawn(times: Times, draw: random.Random) -> float:
    return draw.choice(_all(times))
