"""How soon a model without a process answers, beside vLLM's own server; and one that sleeps, beside one that is awake.

    python -m benchmarks.cold_start [--rounds 3]

The demo model, with the same arguments everywhere. A cold start of the pool is measured through the gateway: the model
is UNLOADED, a client asks, and the time is taken at the first token of the stream. vLLM's server is started anew and
asked again and again until its first token. Both have their compile caches for themselves, empty at first: so the first
run of each is the first start ever of the architecture, and warms up what comes after. Then they take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import psutil

from benchmarks.machine import Machine, Watch, commit
from benchmarks.report import table
from benchmarks.routers import end_on_sigterm
from modelpool import demo
from modelpool.messages.engine import StartPhase

LEVELS = (1, 2)
SHARE = 12
"""A cold start is to take at most one part in so many of the server's start."""
MORE_S = {1: 0.5, 2: 1.5}
"""And a request to a sleeper at most so much more than one to a model that is awake."""
_DEADLINE_S = 600.0
_RESULTS = Path(__file__).parent / "results" / "cold_start.md"
_BODY = {"prompt": "Model Pool", "max_tokens": 4, "temperature": 0, "stream": True}

T = TypeVar("T")


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds to the first token."""

    when: str
    commit: str
    machine: Machine
    server_first: float
    """vLLM's server, the first time ever."""
    pool_first: float
    """A model registered at a pool that has never run its architecture."""
    server: list[float]
    pool: list[float]
    phases: dict[str, list[float]]
    """Where the pool's starts went."""
    awake: list[float]
    asleep: dict[int, list[float]]
    """Of requests to a sleeper, by level."""
    spare_bytes: int
    """What a host that waits for a model has of its own, shared with nobody."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.server) / statistics.median(self.pool)

    def more(self, level: int) -> float:
        return statistics.median(self.asleep[level]) - statistics.median(self.awake)


# ------------------------------------------------------------ who is asked


def eventually(look: Callable[[], T | None]) -> T:
    """What it finds, once it finds something. Raises TimeoutError."""
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if found := look():
                return found
        time.sleep(0.01)
    raise TimeoutError(f"not within {_DEADLINE_S:g} s")


def first_token(http: httpx.Client, alias: str = demo.ALIAS) -> float | None:
    """When the first token came (of the monotonic clock); None where it is not served yet."""
    with http.stream("POST", "/v1/completions", json={"model": alias, **_BODY}) as answer:
        if answer.status_code in (404, 503):
            return None
        if answer.status_code != 200:
            raise RuntimeError(f"status {answer.status_code}: {answer.read().decode()}")
        came = None
        for line in answer.iter_lines():
            if came is None and line.startswith("data: {"):
                came = time.monotonic()
        return came


@contextmanager
def process(command: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own; at the end the session is gone."""
    with log.open("a") as output:
        started = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if "--json" in command else output,
            stderr=output,
            text=True,
            env={**_kept(), **environment},
            start_new_session=True,
        )
    try:
        yield started
    finally:
        started.send_signal(signal.SIGINT)
        try:
            started.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def _kept() -> dict[str, str]:
    ours = ("MODELPOOL_", "SERVE_", "ROUTER_", "MODEL_", "VLLM_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def server_start(folder: Path) -> float:
    """Seconds from the start of vLLM's server to its first token."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = ["-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(demo.model_path()), "--served-model-name", demo.ALIAS]
    command += ["--max-model-len", str(demo.MAX_MODEL_LEN), *_options(demo.engine_args())]
    environment = {"VLLM_CACHE_ROOT": str(folder / "server-cache"), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    began = time.monotonic()
    with process(command, folder / "server.log", environment) as server, _client(f"http://127.0.0.1:{port}") as http:

        def asked() -> float | None:
            if server.poll() is not None:
                raise RuntimeError(f"vLLM's server ended: {(folder / 'server.log').read_text()[-2000:]}")
            return first_token(http)

        return eventually(asked) - began


def _options(arguments: Mapping[str, Any]) -> list[str]:
    options: list[str] = []
    for name, value in arguments.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return options


def _client(url: str, token: str = "") -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=url, headers=headers, timeout=_DEADLINE_S, trust_env=False)


class Pool:
    """A pool, seen from outside: what it does with one model, the demo where nothing else is said."""

    def __init__(self, run_id: str, gateway: httpx.Client, worker: httpx.Client) -> None:
        self.alias = demo.ALIAS
        self.gateway = gateway
        self.worker = worker
        self._run_id = run_id

    def first_token(self) -> float:
        """Seconds to the first token of a request through the gateway, which waits for what it must."""
        began = time.monotonic()
        came = first_token(self.gateway, self.alias)
        if came is None:
            raise RuntimeError(f"no answer: {self.model()}")
        return came - began

    def model(self) -> dict[str, Any]:
        view: dict[str, Any] = self.gateway.get(f"/admin/models/{self.alias}").json()
        return view

    def sleep(self, level: int) -> None:
        """Return once it is at that level (3: UNLOADED), and the manager knows that nobody asks for it."""
        answer = self.worker.post(f"/instances/{self.alias}/sleep", json={"level": level})
        answer.raise_for_status()
        state = {1: "SLEEP_1", 2: "SLEEP_2", 3: "UNLOADED"}[level]

        def settled() -> bool:
            view = self.model()
            return bool(view["state"] == state and view["decision"].startswith("none:"))

        eventually(settled)

    def phases(self) -> tuple[StartPhase, ...]:
        report = self.worker.get(f"/instances/{self.alias}").json()
        return msgspec.convert(report["phases"], tuple[StartPhase, ...])

    def spares(self) -> list[psutil.Process]:
        found = []
        for each in psutil.process_iter(["cmdline"]):
            with suppress(psutil.Error):
                if " ".join(each.info["cmdline"] or ()).startswith("modelpool: spare"):
                    found += [each] if each.environ().get("MODELPOOL_RUN_ID") == self._run_id else []
        return found


@contextmanager
def pool(folder: Path, **environ: str) -> Iterator[Pool]:
    """One whose forkserver has imported the engine, with a home in `folder`: at first it knows no model."""
    run_id = f"bench-{secrets.token_hex(6)}"
    home = folder / "home"
    command = ["-m", "modelpool.cli", "up", "--json", "--no-demo", "--port", "0", "--worker-port", "0"]
    environment = {"MODELPOOL_HOME": str(home), "MODELPOOL_RUN_ID": run_id, "MODELPOOL_ENGINES": "vllm"}
    with process(command, folder / "pool.log", {**environment, **environ}) as up, ExitStack() as stack:
        assert up.stdout is not None
        url = next((said["url"] for line in up.stdout if (said := json.loads(line))["event"] == "ready"), None)
        if url is None:
            raise RuntimeError(f"no pool: {(folder / 'pool.log').read_text()[-2000:]}")
        gateway = stack.enter_context(_client(url, (home / "admin-key").read_text().strip()))
        [worker] = gateway.get("/admin/workers").json()["workers"]
        http = stack.enter_context(_client(worker["url"], (home / "cluster-token").read_text().strip()))
        eventually(lambda: http.get("/info").json()["engines"]["vllm"]["state"] == "ready")
        yield Pool(run_id, gateway, http)


# ------------------------------------------------------------ what is measured


def register(pool: Pool) -> float:
    """Seconds from the demo's registration to its first token."""
    began = time.monotonic()
    body = {
        "alias": demo.ALIAS,
        "model_name": str(demo.model_path()),
        "max_model_len": demo.MAX_MODEL_LEN,
        "engine_args": demo.engine_args(),
    }
    pool.gateway.post("/admin/models/register", json=body).raise_for_status()
    pool.first_token()
    return time.monotonic() - began


def run(rounds: int) -> Results:
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="modelpool-bench-") as name:
        folder = Path(name)
        say("vLLM's server, the first time ever")
        server_first = server_start(folder)
        with pool(folder) as ours:
            say("the pool, the first time ever")
            pool_first = register(ours)
            ours.sleep(3)
            ours.first_token()
            server, cold, phases = [], [], []
            for number in range(rounds):
                ours.sleep(3)
                say(f"round {number + 1}: vLLM's server")
                server.append(server_start(folder))
                say(f"round {number + 1}: the pool")
                cold.append(ours.first_token())
                phases.append(ours.phases())
            say("sleepers")
            awake, asleep = sleepers(ours, rounds)
            spare = [each.memory_full_info().uss for each in ours.spares()]
    return Results(
        when=datetime.now().strftime("%Y-%m-%d %H:%M"),
        commit=commit(),
        machine=watch.machine(),
        server_first=server_first,
        pool_first=pool_first,
        server=server,
        pool=cold,
        phases=by_name(phases),
        awake=awake,
        asleep=asleep,
        spare_bytes=max(spare, default=0),
    )


