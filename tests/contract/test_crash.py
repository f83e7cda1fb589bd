"""The manager is killed at each of its commit points in turn: what was acknowledged is there, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.crash_points import POINTS, changes


@pytest.mark.parametrize("store_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.soak)], indirect=True)
def test_a_manager_killed_at_any_commit_point_loses_nothing_and_does_nothing_twice(store_url: str) -> None:
    command = [sys.executable, "-m", "tests.crash_points", store_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    points = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert points == [(change.name, point) for change in changes(0) for point in POINTS]
