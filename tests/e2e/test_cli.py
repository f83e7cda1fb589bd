"""The command line against a running pool of fake engines."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelpool.home import Home
from tests.e2e.conftest import FAKE_ONLY
from tests.e2e.pool import PoolProcess, end, eventually, start_up, wait_ready

CLI = [sys.executable, "-m", "modelpool.cli"]


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODELPOOL_", "SERVE_"))}
    return {**kept, "MODELPOOL_HOME": str(home), "TERM": "dumb", "COLUMNS": "80", **more}


def run(pool: PoolProcess, *arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(pool.home, **more),
    )


def test_waiting_lasts_until_all_replicas_are_ready(fake_pool: PoolProcess) -> None:
    done = run(
        fake_pool, "register", "cli-pair", "--fake", "--min-replicas", "2", "--set", "fake_load_ms=300", "--wait"
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^cli-pair +ACTIVE +fake +2/2 ", done.stdout, re.MULTILINE)
    told = [line for line in done.stdout.splitlines() if line.startswith("cli-pair: ")]
    assert len(told) == len(set(told))
    fake_pool.remove("cli-pair")


def test_waiting_ends_at_once_for_what_no_worker_could_ever_take(fake_pool: PoolProcess) -> None:
    begin = time.monotonic()
    done = run(fake_pool, "register", "cli-huge", "--fake", "--gpu-memory-gb", "900000", "--wait")
    assert done.returncode == 1
    assert time.monotonic() - begin < 10
    assert "error: cli-huge is not ready: no worker can take it: w1: needs 900000.0 GB" in done.stderr
    fake_pool.remove("cli-huge")


def test_waiting_ends_when_its_time_is_over(fake_pool: PoolProcess) -> None:
    arguments = ["register", "cli-late", "--fake", "--set", "fake_load_ms=30000", "--wait", "--timeout", "0.5"]
    done = run(fake_pool, *arguments)
    assert done.returncode == 1
    assert "cli-late is not ready: it is starting on w1" in done.stderr
    assert json.loads(run(fake_pool, *arguments, "--json").stdout)["state"] == "STARTING"
    fake_pool.remove("cli-late")


def test_a_failed_start_ends_waiting_with_its_reason(fake_pool: PoolProcess) -> None:
    done = run(fake_pool, "register", "cli-bad", "--fake", "--set", "fake_load_error=Too heavy.", "--wait")
    assert done.returncode == 1
    assert "error: cli-bad is not ready: it failed" in done.stderr
    assert "Too heavy; " in done.stderr
    assert "removes it" in done.stderr
    fake_pool.remove("cli-bad")


def test_every_row_is_a_line_and_replicas_are_in_order(fake_pool: PoolProcess) -> None:
    fake_pool.register("cli-many", fake=True, min_replicas=11, fake_load_error="no " * 60)
    eventually(
        lambda: all(each["failures"] for each in fake_pool.model("cli-many")["instances"]),
        30,
        lambda: "eleven failures",
    )
    shown = run(fake_pool, "status").stdout
    rows = [line.split()[0] for line in shown.splitlines() if line.startswith("cli-many")]
    assert rows == ["cli-many", "cli-many", *(f"cli-many-r{number}" for number in range(2, 12))]
    assert f"`kill {fake_pool.process.pid}` ends this pool" in shown
    fake_pool.remove("cli-many")


def test_settings_are_changed_while_a_model_runs(fake_pool: PoolProcess) -> None:
    fake_pool.register("cli-set", fake=True)
    fake_pool.wait_active("cli-set")
    host = fake_pool.one("modelpool: host cli-set").pid
    changed = json.loads(run(fake_pool, "set", "cli-set", "min_replicas=2", "pinned=true", "--json").stdout)
    assert (changed["spec"]["min_replicas"], changed["spec"]["pinned"], changed["wanted"]) == (2, True, 2)
    view = fake_pool.wait_active("cli-set", replicas=2)
    assert host in [each["pid"] for each in view["instances"]]
    refused = run(fake_pool, "set", "cli-set", "max_model_len=9")
    assert refused.returncode == 1
    assert "error: `max_model_len`: an instance keeps what it was started with." in refused.stderr
    assert run(fake_pool, "set", "cli-set", "min_replicas=null", "max_replicas=1").returncode == 0
    eventually(
        lambda: [each["pid"] for each in fake_pool.model("cli-set")["instances"]] == [host],
        30,
        lambda: f"one replica: {fake_pool.model('cli-set')}",
    )
    fake_pool.remove("cli-set")


def test_a_file_of_models_is_applied_once_and_a_bad_one_not_at_all(fake_pool: PoolProcess, tmp_path: Path) -> None:
    def models() -> set[str]:
        return {each["alias"] for each in fake_pool.status()["models"]}

    before = models()
    good = "models:\n- {alias: cli-a, fake: true}\n- {alias: cli-b, fake: true, max_replicas: 1}\n"
    file = tmp_path / "models.yaml"
    file.write_text(good + "- {alias: cli-c, fake: true, max_replicas: none}\n")
    bad = run(fake_pool, "apply", "-f", str(file), "--yes")
    assert (bad.returncode, models()) == (2, before)
    assert f"error: {file}:4: in `models[2].max_replicas`: " in bad.stderr

    file.write_text(good)
    unasked = run(fake_pool, "apply", "-f", str(file))
    assert (unasked.returncode, unasked.stdout, models()) == (1, "+ register cli-a\n+ register cli-b\n", before)
    assert run(fake_pool, "apply", "-f", str(file), "--yes").returncode == 0
    fake_pool.wait_active("cli-a")
    host = fake_pool.one("modelpool: host cli-a").pid
    again = run(fake_pool, "apply", "-f", str(file))
    assert (again.returncode, again.stdout) == (0, "Nothing is to be done.\n")

    changed = good.replace("cli-a, fake: true", "cli-a, fake: true, pinned: true")
    file.write_text(changed.replace("max_replicas: 1", "max_replicas: 1, fake_capacity: 2"))
    differing = run(fake_pool, "diff", "-f", str(file))
    assert (differing.returncode, differing.stdout.splitlines()[0]) == (1, "~ change cli-a")
    fixed = run(fake_pool, "apply", "-f", str(file), "--yes")
    assert fixed.returncode == 1
    assert "error: cli-b cannot change in fake_capacity while it runs; nothing was done." in fixed.stderr
    assert not fake_pool.model("cli-a")["spec"].get("pinned")
    assert run(fake_pool, "apply", "-f", str(file), "--yes", "--replace").returncode == 0
    assert fake_pool.model("cli-a")["spec"]["pinned"]
    assert fake_pool.one("modelpool: host cli-a").pid == host
    assert fake_pool.model("cli-b")["spec"]["fake_capacity"] == 2

    dump = tmp_path / "pool.yaml"
    dump.write_text(run(fake_pool, "dump").stdout)
    fake_pool.remove("cli-b")
    loaded = run(fake_pool, "load", str(dump))
    assert (loaded.returncode, loaded.stdout) == (0, "loaded 1 models and 0 keys\n")
    assert run(fake_pool, "diff", "-f", str(file)).returncode == 0

    listed = run(fake_pool, "dump", "--models").stdout
    kept = listed.replace("alias: cli-a", "alias: cli-kept").replace("alias: cli-b", "alias: cli-too")
    assert run(fake_pool, "apply", "-f", "-", "--yes", "--prune", stdin=kept).returncode == 0
    assert models() == before | {"cli-kept", "cli-too"}
    for alias in ("cli-kept", "cli-too"):
        fake_pool.remove(alias)


def test_what_is_piped_into_chat_is_one_prompt(fake_pool: PoolProcess) -> None:
    fake_pool.register("cli-parrot", fake=True)
    fake_pool.wait_active("cli-parrot")
    done = run(fake_pool, "chat", "cli-parrot", stdin="two\nlines\n", MODELPOOL_URL=f"{fake_pool.url[7:]}/v1/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "You said: two\nlines\n", "")
    assert run(fake_pool, "chat", "cli-parrot").returncode == 1
    missing = run(fake_pool, "chat", "nobody", stdin="hi")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith("error: The model `nobody` is not registered.")


def test_a_conversation_in_a_terminal_goes_on_after_an_error(fake_pool: PoolProcess) -> None:
    fake_pool.register("cli-talker", fake=True)
    fake_pool.wait_active("cli-talker")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*CLI, "chat", "cli-talker"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment(fake_pool.home)
    ) as chat:
        os.close(theirs)
        try:
            until(ours, "> ")
            os.write(ours, b"one\n")
            until(ours, "You said: one")
            fake_pool.remove("cli-talker")
            os.write(ours, b"two\n")
            until(ours, "is not registered")
            fake_pool.register("cli-talker", fake=True)
            fake_pool.wait_active("cli-talker")
            os.write(ours, b"\x1b[A\x1b[A\n")  # two up: the question before the last
            until(ours, "You said: one")
            os.write(ours, b"/bye\n")
            assert chat.wait(10) == 0
        finally:
            chat.kill()
            os.close(ours)


def until(terminal: int, text: str) -> None:
    """Read from a terminal until it has shown this."""
    shown, deadline = "", time.monotonic() + 30
    while text not in shown:
        readable, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, f"not within 30 s: {text!r} in {shown!r}"
        shown += os.read(terminal, 4096).decode(errors="replace")


def test_a_command_waits_for_a_manager_that_is_started_again(mending_pool: PoolProcess) -> None:
    mending_pool.register("m", fake=True)
    mending_pool.one("modelpool: manager").send_signal(signal.SIGKILL)
    done = run(mending_pool, "ls")
    assert done.returncode == 0, done.stderr
    assert "\nm  " in done.stdout


def test_a_worker_that_was_stopped_is_not_listed(mending_pool: PoolProcess) -> None:
    more = {"MODELPOOL_ENGINES": "fake", "MANAGER_URL": mending_pool.url}
    with subprocess.Popen(
        [*CLI, "worker", "--worker-id", "w2", "--port", "0"],
        env=environment(mending_pool.home, **more),
        stderr=subprocess.PIPE,
        text=True,
    ) as worker:
        try:
            eventually(lambda: len(mending_pool.status()["workers"]) == 2, 20, lambda: "a second worker")
            taken = run(mending_pool, "worker", "--worker-id", "w2", "--port", "0", **more)
            worker.send_signal(signal.SIGTERM)
            _, log = worker.communicate(timeout=20)
        finally:
            worker.kill()
    assert [each["worker_id"] for each in mending_pool.status()["workers"]] == ["w1"]
    assert "unregistered at" in log
    assert taken.returncode == 1
    assert (
        f"error: worker-w2 is already running (process {worker.pid}) in the home {mending_pool.home}.\n" in taken.stderr
    )
    assert "--worker-id" in taken.stderr


def test_what_a_home_holds_is_its_owners_only(mending_pool: PoolProcess) -> None:
    mending_pool.register("m", fake=True)
    mending_pool.wait_active("m")
    files = [path for path in mending_pool.home.rglob("*") if path.is_file()]
    assert {"modelpool.db", "pool.json", "forkserver-w1-fake.log"} <= {path.name for path in files}
    assert [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_up_says_that_it_ends_and_what_it_prints_can_be_typed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    Home(home)
    process = start_up(home, "--no-demo", run_id=f"test-{os.getpid()}-ends", **FAKE_ONLY)
    try:
        ready = wait_ready(process)
        second = subprocess.run(
            [*CLI, "up", "--no-demo"], capture_output=True, text=True, check=False, timeout=30, env=environment(home)
        )
        assert f"`kill {process.pid}` ends it" in second.stderr
        status = re.search(r"`(.*) status` shows the pool", second.stderr)
        assert status is not None
        shown = subprocess.run(
            f"{status[1]} status", shell=True, capture_output=True, text=True, check=True, env=environment(home)
        )
        assert ready["run_id"] in shown.stdout
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
        assert {"event": "ending"} in [json.loads(line) for line in said.splitlines()]
    finally:
        end(process)


@pytest.mark.parametrize("command", ["up", "worker", "ls"])
def test_a_home_of_no_use_is_an_error_without_a_trace(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home"
    done = subprocess.run(
        [*CLI, command],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=environment(home, MODELPOOL_URL="http://127.0.0.1:1"),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    if command != "ls":  # which needs no home
        assert f"error: The home {home} cannot be used: Not a directory" in done.stderr
        assert "MODELPOOL_HOME" in done.stderr


def test_a_start_is_explained_by_its_phases(fake_pool: PoolProcess) -> None:
    assert run(fake_pool, "register", "cli-slow", "--fake", "--set", "fake_load_ms=400", "--wait").returncode == 0
    shown = run(fake_pool, "explain-start", "cli-slow")
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[0] == ["cli-slow", "on", "w1"]
    assert [line[0] for line in lines[1:]] == ["PHASE", "fetch", "import", "fork", "load", "app", "all"]
    seconds = {line[0]: float(line[1]) for line in lines[2:]}
    assert 0.4 <= seconds["load"] < seconds["all"]
    [start] = json.loads(run(fake_pool, "explain-start", "cli-slow", "--json").stdout)
    assert (start["instance"], start["worker_id"]) == ("cli-slow", "w1")
    assert [phase["name"] for phase in start["phases"]] == ["fetch", "import", "fork", "load", "app"]
    fake_pool.remove("cli-slow")
    nowhere = run(fake_pool, "explain-start", "cli-nowhere")
    assert (nowhere.returncode, "cli-nowhere" in nowhere.stderr) == (1, True)
    fake_pool.register("cli-late", fake=True, fake_load_ms=60_000)
    late = run(fake_pool, "explain-start", "cli-late")
    assert late.returncode == 1
    assert "no instance of cli-late has started: it is " in late.stderr
    fake_pool.remove("cli-late")


def test_what_a_pool_does_is_recorded_and_can_be_simulated(fake_pool: PoolProcess, tmp_path: Path) -> None:
    fake_pool.register("taped", fake=True, fake_delay_ms=50)
    fake_pool.wait_active("taped")
    trace = tmp_path / "trace.csv"
    command = [*CLI, "record", "--for", "60s", str(trace)]
    with subprocess.Popen(command, env=environment(fake_pool.home), stdout=subprocess.PIPE, text=True) as recording:
        eventually(trace.exists, 30, lambda: "a trace")

        def is_recorded() -> bool:
            body = {"model": "taped", "prompt": "x"}
            assert fake_pool.http.post("/v1/completions", json=body).status_code == 200
            return "taped" in trace.read_text()

        eventually(is_recorded, 30, lambda: "a request in the trace")
        recording.send_signal(signal.SIGTERM)
        said, _ = recording.communicate(timeout=30)
    assert recording.returncode == 0
    assert f"in {trace}" in " ".join(said.split())
    assert "taped" in (tmp_path / "trace.pool.yaml").read_text()
    simulated = run(fake_pool, "simulate", str(trace), "--json")
    assert simulated.returncode == 0, simulated.stderr
    assert json.loads(simulated.stdout)["ladder"]["answered"] > 0
    assert run(fake_pool, "record", "--for", "soon", str(trace)).returncode == 2
