"""Where `up` shows what happens: a terminal, or JSON lines for programs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from modelpool.cli.command import command
from modelpool.cli.tables import models_table
from modelpool.cli.waiting import News
from modelpool.core.lifecycle import InstanceState
from modelpool.messages.admin import ModelView


class Screen(Protocol):
    """Where `up` shows what happens."""

    def notice(self, text: str) -> None:
        """Something to know happened."""

    def progress(self, models: tuple[ModelView, ...]) -> None:
        """How far the models are."""

    def ready(self, url: str, run_id: str, models: tuple[ModelView, ...]) -> None:
        """All is up, or as far up as it gets."""

    def ending(self) -> None:
        """An interrupt came; it takes a while."""


class Terminal:
    """A live table where there is a terminal, lines where there is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._news = News()
        self._begun = False

    def close(self) -> None:
        if self._live is not None and self._begun:
            self._live.stop()
            self._begun = False

    def notice(self, text: str) -> None:
        self._console.print(f"[yellow]notice:[/] {escape(text)}", highlight=False, soft_wrap=True)

    def progress(self, models: tuple[ModelView, ...]) -> None:
        if self._live is not None:
            if not models:
                return
            if not self._begun:
                self._live.start()
                self._begun = True
            self._live.update(models_table(models))
            return
        for model in models:
            if line := self._news.of(model):
                self._console.print(escape(f"{model.alias}: {line}"), highlight=False, soft_wrap=True)

    def ready(self, url: str, run_id: str, models: tuple[ModelView, ...]) -> None:
        self.close()
        if models:
            self._console.print(models_table(models), soft_wrap=True)
        self._console.print(f"\nModel Pool serves at [bold]{url}/v1[/] (run {run_id})", highlight=False)
        if any(model.state is InstanceState.ACTIVE for model in models):
            name = next(model.alias for model in models if model.state is InstanceState.ACTIVE)
            self._console.print(escape(f"Talk to a model:  {command()} chat {name}"), highlight=False, soft_wrap=True)
        self._console.print(f"Ctrl-C ends it; from elsewhere, `kill {os.getpid()}`.", highlight=False)

    def ending(self) -> None:
        self.close()
        text = "Ending: requests in flight have a few seconds. Ctrl-C again ends everything at once."
        self._console.print(text, highlight=False, soft_wrap=True)


class JsonLines:
    """One JSON object a line: `notice`, `progress` when a state changes, `ready` with the address."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._states: dict[str, str] = {}

    def close(self) -> None:
        pass

    def notice(self, text: str) -> None:
        self._put(event="notice", message=text)

    def progress(self, models: tuple[ModelView, ...]) -> None:
        states = {model.alias: str(model.state) for model in models}
        if states != self._states:
            self._states = states
            self._put(event="progress", models=states)

    def ready(self, url: str, run_id: str, models: tuple[ModelView, ...]) -> None:
        self._put(event="ready", url=url, run_id=run_id, models=models)

    def ending(self) -> None:
        self._put(event="ending")

    def _put(self, **fields: Any) -> None:
        self._write(msgspec.json.encode(fields).decode())
