"""PostgreSQL is away for 20 s under a pool that serves: no request fails, no change is lost, it goes on by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import PoolProcess, eventually, running_pool
from tests.e2e.test_faults import steady_requests
from tests.postgres import Postgres, running_postgres

AWAY_S = 20.0
CLIENTS = 4


@contextmanager
def load(pool: PoolProcess) -> Iterator[list[list[str]]]:
    """Requests for a model from several clients; what went wrong for each."""
    with steady_requests(pool, "m") as a, steady_requests(pool, "m") as b:
        with steady_requests(pool, "m") as c, steady_requests(pool, "m") as d:
            yield [a, b, c, d]


def answered(pool: PoolProcess) -> int:
    lines = pool.http.get("/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("modelpool_requests_total") and 'model="m"' in line]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in counts))


@pytest.mark.soak
@pytest.mark.parametrize("how", ["stopped", "frozen", "restarted three times"])
def test_requests_go_on_while_postgresql_is_away(how: str, tmp_path: Path) -> None:
    with running_postgres(durable=True) as server:
        away: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "stopped": (server.stop, server.start),
            "frozen": (server.freeze, server.thaw),
            "restarted three times": (lambda: restart(server), lambda: None),
        }
        leave, come_back = away[how]
        url = server.database("pool")
        with running_pool(tmp_path / "home", "--no-demo", MODELPOOL_STORE_URL=url, **FAKE_ONLY) as pool:
            pool.register("m", fake=True)
            pool.wait_active("m")
            hosts = [each.pid for each in pool.processes("modelpool: host")]
            manager, epoch = pool.one("modelpool: manager").pid, pool.status()["epoch"]
            with load(pool) as failures:
                time.sleep(2)
                leave()
                begun = time.monotonic()
                refused = 0
                while time.monotonic() - begun < AWAY_S:
                    answer = pool.http.post("/admin/models/register", json={"alias": f"n{refused}", "fake": True})
                    if answer.status_code != 200:
                        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
                        refused += 1
                    time.sleep(0.5)
                come_back()
                eventually(
                    lambda: pool.http.post("/admin/models/register", json={"alias": "after", "fake": True}).is_success,
                    60,
                    lambda: "a change is taken again",
                )
                pool.wait_active("after")
                served = answered(pool)
            print(f"\nPostgreSQL {how}: {served} requests, {sum(map(len, failures))} failed, {refused} changes refused")
            assert failures == [[]] * CLIENTS
            assert served > 100
            assert (pool.one("modelpool: manager").pid, pool.status()["epoch"]) == (manager, epoch)
            assert set(hosts) <= {each.pid for each in pool.processes("modelpool: host")}
            known = {each["alias"] for each in pool.status()["models"]}
        stored = {row["alias"] for row in server.execute("SELECT alias FROM models", "pool")}
        assert stored == known >= {"m", "after"}


def restart(server: Postgres) -> None:
    for _ in range(3):
        server.stop()
        time.sleep(1)
        server.start()
        time.sleep(1)