def sleepers(pool: Pool, rounds: int) -> tuple[list[float], dict[int, list[float]]]:
    awake: list[float] = []
    asleep: dict[int, list[float]] = {level: [] for level in LEVELS}
    for _ in range(3 * rounds):
        for level in LEVELS:
            awake.append(pool.first_token())
            pool.sleep(level)
            asleep[level].append(pool.first_token())
    return awake, asleep


def by_name(starts: list[tuple[StartPhase, ...]]) -> dict[str, list[float]]:
    """The seconds of each phase, in all starts, in their order."""
    found: dict[str, list[float]] = {}
    for start in starts:
        for phase in start:
            found.setdefault(phase.name, []).append(phase.seconds)
    return found


def say(what: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {what} …", file=sys.stderr, flush=True)


def report(results: Results) -> str:
    def row(what: str, seconds: list[float], *, at_most: str = "", kept: str = "") -> list[str]:
        return [what, f"{statistics.median(seconds):.2f}", _all(seconds), at_most, kept]

    def verdict(right: bool) -> str:
        return "yes" if right else "no"

    server = statistics.median(results.server)
    rows = [
        row("vLLM's server: start to first token", results.server),
        row(
            "the pool: UNLOADED to first token",
            results.pool,
            at_most=f"{server / SHARE:.2f}",
            kept=verdict(results.ratio >= SHARE),
        ),
        row("vLLM's server, the first time ever", [results.server_first]),
        row("the pool, the first time ever, from the registration", [results.pool_first]),
        row("awake to first token", results.awake),
    ]
    for level in LEVELS:
        more = [each - statistics.median(results.awake) for each in results.asleep[level]]
        right = verdict(results.more(level) <= MORE_S[level])
        rows.append(row(f"SLEEP_{level} to first token, more than awake", more, at_most=str(MORE_S[level]), kept=right))
    phases = ", ".join(f"{name} {statistics.median(each):.2f}" for name, each in results.phases.items())
    machine = results.machine
    return "\n".join(
        [
            f"{results.when}, commit {results.commit}, Python {machine.python}, {machine.cores} cores of "
            f"{machine.processor}, of which others took {machine.others:.0%} meanwhile. Seconds.",
            "",
            table(["what", "median", "all", "at most", "kept"], rows),
            "",
            f"The server takes {results.ratio:.1f} times as long as the pool. A start of the pool by phase (medians): "
            f"{phases}. A host that waits for a model has {results.spare_bytes / 1e6:.0f} MB of its own.",
        ]
    )


def _all(seconds: list[float]) -> str:
    return f"{min(seconds):.2f} to {max(seconds):.2f} ({len(seconds)})" if len(seconds) > 1 else ""


def main() -> None:
    end_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=_RESULTS, help="the Markdown file that is written")
    given = parser.parse_args()
    text = report(run(given.rounds))
    print(text)
    given.out.write_text(f"# Cold starts\n\nWritten by `python -m benchmarks.cold_start`.\n\n{text}\n")


if __name__ == "__main__":
    main()
