"""`tests/test_system.py`, which checks a live pool from outside, on a live pool and on others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import PoolProcess, running_pool

SCRIPT = Path(__file__).parents[1] / "test_system.py"


def run(*addresses: str, **environ: str) -> subprocess.CompletedProcess[str]:
    own = ("MODELPOOL_", "RUN_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    command = [sys.executable, str(SCRIPT), *addresses]
    return subprocess.run(command, env=inherited | environ, capture_output=True, text=True, timeout=240, check=False)


def worker_url(pool: PoolProcess) -> str:
    url: str = pool.status()["workers"][0]["url"]
    return url


def test_all_checks_pass_on_a_pool_that_is_well_and_nothing_is_left(fake_pool: PoolProcess) -> None:
    before = [each["id"] for each in fake_pool.http.get("/v1/models").json()["data"]]
    done = run(fake_pool.url, worker_url(fake_pool), MODELPOOL_HOME=str(fake_pool.home))
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert len(lines) == 13
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert [each["id"] for each in fake_pool.http.get("/v1/models").json()["data"]] == before


def test_a_fake_model_that_follows_its_load_passes_too(tmp_path: Path) -> None:
    quick = {"MODEL_SCALE_INTERVAL": "0.5", "MODEL_COOLDOWN": "1"}
    with running_pool(tmp_path, "--no-demo", **FAKE_ONLY, **quick) as pool:
        done = run(pool.url, worker_url(pool), MODELPOOL_HOME=str(pool.home), RUN_FULL_TESTS="1")
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert "a fake model follows its load" in done.stdout
        assert pool.http.get("/v1/models").json()["data"] == []


def test_what_does_not_pass_is_said_and_seen_in_the_status(fake_pool: PoolProcess) -> None:
    wrong = run(fake_pool.url, worker_url(fake_pool), MODELPOOL_TOKEN="wrong", MODELPOOL_HOME=str(fake_pool.home))
    assert wrong.returncode == 1
    assert "FAILED  the worker is one of this pool" in wrong.stdout
    assert "401" in wrong.stdout
    assert "ok      it answers a chat" in wrong.stdout
