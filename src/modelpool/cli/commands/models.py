"""Models one by one: `register`, `set`, `rm`, `ls`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from modelpool.cli.client import PoolClient
from modelpool.cli.command import program
from modelpool.cli.model_path import as_workers_find_it
from modelpool.cli.options import JsonOption, UrlOption, assignments, client_of
from modelpool.cli.output import fail, show
from modelpool.cli.tables import models_table
from modelpool.cli.waiting import is_ready, wait
from modelpool.messages.admin import ModelView

_INTERRUPTED = 130
"""The status of a command that Ctrl-C ended, as shells have it."""


def register(
    alias: Annotated[str | None, typer.Argument(help="The name clients send as `model`.")] = None,
    model_name: Annotated[str | None, typer.Argument(help="Hub name or local path.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A JSON body to register, - for stdin.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field: name=value, value as JSON or text.")
    ] = None,
    engine_arg: Annotated[list[str] | None, typer.Option(help="A vLLM argument: name=value.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens.")] = None,
    gpu_memory_gb: Annotated[float | None, typer.Option(help="GB of each device for it.")] = None,
    min_replicas: Annotated[int | None, typer.Option(help="Replicas to keep.")] = None,
    fake: Annotated[bool, typer.Option("--fake", help="Use the fake engine.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="In the place of another model: new instances first, then its end.")
    ] = False,
    wait_: Annotated[
        bool, typer.Option("--wait", help="Wait until all its replicas are ready, or it has failed.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="Wait so many seconds at most.")] = None,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Register a model; it is started, and stays registered until it is removed."""
    if timeout is not None and not wait_:
        fail("--timeout says how long to --wait; give both.", code=2)
    if model_name is not None:
        model_name = as_workers_find_it(model_name)
    body = _body_from(file)
    given = {
        "alias": alias,
        "model_name": model_name,
        "max_model_len": max_model_len,
        "min_replicas": min_replicas,
        "gpu_memory_gb": gpu_memory_gb,
        "fake": fake or None,
    }
    body |= {name: value for name, value in given.items() if value is not None}
    body |= assignments(set_)
    if engine_arg:
        body["engine_args"] = {**body.get("engine_args", {}), **assignments(engine_arg)}
    with client_of(url) as client:
        view = client.register(body, replace=replace)
        if wait_:
            view = _waited(client, view.alias, timeout, quiet=json)
    failed = wait_ and not is_ready(view)
    if failed and not json:
        fail(
            f"{view.alias} is not ready: {view.reason}",
            f"It stays registered; `{program()} rm {view.alias}` removes it."
            + (f" `{program()} logs {view.alias}` may say more." if view.instances else ""),
        )
    show(view, json, lambda: models_table([view]))
    if failed:
        raise typer.Exit(1)


def change(
    alias: str,
    settings: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE...", help="min_replicas=1, pinned=true; null for the default.")
    ],
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Change settings of a model while it runs: replicas, pinned, preload, capacity, thresholds, idle times."""
    wanted = assignments(settings)
    with client_of(url) as client:
        view = client.change(alias, wanted)
    show(view, json, lambda: models_table([view]))


def remove(alias: str, url: UrlOption = None, json: JsonOption = False) -> None:
    """Remove a model: it takes no new requests, finishes those it has, and ends."""
    with client_of(url) as client:
        client.remove(alias)
    show({"removed": alias}, json, lambda: f"removed {alias}")


def list_all(url: UrlOption = None, json: JsonOption = False) -> None:
    """List the registered models, whatever runs."""
    with client_of(url) as client:
        models = client.status().models
    show(models, json, lambda: models_table(models) if models else "No model is registered: see `modelpool register`.")


def _body_from(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        text = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return msgspec.json.decode(text, type=dict[str, Any])
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}.")
    except msgspec.DecodeError as error:
        fail(f"{file} is not a JSON object: {error}.")


def _waited(client: PoolClient, alias: str, timeout_s: float | None, *, quiet: bool) -> ModelView:
    """The model after waiting for it, telling on the way what it is at."""
    console = Console(quiet=quiet)
    try:
        return wait(
            client,
            alias,
            lambda line: console.print(f"[dim]{escape(f'{alias}: {line}')}[/]", highlight=False, soft_wrap=True),
            timeout_s=timeout_s,
        )
    except KeyboardInterrupt:
        console.print(f"No longer waited for; {alias} stays registered.", highlight=False)
        raise typer.Exit(_INTERRUPTED) from None
