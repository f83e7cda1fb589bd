"""What the command line says without a pool. With one: tests/e2e/test_cli.py."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from modelpool import __version__
from modelpool.cli.app import app
from modelpool.cli.command import program
from modelpool.cli.tables import instances_table, models_table, progress_text
from modelpool.core.lifecycle import InstanceState
from modelpool.messages.admin import InstanceView, ModelView
from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import Progress


@pytest.fixture
def runner(tmp_path: Path) -> CliRunner:
    # Nothing listens on port 1.
    return CliRunner(env={"MODELPOOL_HOME": str(tmp_path), "MODELPOOL_URL": "http://127.0.0.1:1"})


def test_the_version_is_printed(runner: CliRunner) -> None:
    assert runner.invoke(app, ["--version"]).stdout.strip() == __version__


@pytest.mark.parametrize("command", [["ls"], ["status"], ["rm", "m"], ["logs", "m"], ["chat", "m", "hi"]])
def test_every_command_says_how_to_start_a_pool_when_there_is_none(runner: CliRunner, command: list[str]) -> None:
    done = runner.invoke(app, command)
    assert done.exit_code == 1
    assert "no pool answers at http://127.0.0.1:1" in done.stderr
    assert f"`{program()} up`" in done.stderr


def test_a_bad_setting_is_named(runner: CliRunner) -> None:
    done = runner.invoke(app, ["ls"], env={"SERVE_PORT": "x"})
    assert done.exit_code == 2
    assert "SERVE_PORT='x'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["m", "--set", "fake"], "'fake' is not of the form name=value"),
        (["--file", "/no/such/file"], "/no/such/file cannot be read"),
    ],
)
def test_what_cannot_be_registered_is_said_before_anything_is_sent(
    runner: CliRunner, arguments: list[str], says: str
) -> None:
    done = runner.invoke(app, ["register", *arguments])
    assert done.exit_code != 0
    assert says in done.stderr


def shown(*instances: InstanceView, state: InstanceState, reason: str = "") -> str:
    model = ModelView(
        alias="m", state=state, reason=reason, spec=ModelSpec(alias="m", fake=True), created=0, instances=instances
    )
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(models_table([model]))
    console.print(instances_table([model]))
    return console.export_text()


def test_the_tables_show_progress_while_it_starts_and_the_reason_when_it_fails() -> None:
    fetching = InstanceView(
        instance="m",
        worker_id="w",
        state=InstanceState.STARTING,
        sleep_level_value=0,
        progress=Progress(phase="fetch", done_bytes=1_200_000_000, total_bytes=3_400_000_000),
    )
    assert "fetch 1.2 of 3.4 GB" in shown(fetching, state=InstanceState.STARTING)
    failed = InstanceView(
        instance="m",
        worker_id="w",
        state=InstanceState.FAILED,
        sleep_level_value=3,
        reason="no such file",
        failures=2,
        retry_in_s=4.0,
    )
    text = shown(failed, state=InstanceState.FAILED, reason="it failed 2 times on w: no such file")
    assert "it failed 2 times on w: no such file" in text
    assert "no such file (again in 4 s)" in text


def test_a_phase_without_sizes_is_its_name() -> None:
    assert progress_text(Progress(phase="load")) == "load"
