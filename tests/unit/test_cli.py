"""What the command line says without a pool. With one: tests/e2e/test_cli.py."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import structs
from rich.console import Console
from typer.testing import CliRunner

from modelpool import __version__
from modelpool.cli.app import app
from modelpool.cli.chat import Chat, converse
from modelpool.cli.client import Trouble
from modelpool.cli.command import command, program
from modelpool.cli.listing import natural
from modelpool.cli.output import report, sentence
from modelpool.cli.tables import devices_text, instances_table, models_table, phases_table, progress_text
from modelpool.cli.waiting import News, has_failed, is_ready
from modelpool.core.lifecycle import InstanceState
from modelpool.messages.admin import InstanceView, ModelView
from modelpool.messages.engine import StartPhase
from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import Device, Progress
from modelpool.process import StartupError
from modelpool.tcp import bind_tcp


@pytest.fixture
def runner(tmp_path: Path) -> CliRunner:
    # Nothing listens on port 1.
    return CliRunner(env={"MODELPOOL_HOME": str(tmp_path), "MODELPOOL_URL": "http://127.0.0.1:1"})


def test_the_version_is_printed(runner: CliRunner) -> None:
    assert runner.invoke(app, ["--version"]).stdout.strip() == __version__


@pytest.mark.parametrize(
    "command", [["ls"], ["status"], ["rm", "m"], ["logs", "m"], ["explain-start", "m"], ["chat", "m", "hi"]]
)
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


def model(*instances: InstanceView, reason: str = "", wanted: int = 1, permanent: bool = False) -> ModelView:
    states = [each.state for each in instances] or [InstanceState.UNLOADED]
    return ModelView(
        alias="m",
        state=states[0],
        reason=reason,
        spec=ModelSpec(alias="m", fake=True),
        created=0,
        instances=instances,
        wanted=wanted,
        permanent=permanent,
    )


def instance(state: InstanceState, *, failures: int = 0, progress: Progress | None = None) -> InstanceView:
    return InstanceView(
        instance="m", worker_id="w", state=state, sleep_level_value=0, failures=failures, progress=progress
    )


@pytest.mark.parametrize("width", [20, 80])
def test_a_row_is_one_line_however_narrow_the_terminal_is(width: int) -> None:
    reason = "it failed on w: " + "a long reason with many words, " * 10 + "\nand a second line"
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(models_table([model(instance(InstanceState.FAILED, failures=1), reason=reason)]), soft_wrap=True)
    header, row = console.export_text().splitlines()
    assert header == "MODEL  STATE   ENGINE  REPLICAS  WHERE  NOTE"
    assert row.endswith("many words, and a second line")
    # A live display, which a terminal must not wrap, ends its lines at the edge.
    console.print(models_table([model(reason=reason)]))
    assert [len(line) for line in console.export_text().splitlines()] == [min(46, width), width]


def test_replicas_are_counted_against_those_that_are_wanted() -> None:
    table = models_table([model(instance(InstanceState.ACTIVE), instance(InstanceState.STARTING), wanted=3)])
    assert "  1/3  " in table.lines()[1].plain


def test_devices_of_one_kind_are_shown_together() -> None:
    gpus = [
        Device(index=index, kind="cuda", name="H200", total_bytes=140 * 10**9, free_bytes=100 * 10**9)
        for index in range(4)
    ]
    assert devices_text(gpus) == "4 × H200: 400.0 of 560.0 GB free"
    fallen = structs.replace(gpus[1], lost="GPU is lost", free_bytes=0)
    assert devices_text([gpus[0], fallen]) == "2 × H200: 100.0 of 280.0 GB free, 1 lost"
    assert devices_text(gpus[3:]) == "cuda3 H200: 100.0 of 140.0 GB free"


def test_names_with_numbers_sort_by_the_numbers() -> None:
    assert sorted(["w10", "w2", "a", "w"], key=natural) == ["a", "w", "w2", "w10"]


def test_waiting_ends_when_all_replicas_are_ready_or_one_has_failed() -> None:
    active, starting = instance(InstanceState.ACTIVE, failures=1), instance(InstanceState.STARTING)
    some = model(active, starting, wanted=2)
    assert not is_ready(some)
    assert not has_failed(some)
    assert is_ready(model(active, active, wanted=2))
    assert has_failed(model(active, instance(InstanceState.FAILED, failures=1), wanted=2))
    assert has_failed(model(reason="needs 9000.0 GB", permanent=True))


def test_a_line_is_told_again_only_when_more_than_numbers_changed() -> None:
    def fetched(gb: float) -> ModelView:
        progress = Progress(phase="fetch", done_bytes=int(gb * 10**9), total_bytes=10 * 10**9)
        return model(instance(InstanceState.STARTING, progress=progress))

    news = News()
    assert news.of(model(reason="needs 8.0 GB, 3.1 GB free")) == "UNLOADED: needs 8.0 GB, 3.1 GB free"
    assert news.of(model(reason="needs 8.0 GB, 3.2 GB free")) == ""
    assert news.of(fetched(0.5)) == "STARTING: fetch 0.5 of 10.0 GB"
    assert news.of(fetched(0.9)) == ""
    assert news.of(fetched(1.1)) == "STARTING: fetch 1.1 of 10.0 GB"
    assert news.of(model(reason="needs 8.0 GB, 3.2 GB free")) != ""


class Scripted(Chat):
    """A chat whose answers are told: a text, or what is raised after it."""

    def __init__(self, answers: dict[str, str | BaseException]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def ask(self, question: str) -> Iterator[str]:
        self.asked.append(question)
        answer = self.answers[question]
        yield "so "
        if isinstance(answer, BaseException):
            raise answer
        yield answer


@pytest.mark.parametrize("end", ["/bye", "/exit", EOFError(), KeyboardInterrupt()])
def test_a_conversation_outlives_errors_and_interrupts_and_ends_when_asked(
    end: str | BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["one", "", "two", " three ", "four", end, "never"])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    chat = Scripted(
        {"one": "1", "two": Trouble("the answer broke off", "Look."), "three": KeyboardInterrupt(), "four": "4"}
    )
    converse(chat, Console(file=sys.stdout, width=80), read)
    said = capsys.readouterr()
    assert chat.asked == ["one", "two", "three", "four"]
    assert "so 1\n" in said.out
    assert "so 4\n" in said.out
    assert "(stopped)" in said.out
    assert said.err == "error: the answer broke off.\nLook.\n"


@pytest.mark.parametrize(
    ("text", "shown"), [("a", "a."), ("a.", "a."), ("a..", "a."), ("a?", "a?"), ("a…", "a…"), ("a: [x].\n", "a: [x].")]
)
def test_a_message_ends_in_one_full_stop(text: str, shown: str) -> None:
    assert sentence(text) == shown


def test_what_looks_like_markup_in_a_message_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    report("`devices[0]`: [red] is no device")
    assert capsys.readouterr().err == "error: `devices[0]`: [red] is no device.\n"


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1:1/", "http://127.0.0.1:1/v1", "127.0.0.1:1/v1/"])
def test_an_address_may_be_written_as_people_write_it(runner: CliRunner, url: str) -> None:
    done = runner.invoke(app, ["ls", "--url", url])
    assert "no pool answers at http://127.0.0.1:1.\n" in done.stderr


def test_the_command_is_shown_as_it_was_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    own = tmp_path / "bin" / "modelpool"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["bin/modelpool"])
    assert command({}) == "bin/modelpool"
    assert command({"MODELPOOL_HOME": "a b"}) == f"MODELPOOL_HOME='{tmp_path}/a b' bin/modelpool"
    monkeypatch.setenv("PATH", str(own.parent))
    monkeypatch.setattr(sys, "argv", [str(own)])
    assert command({}) == "modelpool"
    monkeypatch.setattr(sys, "argv", ["/x/modelpool/cli/__main__.py"])
    assert command({}) == f"{sys.executable} -m modelpool.cli"


@pytest.mark.parametrize(
    ("host", "says", "hint"),
    [
        ("192.0.2.1", "192.0.2.1:0 cannot be listened on", "--worker-host, WORKER_HOST"),
        ("host.invalid", "host.invalid:0 cannot be listened on", "--worker-host, WORKER_HOST"),
    ],
)
def test_an_address_of_another_machine_is_refused_with_the_names_to_set(host: str, says: str, hint: str) -> None:
    with pytest.raises(StartupError, match=says) as raised:
        bind_tcp(host, 0, flag="--worker-port", variable="WORKER_PORT")
    assert hint in raised.value.hint


def test_a_phase_without_sizes_is_its_name() -> None:
    assert progress_text(Progress(phase="load")) == "load"


def test_the_phases_of_a_start_are_shown_with_their_share_of_all() -> None:
    phases = (StartPhase("fork", 0.5), StartPhase("weights", 1.5))
    view = InstanceView(instance="m", worker_id="w", state=InstanceState.ACTIVE, sleep_level_value=0, phases=phases)
    lines = [str(line).split() for line in phases_table(view).lines()]
    assert lines == [
        ["PHASE", "SECONDS", "SHARE"],
        ["fork", "0.500", "25%"],
        ["weights", "1.500", "75%"],
        ["all", "2.000"],
    ]


def test_a_sleeper_is_shown_with_the_memory_that_it_still_holds() -> None:
    view = InstanceView(
        instance="m", worker_id="w", state=InstanceState.SLEEP_2, sleep_level_value=2, pss_bytes=623_400_000
    )
    model = ModelView(
        alias="m",
        state=InstanceState.SLEEP_2,
        reason="",
        spec=ModelSpec(alias="m", fake=True),
        created=0,
        instances=(view,),
    )
    assert "holds 623 MB" in str(instances_table([model]).lines()[1])
