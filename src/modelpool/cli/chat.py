"""`modelpool chat`: a conversation in the terminal, streamed as it comes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import msgspec
from rich.console import Console

from modelpool.cli.client import PoolClient, Trouble
from modelpool.cli.output import report

_PROMPT = "> "
_ENDS = ("/bye", "/exit")


class Chat:
    """One conversation with one model, over the pool's own OpenAI address."""

    def __init__(self, client: PoolClient, model: str, *, max_tokens: int | None = None) -> None:
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str) -> Iterator[str]:
        """The pieces of the answer. Raises Trouble.

        The conversation remembers question and answer once the answer is complete.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        answer: list[str] = []
        for piece in self._stream(messages):
            answer.append(piece)
            yield piece
        self._messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def _stream(self, messages: list[dict[str, str]]) -> Iterator[str]:
        body: dict[str, Any] = {"model": self._model, "messages": messages, "stream": True}
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        with self._client.stream("POST", "/v1/chat/completions", json=body, timeout=None) as response:
            try:
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _delta(msgspec.json.decode(line[6:]))
            except (httpx.HTTPError, msgspec.DecodeError) as error:
                raise Trouble(f"the answer broke off: {error or type(error).__name__}") from error


def converse(chat: Chat, console: Console, read: Callable[[str], str] = input) -> None:
    """Ask until `/bye`, `/exit`, the end of input (Ctrl-D) or an interrupt at the prompt.

    An interrupt in an answer ends that answer, an error the turn; the conversation goes on as if neither had been.
    """
    with suppress(ImportError):
        importlib.import_module("readline")  # from then on `input` edits its line and knows the ones before
    console.print("[dim]/bye or Ctrl-D ends the conversation.[/]", highlight=False)
    while True:
        try:
            question = read(_PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question in _ENDS:
            return
        if question:
            _turn(chat, question, console)


def _turn(chat: Chat, question: str, console: Console) -> None:
    try:
        say(chat, question, console)
    except KeyboardInterrupt:
        console.print("[dim] (stopped)[/]")
    except Trouble as trouble:
        report(trouble.message, trouble.hint)


def say(chat: Chat, question: str, console: Console) -> None:
    """Ask once and print the answer while it comes. Raises Trouble."""
    begun = False
    try:
        for piece in chat.ask(question):
            console.out(piece, end="", highlight=False)
            console.file.flush()
            begun = begun or bool(piece)
    except Trouble:
        if begun:
            console.out("")
        raise
    console.out("")


def _delta(event: Any) -> str:
    if "error" in event:
        error = event["error"]
        raise Trouble(f"the answer broke off: {error.get('message', error) if isinstance(error, dict) else error}")
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return str(delta.get("reasoning_content") or "") + str(delta.get("content") or "")
