"""Options that several commands take, and what is made of them: settings, a client, fields."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from modelpool.cli.client import PoolClient, Trouble
from modelpool.cli.output import fail
from modelpool.settings import Settings, SettingsError, load

ConfigOption = Annotated[Path | None, typer.Option("--config", envvar="MODELPOOL_CONFIG", help="A YAML file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
UrlOption = Annotated[str | None, typer.Option("--url", envvar="MODELPOOL_URL", help="The pool's address.")]


def settings_of(config: Path | None, flags: Mapping[str, Any]) -> Settings:
    """The settings of a new run, flags over environment over file; a bad one ends the command."""
    environ = dict(os.environ)
    environ.setdefault("MODELPOOL_RUN_ID", secrets.token_hex(8))
    try:
        return load(environ, file=config, flags=flags)
    except SettingsError as error:
        fail(str(error), "docs/operations.md lists the settings.", code=2)


@contextmanager
def client_of(url: str | None, *, code: int = 1) -> Iterator[PoolClient]:
    """A client of the pool; what goes wrong with it ends the command with a sentence, and this status."""
    try:
        client = PoolClient(settings_of(None, {}), url)
        try:
            yield client
        finally:
            client.close()
    except Trouble as trouble:
        fail(trouble.message, trouble.hint, code=code)


def assignments(texts: Iterable[str] | None) -> dict[str, Any]:
    """What options of the form name=value say; one of another form ends the command."""
    return dict(_assignment(text) for text in texts or ())


def _assignment(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON, else as text."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        fail(f"{text!r} is not of the form name=value.", code=2)
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name, value
