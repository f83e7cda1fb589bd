"""Another version of gateways and manager takes the place of the one that runs, under load, on two nodes of a Ray
cluster.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

import modelpool
from tests.another_version import VERSION, another_version
from tests.load import ConstantLoad
from tests.ray_pool import RayPool, deployed_pool, kill_ray

STREAM_S = 10.0
"""Longer than it takes to replace a node's gateways."""


@pytest.fixture
def second_node(ray_pool: RayPool) -> Iterator[Path]:
    """Its home."""
    home = ray_pool.add_node(3)
    yield home
    kill_ray(home)
    gateways = [*ray_pool.processes("modelpool: gateway"), *ray_pool.processes("modelpool: retiring gateway")]
    left = [each for each in gateways if each.environ()["MODELPOOL_HOME"] == str(home)]
    for each in left:
        each.terminate()
    psutil.wait_procs(left, timeout=30)


class Roll:
    """The pool while one version takes the place of another."""

    def __init__(self, pool: RayPool, urls: list[str]) -> None:
        self.pool = pool
        self.urls = urls

    def deploy(self, **environ: str) -> None:
        done = self.pool.command("deploy", **environ)
        assert done.returncode == 0, done.stdout + done.stderr

    def versions(self) -> set[str]:
        """What both gateways and the manager say that they are; over connections that no gateway kept."""
        seen = set()
        for url in self.urls:
            with httpx.Client(base_url=url, headers=self.pool.http.headers, timeout=30, trust_env=False) as http:
                build = re.search(r'modelpool_build_info{.*version="([^"]*)"', http.get("/metrics").text)
                seen |= {build[1] if build else "", str(http.get("/admin/status").json()["version"])}
        return seen

    def starts(self) -> int:
        """How many instances the worker has started in all."""
        return (self.pool.folder / "worker-w1.log").read_text().count(" starts, engine ")


def test_no_request_fails_while_another_version_comes_and_goes(
    ray_pool: RayPool, second_node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ray_pool.register("quick", fake=True, min_replicas=1, fake_capacity=64)
    tokens = round(STREAM_S * 10)
    ray_pool.register(
        "long", fake=True, min_replicas=1, fake_capacity=64, fake_token_ms=100, fake_response="a " * tokens
    )
    for alias in ("quick", "long"):
        ray_pool.wait_active(alias)
    roll = Roll(ray_pool, [ray_pool.url, ray_pool.node_url(second_node)])
    later = str(another_version(tmp_path))
    starts, gateways = roll.starts(), ray_pool.processes("modelpool: gateway")
    assert len(gateways) == 2
    cluster, _, epoch = ray_pool.status()["epoch"].rpartition(".")
    took = []
    with ExitStack() as stack:
        quick = stack.enter_context(ConstantLoad(roll.urls, "quick", ray_pool.key, 20))
        long = stack.enter_context(ConstantLoad(roll.urls, "long", ray_pool.key, 1, max_tokens=tokens))
        time.sleep(2)
        for version, working_dir in ((VERSION, later), (modelpool.__version__, "")):
            began = time.monotonic()
            roll.deploy(RAY_WORKING_DIR=working_dir)
            took.append(time.monotonic() - began)
            assert roll.versions() == {version}
            assert not any(each in gateways for each in ray_pool.processes("modelpool: gateway"))
            if version == VERSION:
                retiring = ray_pool.processes("modelpool: retiring gateway")
                assert set(retiring) == set(gateways), "what they have begun goes on"
            assert ray_pool.status()["epoch"] == f"{cluster}.{int(epoch) + len(took)}"
    now, epoch = ray_pool.processes("modelpool: gateway"), ray_pool.status()["epoch"]
    roll.deploy()
    assert (ray_pool.processes("modelpool: gateway"), ray_pool.status()["epoch"]) == (now, epoch), "the same again"
    psutil.wait_procs(gateways, timeout=120)
    assert not any(each.is_running() for each in gateways)
    with capsys.disabled():
        print(f"\ndeployed in {took} s; {len(quick.asked)} quick requests, {len(long.asked)} long ones")
    assert not quick.failures()
    assert not long.failures()
    assert roll.starts() == starts, "nothing was started twice"
    for alias in ("quick", "long"):
        ray_pool.remove(alias)


@pytest.mark.soak
def test_code_that_was_changed_where_it_lies_is_another_version(tmp_path: Path) -> None:
    """As by `pip install` on every node."""
    installed = tmp_path / "site-packages"
    shutil.copytree(Path(modelpool.__file__).parent, installed / "modelpool")
    with deployed_pool(PYTHONPATH=str(installed)) as pool:
        pool.register("quick", fake=True, min_replicas=1)
        pool.wait_active("quick")
        roll = Roll(pool, [pool.url])
        assert roll.versions() == {modelpool.__version__}
        with ConstantLoad(roll.urls, "quick", pool.key, 20) as load:
            shutil.copytree(another_version(tmp_path / "later"), installed, dirs_exist_ok=True)
            roll.deploy()
            assert roll.versions() == {VERSION}
        assert not load.failures()
