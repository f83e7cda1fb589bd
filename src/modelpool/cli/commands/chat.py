"""`chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from modelpool.cli.chat import Chat, converse, say
from modelpool.cli.options import JsonOption, UrlOption, client_of
from modelpool.cli.output import fail, print_json


def chat(
    model: str,
    prompt: Annotated[
        str | None, typer.Argument(help="Ask this and end. Without it: what is piped in, or a conversation.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The longest answer, in tokens.")] = None,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Talk to a model; the answer streams as it comes."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            fail("nothing was asked: standard input is empty.", "Give a prompt, or pipe one in.")
    if json and prompt is None:
        fail("--json needs a prompt.")
    with client_of(url) as client:
        conversation = Chat(client, model, max_tokens=max_tokens)
        if prompt is None:
            converse(conversation, Console())
        elif json:
            print_json({"model": model, "prompt": prompt, "answer": "".join(conversation.ask(prompt))})
        else:
            say(conversation, prompt, Console())
