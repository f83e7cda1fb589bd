"""What a worker's memory is set aside for, state by state."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpool.core.ledger import Claim, ledger, on_device, on_host
from modelpool.core.lifecycle import InstanceState
from modelpool.core.placement import GB, HOST
from modelpool.core.pool import Device, Instance, Worker
from modelpool.core.scaling import Step

S = InstanceState


def instance(state: S = S.ACTIVE, *, gb: float = 6, held: float = 0, **fields: Any) -> Instance:
    return Instance(
        instance="m",
        alias="m",
        key="k",
        worker_id="w",
        state=state,
        devices=(0,),
        memory_bytes=int(gb * GB),
        held_bytes=int(held * GB),
        **fields,
    )


def claimed(claim: Claim) -> tuple[float, float]:
    return claim.bytes / GB, claim.unseen / GB


@pytest.mark.parametrize(
    ("one", "set_aside", "unseen"),
    [
        (instance(S.STARTING), 6, 6),  # the peak, before anything of it can be seen
        (instance(S.ACTIVE), 6, 0),  # nobody can tell what it holds: it has taken its share
        (instance(S.ACTIVE, held=5), 6, 1),  # it may still take the rest of its share
        (instance(S.ACTIVE, held=7), 7, 0),  # more than it was given
        (instance(S.DRAINING, held=5), 6, 1),
        (instance(S.SLEEP_1, held=1), 1, 0),
        (instance(S.SLEEP_2, held=0.5), 0.5, 0),
        (instance(S.SLEEP_1, held=1, order=Step.WAKE), 6, 5),
        (instance(S.WAKING, held=1), 6, 5),
        (instance(S.FAILED, held=5), 0, 0),
        (instance(S.UNLOADED, held=5), 0, 0),
    ],
)
def test_the_most_it_may_take_is_set_aside_until_it_was_measured(
    one: Instance, set_aside: float, unseen: float
) -> None:
    assert claimed(on_device(one, accelerated=False)) == (set_aside, unseen)


def test_an_accelerator_wakes_a_sleeper_to_put_it_deeper() -> None:
    one = instance(S.SLEEP_1, held=1, order=Step.SLEEP_2)
    assert claimed(on_device(one, accelerated=True)) == (6, 5)
    assert claimed(on_device(one, accelerated=False)) == (1, 0)


def test_level_one_keeps_the_weights_in_the_machines_memory() -> None:
    one: dict[str, Any] = {"host_bytes": 2 * GB, "weights_bytes": 14 * GB, "levels": (1, 2)}
    assert claimed(on_host(instance(S.STARTING, **one))) == (2, 2)
    assert claimed(on_host(instance(S.ACTIVE, **one))) == (2, 0)
    assert claimed(on_host(instance(S.DRAINING, order=Step.SLEEP_1, **one))) == (16, 14)
    assert claimed(on_host(instance(S.DRAINING, **one))) == (16, 14)
    assert claimed(on_host(instance(S.DRAINING, stopping=True, **one))) == (2, 0)
    assert claimed(on_host(instance(S.SLEEP_1, **one))) == (14, 0)
    assert claimed(on_host(instance(S.SLEEP_2, **one))) == (2, 0)
    assert claimed(on_host(instance(S.FAILED, **one))) == (0, 0)


def worker(*free: float, host: float = 60, kind: str = "cuda") -> Worker:
    devices = [
        Device(index=index, kind=kind, total_bytes=80 * GB, free_bytes=int(gb * GB)) for index, gb in enumerate(free)
    ]
    machine = Device(index=HOST, kind="cpu", total_bytes=64 * GB, free_bytes=int(host * GB))
    return Worker(worker_id="w", incarnation="1", devices=tuple(devices), host=machine)


def free(books: Worker, *instances: Instance) -> list[float]:
    made = ledger(books, instances)
    return [room.free_bytes / GB for room in (*made.devices, *([made.host] if made.host else []))]


def test_what_cannot_be_seen_yet_is_not_free_and_what_others_hold_is_not_either() -> None:
    assert free(worker(80, 80)) == [80, 80, 60]
    assert free(worker(80, 80), instance(S.STARTING, gb=30)) == [50, 80, 60]
    # It has taken its share, and somebody else 20 GB more.
    assert free(worker(30, 80), instance(S.ACTIVE, gb=30, held=30)) == [30, 80, 60]
    # The device does not show yet that it has ended.
    assert free(worker(50, 80), instance(S.FAILED, gb=30)) == [50, 80, 60]


def test_a_machine_without_accelerators_has_one_account() -> None:
    assert free(worker(70, kind="cpu"), instance(S.SLEEP_1, held=3, weights_bytes=GB, host_bytes=3 * GB)) == [70]


states = st.sampled_from(list(S))
instances = st.builds(
    instance,
    states,
    gb=st.floats(0, 80),
    held=st.floats(0, 80),
    order=st.sampled_from([Step.NONE, Step.WAKE, Step.SLEEP_1, Step.SLEEP_2]),
    host_bytes=st.integers(0, 10 * GB),
    weights_bytes=st.integers(0, 40 * GB),
    levels=st.sampled_from([(), (1,), (1, 2)]),
)


@given(st.lists(instances, max_size=6), st.floats(0, 80), st.booleans())
def test_free_is_never_more_than_what_is_shown_nor_than_what_is_not_set_aside(
    all_: list[Instance], shown: float, fast: bool
) -> None:
    books = worker(shown, kind="cuda" if fast else "cpu")
    room = ledger(books, all_).devices[0]
    claims = [on_device(each, accelerated=fast) for each in all_]
    assert all(0 <= claim.unseen <= claim.bytes for claim in [*claims, *map(on_host, all_)])
    assert room.free_bytes <= int(shown * GB)
    assert room.free_bytes + sum(claim.bytes for claim in claims) <= 80 * GB
    assert all(claim.bytes >= each.held_bytes for each, claim in zip(all_, claims, strict=True) if claim.bytes)
