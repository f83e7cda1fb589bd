from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.postgres import Postgres, running_postgres

if TYPE_CHECKING:
    from tests.ray_pool import RayPool


class Schedule(LoadFileScheduling):  # type: ignore[misc]
    """Over several processes by file, in their order; but real engines are in one of them, and Ray is in one."""

    TOGETHER: ClassVar = {
        "engine": ("docs", "engine_aborts", "parity", "real_engine", "sleep", "vllm_engine"),
        "ray": ("manager_port", "ray", "ray_roll"),
    }

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        subject = Path(file).stem.removeprefix("test_")
        return next((name for name, subjects in self.TOGETHER.items() if subject in subjects), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Schedule:
    return Schedule(config, log)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests that do not stop it."""
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new store in each of the databases that may hold one."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database(f"test-{secrets.token_hex(6)}")


@pytest.fixture(scope="session")
def ray_pool() -> Iterator[RayPool]:
    """One pool on Ray, for all tests that leave it as it was: it takes a while to start."""
    from tests.ray_pool import deployed_pool  # not for those who need no Ray: its import takes seconds

    with deployed_pool(MODELPOOL_PIN_MANAGER="true") as pool:  # some tests add nodes, and its store is a file
        yield pool
