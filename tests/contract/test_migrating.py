"""docs/migrating.md, line by line: what earlier layouts called so is what the table says it is now."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer

from modelpool.cli.app import app
from modelpool.cli.models_file import read_models
from modelpool.cluster import MANAGER, NAMESPACE
from modelpool.cluster.actor import ManagerActor
from modelpool.gateway.routes import match
from modelpool.messages.admin import Registered
from modelpool.messages.models import ModelSpec
from modelpool.messages.workers import InstanceStatus
from modelpool.settings import ENVIRONMENT, load
from tests.contract.test_keys import running_pool
from tests.contract.worker_process import WorkerProcess, running_worker

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "migrating.md").read_text()

Row = tuple[str, ...]


def rows(heading: str) -> list[Row]:
    """The lines of the table after this line, without what stands there for people only."""
    table = TEXT.partition(f"\n{heading}\n")[2].lstrip().splitlines()
    cells = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in _table(table)]
    return [tuple(cell.strip("`") for cell in row) for row in cells[2:]]


def _table(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


ROUTER = rows("Of the gateway, which the router was (port 8000):")
MANAGER_PATHS = rows("Of the manager (port 9000):")
WORKER_PATHS = rows("Of a worker (port 7000):")


def commands() -> dict[str, typer.core.TyperCommand]:
    group = typer.main.get_group(app)
    return {name: command for name, command in group.commands.items() if isinstance(command, typer.core.TyperCommand)}


def test_every_table_of_the_page_is_read() -> None:
    """A table under a heading that no test knows would be believed, and not checked."""
    read = [rows(f"## {name}") for name in ("Scripts", "Files", "Flags", "Variables", "Fields", "Ray")]
    lines = sum(map(len, [*read, ROUTER, MANAGER_PATHS, WORKER_PATHS]))
    assert lines == len(re.findall(r"^\| (?!before|of )", TEXT, re.MULTILINE))
    assert lines > 60


@pytest.mark.parametrize("row", rows("## Scripts"), ids=lambda row: row[0])
def test_a_script_is_there_and_does_what_the_command_does(row: Row) -> None:
    script, command, _ = row
    text = (ROOT / script).read_text()
    if script.endswith(".sh"):
        assert os.access(ROOT / script, os.X_OK)
        assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0
        assert command in text
    else:
        compile(text, script, "exec")
        assert command == "modelpool deploy"
        assert "deploy(load(os.environ))" in text
    if command.startswith("modelpool "):
        assert command.split()[1] in commands()


@pytest.mark.parametrize("row", rows("## Files"), ids=lambda row: row[0])
def test_a_file_is_there_and_is_what_it_was(row: Row) -> None:
    before, now, _ = row
    assert (ROOT / before).is_file()
    if now != before:
        command = now.split()
        assert command == ["modelpool", "apply", "-f", before]
        assert command[1] in commands()
        assert read_models((ROOT / before).read_text(), before)


@pytest.mark.parametrize("row", rows("## Flags"), ids=lambda row: row[0])
def test_a_flag_is_one_of_the_command(row: Row) -> None:
    flag, now, _ = row
    _, command, named = now.split()
    assert named == flag
    assert flag in {option for parameter in commands()[command].params for option in parameter.opts}


@pytest.mark.parametrize("row", rows("## Variables"), ids=lambda row: row[0])
def test_a_variable_sets_what_it_says(row: Row) -> None:
    variable, path, example, _ = row
    assert (variable, path) in ENVIRONMENT
    settings = load({variable: example})
    part, name = path.split(".")
    assert str(getattr(getattr(settings, part), name)).removesuffix(".0") == example.removesuffix(".0")
    assert (
        getattr(getattr(load({}), part), name) != getattr(getattr(settings, part), name) or variable == "MANAGER_PORT"
    )


@pytest.mark.parametrize("row", ROUTER, ids=lambda row: row[0])
def test_a_path_of_the_router_is_one_of_the_gateway(row: Row) -> None:
    before, now, _ = row
    method, path = before.split()
    assert match(method.encode(), path.encode()).path == now.split()[1].encode() or now == before


def test_a_path_of_the_manager_is_there(tmp_path: Path) -> None:
    async def story() -> list[tuple[str, str]]:
        async with running_pool(tmp_path) as pool:
            return [
                (before, _error(await pool.http.request(method, path, json={})))
                for before, now, _ in MANAGER_PATHS
                for method, path in [now.split()]
                if before == now
            ]

    answers = asyncio.run(story())
    assert len(answers) == len(MANAGER_PATHS)
    assert [each for each in answers if each[1] in ("route_not_found", "method_not_allowed")] == []


def test_a_path_of_the_worker_is_there_and_wants_the_token(tmp_path: Path) -> None:
    with running_worker(tmp_path) as worker:
        worker.start("echo")
        with httpx.Client(base_url=worker.url, trust_env=False) as nobody:
            for before, now, _ in WORKER_PATHS:
                method, path = now.split()
                assert before == now
                assert nobody.request(method, path, json={}).status_code == (200 if path == "/health" else 401)
                answer = worker.http.request(method, path, json=_body(path))
                assert answer.status_code == 200, (now, answer.text)
                _settle(worker, path)


def _body(path: str) -> dict[str, object]:
    if path == "/instances/start":
        return {"model": {"alias": "echo", "fake": True}}
    if path.endswith("/chat/completions"):
        return {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}
    return {"level": 1} if path.endswith("/sleep") else {}


def _settle(worker: WorkerProcess, path: str) -> None:
    """An order about an instance is taken once the one before is done."""
    for order, state in (("/sleep", "SLEEP_1"), ("/wake", "ACTIVE")):
        if path.endswith(order):
            worker.wait("echo", state)


def _error(answer: httpx.Response) -> str:
    body = answer.json()
    return str(body["error"]["code"]) if "error" in body else ""


@pytest.mark.parametrize("row", rows("## Fields"), ids=lambda row: row[0])
def test_a_field_is_one_of_the_message(row: Row) -> None:
    of, names = row
    message = {"a registration": ModelSpec, "its answer": Registered, "an instance's status": InstanceStatus}[of]
    assert set(re.findall(r"\w+", names)) <= set(message.__struct_fields__)


@pytest.mark.parametrize("row", rows("## Ray"), ids=lambda row: row[0])
def test_what_was_asked_of_ray_is_there(row: Row) -> None:
    before, now, _ = row
    if before.startswith("ray.get_actor"):
        assert now == f'ray.get_actor("{MANAGER}", namespace="{NAMESPACE}")'
    elif before.startswith("manager."):
        assert before.split(".")[1] == now
        assert callable(getattr(ManagerActor, now))
    else:
        assert now == before
