"""A pool on Ray as a user has it: `modelpool deploy`, a worker started by script; on one machine, as several nodes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

from modelpool.cluster.head import TAG
from modelpool.home import Home
from modelpool.pool_address import local_address
from modelpool.settings import Settings
from tests.e2e.pool import PoolProcess, end, eventually, processes_of

SCRIPTS = Path(__file__).parents[1] / "scripts"
BIN = Path(sys.executable).parent
_SMALL = "--num-cpus=1 --object-store-memory=80000000 --min-worker-port=0 --max-worker-port=0"
_HEAD = f"{_SMALL} --port=0 --dashboard-agent-listen-port=0"
RAY_STARTS = 3
"""Ray gives a node 30 s to start, whatever else the machine has to do; so it is tried again."""


class RayPool(PoolProcess):
    """`process` is the worker's; `folder` has the homes of all nodes, and Ray's own files."""

    def __init__(self, worker: subprocess.Popen[str], folder: Path, environ: dict[str, str], url: str) -> None:
        super().__init__(worker, folder / "home", environ["MODELPOOL_RUN_ID"], url)
        self.folder = folder
        self.environ = environ
        self.dashboard = ""

    @property
    def key(self) -> str:
        """The admin key, which opens inference too."""
        return str(self.http.headers["authorization"][7:])

    def command(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return modelpool(*arguments, environ={**self.environ, **more})

    @property
    def ray_address(self) -> str:
        return (self.folder / "ray" / "ray_current_cluster").read_text().strip()

    def connect(self) -> None:
        """As a user's program does, once for all tests."""
        if not ray.is_initialized():
            context = ray.init(address=self.ray_address, namespace="modelpool", log_to_driver=False)
            self.dashboard = f"http://{context.dashboard_url}"

    def actor(self) -> Any:
        """`ray.get_actor("manager")`."""
        self.connect()
        return ray.get_actor("manager")

    def ray_process(self, title: str, home: Path | None = None) -> psutil.Process:
        """The one whose title begins so, of the node of this home."""

        def found() -> psutil.Process | None:
            return next((each for each in ray_processes(home or self.home) if _title(each).startswith(title)), None)

        return eventually(found, 60, lambda: f"{title}: {[_title(each) for each in ray_processes(self.home)]}")

    def add_node(self, number: int) -> Path:
        """Another node, whose gateway listens on 127.0.0.<number>; its home, once the gateway serves."""
        home = self.folder / f"home{number}"
        self._ray_start(home, f"--address={self.ray_address} {_SMALL}", SERVE_HOST=f"127.0.0.{number}")
        eventually(lambda: local_address(Settings(home=str(home))), 120, lambda: f"a gateway of {home}")
        return home

    def start_head(self) -> None:
        """Where it was, with what it was started with, but not by `deploy`."""
        self._ray_start(self.home, f"--head {self.environ['MODELPOOL_RAY_ARGS']}")

    def _ray_start(self, home: Path, arguments: str, **more: str) -> None:
        environ = {**self.environ, "MODELPOOL_HOME": str(home), "SERVE_PORT": "0", "SPT_NOENV": "1", TAG: str(home)}
        command = [str(BIN / "ray"), "start", "--disable-usage-stats", *arguments.split()]
        for _ in range(RAY_STARTS):
            done = subprocess.run(command, env={**environ, **more}, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
            kill_ray(home)
        assert done.returncode == 0, done.stderr

    def node_url(self, home: Path) -> str:
        address = local_address(Settings(home=str(home)))
        assert address is not None
        return address.url


def modelpool(*arguments: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modelpool.cli", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, check=False)


def deploy(environ: dict[str, str]) -> None:
    """`modelpool deploy`."""
    for _ in range(RAY_STARTS):
        done = modelpool("deploy", "--json", environ=environ)
        if "timed out during startup" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr


def ray_processes(home: Path) -> list[psutil.Process]:
    """All of the Ray that was started for this home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TAG) == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill_ray(home: Path) -> None:
    """As when the node loses its power, but for the gateway processes."""
    processes = ray_processes(home)
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=30)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def environment(folder: Path, **more: str) -> dict[str, str]:
    ours = ("MODELPOOL_", "SERVE_", "RAY_", "WORKER_", "MANAGER_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {
        **inherited,
        "MODELPOOL_HOME": str(folder / "home"),
        "MODELPOOL_RUN_ID": f"test-{secrets.token_hex(6)}",
        "MODELPOOL_RAY_ARGS": f"{_HEAD} --temp-dir={folder}/ray --ray-client-server-port={free_port()}",
        "MODELPOOL_ENGINES": "fake",
        "MODELPOOL_HEARTBEAT_INTERVAL": "1",
        "RAY_TMPDIR": str(folder / "ray"),
        "SERVE_PORT": "0",
        "WORKER_ID": "w1",
        "WORKER_PORT": "0",
        "SPT_NOENV": "1",
        **more,
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Short: Ray's sockets lie deep in it. Whatever of Ray and of the pool still runs in it is ended."""
    folder = Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp"))
    try:
        yield folder
    finally:
        if ray.is_initialized():
            ray.shutdown()
        left = [each for home in folder.glob("home*") for each in ray_processes(home)]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=30)
        for home in folder.glob("home*"):
            Home(home).give_back()  # a node that was lost could not
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def deployed_pool(*, dashboard: bool = False, ray_args: str = "", **environ: str) -> Iterator[RayPool]:
    """`modelpool deploy` and a worker until the block ends; then `undeploy`, after which not one process is left, but
    for the Ray of nodes that were added.

    `ray_args` are more arguments for the head. The dashboard is what `serve status` asks, and most of the work of Ray's
    start.
    """
    with ray_folder() as folder:
        given = environment(folder, **environ)
        more = (
            " --dashboard-port=0"
            if dashboard
            else " --include-dashboard=false --include-log-monitor=false --no-monitor"
        )
        given["MODELPOOL_RAY_ARGS"] += f"{more} {ray_args}"
        try:
            deploy(given)
            url = eventually(lambda: local_address(Settings(home=str(folder / "home"))), 5, lambda: "an address").url
            with started_worker(folder, given, url) as worker:
                pool = RayPool(worker, folder, given, url)
                yield pool
                pool.http.close()
            if ray.is_initialized():
                ray.shutdown()
            done = modelpool("undeploy", environ=given)
            assert done.returncode == 0, done.stdout + done.stderr
            for home in folder.glob("home?*"):
                kill_ray(home)
        finally:
            left = processes_of(given["MODELPOOL_RUN_ID"])
            for each in left:
                each.kill()
        assert left == [], [(_title(each), each.pid) for each in left]
        assert not ray_processes(folder / "home")


@contextmanager
def started_worker(
    folder: Path, environ: dict[str, str], url: str, within: Callable[[list[str]], list[str]] = list
) -> Iterator[subprocess.Popen[str]]:
    """`scripts/start_worker.sh`, registered at this gateway; `within` says by which command it is run."""
    name = f"worker-{environ['WORKER_ID']}"
    given = {**environ, "MANAGER_URL": url, "MODELPOOL_TOKEN": (folder / "home" / "cluster-token").read_text().strip()}
    given["MODELPOOL_HOME"] = str(folder / name)
    process = subprocess.Popen(
        within([str(SCRIPTS / "start_worker.sh")]),
        env={**given, "PATH": f"{BIN}:{given['PATH']}"},
        cwd=SCRIPTS.parent,
        stdout=(folder / f"{name}.log").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            end(process, signal.SIGTERM)
