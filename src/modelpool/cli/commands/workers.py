"""Workers: `drain`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from modelpool.cli.command import program
from modelpool.cli.options import JsonOption, UrlOption, client_of
from modelpool.cli.output import fail, print_json
from modelpool.cli.tables import worker_lines
from modelpool.cli.waiting import wait_drained
from modelpool.messages.admin import WorkerView


def drain(
    worker_id: str,
    cancel: Annotated[bool, typer.Option("--cancel", help="Have it stay after all.")] = False,
    wait_: Annotated[bool, typer.Option("--wait", help="Wait until it is gone.")] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="Wait so many seconds at most.")] = None,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Let a worker go: what it runs comes up elsewhere first, requests finish, then it ends."""
    if timeout is not None and not wait_:
        fail("--timeout says how long to --wait; give both.", code=2)
    if cancel and wait_:
        fail("--cancel has it stay; there is nothing to --wait for.", code=2)
    with client_of(url) as client:
        view: WorkerView | None = client.keep(worker_id) if cancel else client.drain(worker_id)
        if wait_:
            console = Console(quiet=json)
            view = wait_drained(
                client,
                worker_id,
                lambda line: console.print(f"[dim]{escape(line)}[/]", highlight=False, soft_wrap=True),
                timeout_s=timeout,
            )
    if wait_ and view is not None and not json:
        hint = f"`{program()} drain {worker_id} --cancel` keeps it." if view.draining else ""
        fail(f"{worker_id} is still there: {' '.join(view.drain) or 'it was told to stay'}", hint)
    if json:
        print_json(view)
    else:
        for line in [f"{worker_id} is gone."] if view is None else worker_lines(view):
            Console().print(line, markup=False, highlight=False, soft_wrap=True)
    if wait_ and view is not None:
        raise typer.Exit(1)
