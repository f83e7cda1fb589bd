"""What commands print: results for people or, with --json, for programs; on standard error what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import msgspec
import typer
from rich.console import Console, RenderableType
from rich.markup import escape


def show(value: object, as_json: bool, shown: Callable[[], RenderableType]) -> None:
    """Print the value for programs, or what is shown of it for people."""
    if as_json:
        print_json(value)
    else:
        Console().print(shown(), highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def fail(message: str, hint: str = "", *, code: int = 1) -> NoReturn:
    """Say what is wrong and what to do about it, and end."""
    report(message, hint)
    raise typer.Exit(code)


def report(message: str, hint: str = "") -> None:
    """Say on standard error what is wrong and what to do about it. The message gets its full stop here."""
    console = Console(stderr=True)
    console.print(f"[red]error:[/] {escape(sentence(message))}", highlight=False, soft_wrap=True, emoji=False)
    if hint:
        console.print(f"[dim]{escape(hint)}[/]", highlight=False, soft_wrap=True)


def sentence(text: str) -> str:
    """With one full stop at its end, whatever ended it before."""
    text = text.rstrip()
    return text if text.endswith(("?", "!", "…")) else f"{text.rstrip('.')}."
