"""The `modelpool` command: what its commands are, in the order in which `--help` shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from modelpool import __version__
from modelpool.cli.commands import chat, files, keys, models, observe, pool, traces, workers

Commands = Mapping[str, Callable[..., None]]

COMMANDS: Commands = {
    "up": pool.up,
    "deploy": pool.deploy,
    "undeploy": pool.undeploy,
    "worker": pool.worker,
    "register": models.register,
    "set": models.change,
    "rm": models.remove,
    "apply": files.apply,
    "diff": files.diff,
    "dump": files.dump,
    "load": files.load,
    "ls": models.list_all,
    "status": observe.status,
    "drain": workers.drain,
    "chat": chat.chat,
    "explain": observe.explain,
    "explain-start": observe.explain_start,
    "record": traces.record,
    "simulate": traces.simulate,
    "logs": observe.logs,
}
KEYS: Commands = {"create": keys.create, "ls": keys.list_all, "revoke": keys.revoke}

app = typer.Typer(
    name="modelpool",
    help="One OpenAI-compatible address in front of many models that share few accelerators.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
keys_app = typer.Typer(name="keys", help="API keys for clients.", no_args_is_help=True)
app.add_typer(keys_app)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


def _add(commands: Commands, to: typer.Typer) -> None:
    for name, command in commands.items():
        to.command(name)(command)


_add(COMMANDS, to=app)
_add(KEYS, to=keys_app)
