"""The gateway's garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from modelpool.process import calm_collector


@pytest.fixture
def own_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


@pytest.mark.usefixtures("own_thresholds")
def test_streams_that_come_by_the_thousand_cause_no_full_look_at_all_of_them() -> None:
    looks = [0, 0, 0]

    def count(phase: str, info: dict[str, int]) -> None:
        looks[info["generation"]] += phase == "start"

    calm_collector()
    gc.callbacks.append(count)
    try:
        alive = [[number] for number in range(600_000)]
    finally:
        gc.callbacks.remove(count)
    assert len(alive) == 600_000
    young, old, full = looks
    assert young > 0
    assert old > 0
    assert full == 0
