from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.pool import PoolProcess, running_pool

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


@pytest.fixture
def own_pool(tmp_path: Path) -> Iterator[PoolProcess]:
    """A fake-engine pool of a test's own, to be broken."""
    with running_pool(tmp_path / "home", "--no-demo", **FAKE_ONLY) as pool:
        yield pool
