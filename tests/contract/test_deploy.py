"""`deploy` and `undeploy` where they come in each other's way; what they do on Ray is in tests/e2e/test_ray.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from modelpool.cluster.deploy import deploy, undeploy
from modelpool.home import Home
from modelpool.process import StartupError
from modelpool.settings import Settings


@pytest.mark.parametrize("command", [deploy, undeploy])
def test_there_is_one_at_a_time_for_a_home(command: Callable[[Settings], object], tmp_path: Path) -> None:
    with Home(tmp_path).lock("deploy"), pytest.raises(StartupError, match=f"under way .process {os.getpid()}."):
        command(Settings(home=str(tmp_path)))
