"""`register --wait`, `drain --wait`: how long waiting is of use, and what to say meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from modelpool.cli.client import PoolClient
from modelpool.cli.tables import progress_text, ready_count
from modelpool.core.lifecycle import InstanceState
from modelpool.messages.admin import ModelView, WorkerView
from modelpool.messages.workers import Progress

_POLL_S = 0.25
_NUMBER = re.compile(r"\d+(\.\d+)?")


def wait(client: PoolClient, alias: str, say: Callable[[str], None], *, timeout_s: float | None) -> ModelView:
    """The model once all its replicas are ready, waiting longer is of no use, or the time is over."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    news = News()
    while True:
        view = client.model(alias)
        if is_ready(view) or has_failed(view) or (deadline is not None and time.monotonic() >= deadline):
            return view
        if line := news.of(view):
            say(line)
        time.sleep(_POLL_S)


def wait_drained(
    client: PoolClient, worker_id: str, say: Callable[[str], None], *, timeout_s: float | None
) -> WorkerView | None:
    """None once the worker is gone; what it still waits for when the time is over, or somebody has it stay."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    told: tuple[str, ...] = ()
    while (view := client.worker(worker_id)) is not None and view.draining:
        if deadline is not None and time.monotonic() >= deadline:
            return view
        for sentence in view.drain:
            if sentence not in told:
                say(sentence)
        told = view.drain
        time.sleep(_POLL_S)
    return view


def is_ready(view: ModelView) -> bool:
    return ready_count(view) >= view.wanted


def has_failed(view: ModelView) -> bool:
    """Whether a start of it has failed, or none is possible with the workers that there are."""
    waiting = [each for each in view.instances if each.state is not InstanceState.ACTIVE and not each.leaving]
    return view.permanent or any(each.failures for each in waiting)


class News:
    """What to tell of a model: a line when something else happens than before, not when only numbers have changed."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str, int]] = {}

    def of(self, view: ModelView) -> str:
        """A line without the model's name, or "" when there is no news."""
        progress = next((each.progress for each in view.instances if each.progress), None)
        what = progress_text(progress) if progress else view.reason
        line = f"{view.state}: {what}" if what else str(view.state)
        if view.wanted > 1:
            line = f"{ready_count(view)} of {view.wanted} replicas ready, {line}"
        key = (_shape(view, what), _tenth(progress))
        if self._told.get(view.alias) == key:
            return ""
        self._told[view.alias] = key
        return line


def _shape(view: ModelView, what: str) -> str:
    return f"{view.state} {ready_count(view)} {_NUMBER.sub('#', what)}"


def _tenth(progress: Progress | None) -> int:
    """A download is news at every tenth of it."""
    return 10 * progress.done_bytes // progress.total_bytes if progress and progress.total_bytes else 0
