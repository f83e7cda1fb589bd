"""`keys create`, `keys ls`, `keys revoke`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from modelpool.cli.command import program
from modelpool.cli.options import JsonOption, UrlOption, client_of
from modelpool.cli.output import print_json, show
from modelpool.cli.tables import keys_table


def create(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    model: Annotated[
        list[str] | None, typer.Option("--model", help="It may use this alias; all, if none is given.")
    ] = None,
    rpm: Annotated[int | None, typer.Option("--rpm", help="Requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option("--tpm", help="Tokens per minute.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", help="Requests at once.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="The higher, the sooner its requests leave a queue.")] = 0,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key. Its secret is shown now and never again; from the first key on, nobody is served without one."""
    body = {
        "name": name,
        "models": model or [],
        "requests_per_minute": rpm,
        "tokens_per_minute": tpm,
        "max_concurrency": concurrency,
        "priority": priority,
    }
    with client_of(url) as client:
        made = client.make_key(body)
    if json:
        print_json(made)
        return
    print(made.secret)
    Console(stderr=True).print(
        f"[dim]The key {made.key.id} of {escape(name)}. Keep its secret: it is shown only now.[/]", highlight=False
    )


def list_all(
    all_: Annotated[bool, typer.Option("--all", help="Those that were revoked, too.")] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """List the keys and what each may do."""
    with client_of(url) as client:
        made = client.keys()
    keys = [key for key in made if all_ or key.revoked is None]
    show(keys, json, lambda: keys_table(keys) if keys else f"No key is there: see `{program()} keys create`.")


def revoke(
    key: Annotated[str, typer.Argument(help="Its id, or the name of a live one.")],
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Revoke a key: no new request of it is served; what runs is let finish."""
    with client_of(url) as client:
        revoked = client.revoke_key(key)
    show(revoked, json, lambda: f"revoked {revoked.id} ({escape(revoked.name)})")
