from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.pool import PoolProcess, eventually, running_pool

FAKE_ONLY = {"MODELPOOL_ENGINES": "fake", "MODELPOOL_HEARTBEAT_INTERVAL": "1"}


@pytest.fixture(scope="session")
def demo_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    """One pool with the demo model on a real engine, for all tests that do not break it."""
    with running_pool(tmp_path_factory.mktemp("demo-pool"), VLLM_ENABLE_RESPONSES_API_STORE="1") as pool:
        pool.wait_active("demo")
        yield pool


@pytest.fixture(scope="session")
def fake_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    """One pool that knows the fake engine only, for all tests that do not break it."""
    with running_pool(tmp_path_factory.mktemp("fake-pool"), "--no-demo", **FAKE_ONLY) as pool:
        yield pool


@pytest.fixture(scope="session")
def broken_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolProcess]:
    with running_pool(tmp_path_factory.mktemp("broken-pool"), "--no-demo", **FAKE_ONLY) as pool:
        yield pool


@pytest.fixture
def mending_pool(broken_pool: PoolProcess) -> Iterator[PoolProcess]:
    """One fake-engine pool for all tests whose damage it mends by itself; each leaves it whole, without a model."""
    yield broken_pool
    eventually(lambda: _whole(broken_pool), 30, lambda: f"whole again: {broken_pool.status()}")
    for model in broken_pool.status()["models"]:
        broken_pool.remove(model["alias"])
    eventually(lambda: not broken_pool.processes("modelpool: host"), 30, lambda: str(broken_pool.processes()))


def _whole(pool: PoolProcess) -> bool:
    status = pool.status()
    return "workers" in status and not status["recovering"] and any(each["alive"] for each in status["workers"])


@pytest.fixture
def own_pool(tmp_path: Path) -> Iterator[PoolProcess]:
    """A fake-engine pool of a test's own, to be broken for good."""
    with running_pool(tmp_path / "home", "--no-demo", **FAKE_ONLY) as pool:
        yield pool
