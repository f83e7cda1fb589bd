"""A pool as a file: `apply` and `diff` for models that people wrote down, `dump` and `load` for all there is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import typer
import yaml
from rich.console import Console
from rich.markup import escape

from modelpool.cli.client import PoolClient
from modelpool.cli.models_file import read_dump, read_models
from modelpool.cli.options import JsonOption, UrlOption, client_of
from modelpool.cli.output import fail, print_json, show
from modelpool.cli.plan import Step, lines, patch, plan
from modelpool.messages.models import CHANGEABLE
from modelpool.yaml_file import BadFile, text_of

T = TypeVar("T")

FileOption = Annotated[Path, typer.Option("--file", "-f", help="Models in YAML, - for stdin: see config/models.yaml.")]


def apply(
    file: FileOption,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove models that the file does not name.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Start other instances of what cannot change while it runs.")
    ] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Make the pool's models those of a file. What is to be done is shown first; twice does nothing."""
    wanted = _read(file, read_models)
    with client_of(url) as client:
        steps = plan(client.specs(), wanted, prune=prune)
        _print_plan(steps, json)
        if fixed := [step for step in steps if step.kind == "replace" and not replace]:
            names = ", ".join(each.field for each in fixed[0].differences if each.field not in CHANGEABLE)
            fail(
                f"{fixed[0].alias} cannot change in {names} while it runs; nothing was done",
                "With --replace other instances are started, and take the place of those that run.",
            )
        if steps and not yes and not _confirmed():
            fail("nothing was done.", "Say --yes where nobody can be asked.")
        for step in steps:
            _take(client, step)
            if not json:
                Console(stderr=True).print(f"[dim]{step.kind} {escape(step.alias)}: done[/]", highlight=False)


def diff(
    file: FileOption,
    prune: Annotated[bool, typer.Option("--prune", help="Also models that the file does not name.")] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Show what `apply` would do. Ends with status 1 if that is anything, and with 2 if it cannot be said."""
    wanted = _read(file, read_models)
    with client_of(url, code=2) as client:
        steps = plan(client.specs(), wanted, prune=prune)
    _print_plan(steps, json)
    if steps:
        raise typer.Exit(1)


def dump(
    models: Annotated[bool, typer.Option("--models", help="Models only, as `apply` takes them.")] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Print all models and keys, for `load`. Of keys the digests only: their secrets are nowhere."""
    with client_of(url) as client:
        there = client.dump()
    value = msgspec.to_builtins({"models": [each.spec for each in there.models]} if models else there)
    if json:
        print_json(value)
    else:
        print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")


def load(
    file: Annotated[Path, typer.Argument(help="What `dump` printed; - for stdin.")],
    restore: Annotated[
        bool, typer.Option("--restore", help="An empty pool becomes the dumped one, and takes its workers.")
    ] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Add what was dumped: all of it, or nothing where something of it is there and differs."""
    dumped = _read(file, read_dump)
    with client_of(url) as client:
        loaded = client.load(dumped, restore=restore)
    show(loaded, json, lambda: f"loaded {len(loaded.models)} models and {len(loaded.keys)} keys")


def _read(file: Path, read: Callable[[str, str], T]) -> T:
    """What a file says, by its text and name; what is wrong in it ends the command before anything was done."""
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return read(text_of(data, str(file)), str(file))
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}.", code=2)
    except BadFile as error:
        fail(str(error), code=2)


def _print_plan(steps: list[Step], json: bool) -> None:
    shown = "\n".join(lines(steps)) or "Nothing is to be done."
    show(steps, json, lambda: escape(shown))


def _confirmed() -> bool:
    return sys.stdin.isatty() and typer.confirm("Do this?")


def _take(client: PoolClient, step: Step) -> None:
    if step.kind == "change":
        client.change(step.alias, patch(step))
    elif step.spec is not None:
        client.register(msgspec.to_builtins(step.spec), replace=step.kind == "replace")
    else:
        client.remove(step.alias)
