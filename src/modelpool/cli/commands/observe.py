"""What can be seen of a pool: `status`, `explain`, `explain-start`, `logs`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console

from modelpool.cli.client import Trouble
from modelpool.cli.listing import Listing
from modelpool.cli.options import JsonOption, UrlOption, client_of
from modelpool.cli.output import fail, print_json
from modelpool.cli.tables import (
    considered_table,
    instances_table,
    learned_table,
    models_table,
    now_line,
    phases_table,
    status_line,
    worker_lines,
    workers_table,
)
from modelpool.messages.admin import ModelView


def status(url: UrlOption = None, json: JsonOption = False) -> None:
    """Show models, instances and workers."""
    with client_of(url) as client:
        pool, local = client.status(), client.local
    if json:
        print_json(pool)
        return
    console = Console()
    console.print(status_line(pool), highlight=False, soft_wrap=True)
    for table in (models_table(pool.models), instances_table(pool.models), workers_table(pool.workers)):
        if table.row_count:
            console.print()
            console.print(table, soft_wrap=True)
    if local is not None and local.pid:
        console.print(f"\n[dim]`kill {local.pid}` ends this pool, as Ctrl-C does where `up` runs.[/]", highlight=False)


def explain(
    what: Annotated[
        str, typer.Argument(help="The X-Request-Id of a recent request, the alias of a model, or a worker's name.")
    ],
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Say what was decided for a recent request, or is to become of a model or a worker, and why."""
    with client_of(url) as client:
        pool = client.status()
        if model := next((each for each in pool.models if each.alias == what), None):
            _explain_model(model, json)
            return
        if worker := next((each for each in pool.workers if each.worker_id == what), None):
            print_json(worker) if json else _tell(worker_lines(worker), None)
            return
        try:
            explanation = client.explain(what)
        except Trouble as trouble:
            if trouble.code == "request_not_known":
                fail(f"No model has the alias `{what}`. {trouble.message}", trouble.hint)
            raise
    if json:
        print_json(explanation)
        return
    _tell(explanation.words, considered_table(explanation.considered) if explanation.considered else None)


def _explain_model(model: ModelView, json: bool) -> None:
    if json:
        fields = ("alias", "state", "reason", "wanted", "decision", "due_s", "outlook", "learned")
        print_json({name: getattr(model, name) for name in fields})
        return
    _tell((now_line(model), *model.outlook), learned_table(model.learned) if model.learned else None)


def _tell(sentences: Iterable[str], table: Listing | None) -> None:
    console = Console()
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if table is not None:
        console.print()
        console.print(table, soft_wrap=True)


def explain_start(alias: str, url: UrlOption = None, json: JsonOption = False) -> None:
    """Show where the time of a model's last start went, by phase, for each of its instances."""
    with client_of(url) as client:
        model = client.model(alias)
    started = [each for each in model.instances if each.phases]
    if json:
        print_json(
            [{"instance": each.instance, "worker_id": each.worker_id, "phases": each.phases} for each in started]
        )
        return
    if not started:
        fail(f"no instance of {alias} has started: it is {model.state}" + (f", {model.reason}" if model.reason else ""))
    console = Console()
    for number, each in enumerate(started):
        if number:
            console.print()
        console.print(f"{each.instance} on {each.worker_id}", markup=False, highlight=False, soft_wrap=True)
        console.print(phases_table(each), soft_wrap=True)


def logs(
    alias: Annotated[str, typer.Argument(help="A model, or one of its instances (`alias-r2`).")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
    tail: Annotated[int, typer.Option("--tail", "-n", help="So many last lines.")] = 200,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Show the log of a model's instance, also when it is dead."""
    if json and follow:
        fail("--json shows what there is; leave out --follow.")
    with client_of(url) as client, client.logs(alias, tail=tail, follow=follow) as pieces:
        if json:
            print_json({"alias": alias, "lines": "".join(pieces).splitlines()})
            return
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
