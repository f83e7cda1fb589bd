"""`modelpool chat`: a conversation in the terminal, streamed as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
from rich.console import Console

from modelpool.cli.client import PoolClient, fail


class Chat:
    """One conversation with one model, over the pool's own OpenAI address."""

    def __init__(self, client: PoolClient, model: str, *, max_tokens: int | None = None) -> None:
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._messages: list[dict[str, str]] = []

    def ask(self, question: str) -> Iterator[str]:
        """The pieces of the answer. The conversation remembers question and answer once the answer is complete."""
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
        headers = {"Authorization": f"Bearer {self._client.key}"} if self._client.key else {}
        url = f"{self._client.url}/v1/chat/completions"
        try:
            with httpx.stream("POST", url, json=body, headers=headers, timeout=None, trust_env=False) as response:
                if not response.is_success:
                    fail(_message(response.read()) or f"the pool answered with status {response.status_code}.")
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _delta(msgspec.json.decode(line[6:]))
        except httpx.ConnectError:
            fail(f"no pool answers at {self._client.url}.", "Start one with `modelpool up`.")
        except httpx.HTTPError as error:
            fail(f"the answer broke off: {error or type(error).__name__}.")


def converse(chat: Chat, console: Console) -> None:
    """Ask until the end of input (Ctrl-D) or an interrupt at the prompt; an interrupt in an answer ends that answer."""
    console.print("[dim]Ctrl-D ends the conversation.[/]")
    while True:
        try:
            question = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question:
            try:
                say(chat, question, console)
            except KeyboardInterrupt:
                console.print("[dim] (stopped)[/]")


def say(chat: Chat, question: str, console: Console) -> None:
    """Ask once and print the answer while it comes."""
    for piece in chat.ask(question):
        console.out(piece, end="", highlight=False)
        console.file.flush()
    console.out("")


def _delta(event: Any) -> str:
    if "error" in event:
        fail(f"the answer broke off: {event['error'].get('message', event['error'])}")
    choices = event.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return str(delta.get("reasoning_content") or "") + str(delta.get("content") or "")


def _message(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""
