"""Imports run one way, and the engine and Ray stay in their folders."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import modelpool

SOURCE = Path(modelpool.__file__).parent
SHARED = {"errors", "settings", "home", "process", "control_http", "demo", "testing"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "messages": {"core"},
    "relay": {"core", "messages"},
    "manager": {"core", "messages", "relay"},
    "gateway": {"core", "messages", "relay"},
    "worker": {"core", "messages", "relay"},
    "engines": {"core", "messages", "relay"},
    "cluster": {"core", "messages", "relay", "manager", "gateway", "worker"},
    "simulator": {"core"},
    "cli": {"core", "messages", "relay", "manager", "gateway", "worker", "cluster", "simulator"},
}
ONLY_IN = {"vllm": "engines/vllm", "torch": "engines/vllm", "ray": "cluster"}


@cache
def imports() -> list[tuple[Path, str]]:
    """Every (file below src/modelpool, dotted name it imports)."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found += [(file.relative_to(SOURCE), alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found += [(file.relative_to(SOURCE), f"{node.module}.{alias.name}") for alias in node.names]
    return found


def test_every_part_imports_only_what_is_below_it() -> None:
    wrong = []
    for file, name in imports():
        part, target = file.parts[0], name.split(".")
        if target[0] != "modelpool" or len(target) < 2 or part not in MAY_IMPORT:
            continue
        if target[1] in MAY_IMPORT and target[1] != part and target[1] not in MAY_IMPORT[part]:
            wrong.append(f"{file} imports {name}")
    assert wrong == []


def test_core_knows_no_loop_no_io_no_clock() -> None:
    forbidden = {"asyncio", "os", "time", "random", "logging", "socket", "datetime", "subprocess", "pathlib"}
    wrong = [f"{file} imports {name}" for file, name in imports() if file.parts[0] == "core" and name in forbidden]
    assert wrong == []


def test_the_engine_and_ray_stay_in_their_folders() -> None:
    # The demo's and the tests' models are made with torch and transformers by scripts and modelpool.testing.
    wrong = [
        f"{file} imports {name}"
        for file, name in imports()
        for package, folder in ONLY_IN.items()
        if name.split(".")[0] == package and not str(file).startswith((folder, "testing"))
    ]
    assert wrong == []


def test_every_package_has_its_place_in_the_order() -> None:
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert packages - {"demo", "testing"} <= set(MAY_IMPORT)
