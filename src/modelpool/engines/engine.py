"""The port between a host and what generates tokens.

An engine kind is a package `modelpool.engines.<kind>` that offers the functions of `EngineModule`.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Protocol, cast

import msgspec

from modelpool.engines.canary import Reading
from modelpool.messages.engine import HostSpec, StartPhase
from modelpool.messages.models import EngineKind

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

Phase = Callable[[str], None]
"""Told at the beginning of each phase of a load."""


class NotForkable(Exception):
    """The imports left the process in a state that must not be forked (threads, a device context)."""


class NotInstalled(Exception):
    """The engine is not installed, as against broken. The text says how to install it."""


class LoadError(Exception):
    """The model cannot be loaded. The text is the real reason, one or two lines for people.

    `permanent`: the same registration will fail in the same way each time, so that trying again is of no use.
    """

    def __init__(self, text: str, *, permanent: bool = False) -> None:
        super().__init__(text)
        self.permanent = permanent


class StillBusy(Exception):
    """Something still ran at the deadline; the engine goes on as before. The text says what."""


class ResidencyError(Exception):
    """The engine could not sleep or wake, and is of no use any more. The text is one line for people."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an engine once its model is loaded. `capacity`: requests it runs at once.

    `sleep_levels`: those it has, of 1 and 2. `weights_bytes`: what the weights take, all in
    all. `phases`: parts of the load that the engine itself can tell.
    """

    capacity: int
    sleep_levels: tuple[int, ...] = ()
    weights_bytes: int = 0
    phases: tuple[StartPhase, ...] = ()
    max_model_len: int | None = None
    num_gpu_blocks: int | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's own view of its load. `kv_cache_usage` is 0 to 1."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float | None = None


class Engine(Protocol):
    """A model that is loaded.

    loaded    `facts` and `stats()` answer. Nothing of asyncio exists yet.
    started   `app` answers requests; `dead()` waits.
    asleep    requests to `app` would wait without end; only `wake()`, a deeper `sleep()`, `stats()` and `close()`.
    dead      `dead()` has returned why; `app` fails its requests rather than leaving them hanging.
    closed    no process, thread or shared memory of the engine is left.

    `close()` is allowed in every state, more than once, outside the event loop only.
    """

    @property
    def facts(self) -> Facts: ...

    def stats(self) -> Stats: ...

    async def start(self) -> ASGIApp:
        """Start serving in the running loop. Returns the app, whose lifespan the caller runs. Raises LoadError."""

    async def sleep(self, level: int, deadline: float) -> int:
        """Give memory back, once nothing runs; returns how many bytes, 0 where that cannot be told.

        `level` is one of `facts.sleep_levels`, deeper than the present one. Nothing new comes meanwhile: the caller
        sees to that. `deadline`, in the loop's time, is for what still runs. Raises StillBusy, ResidencyError.
        """

    async def wake(self) -> None:
        """Started again, from any level. Raises ResidencyError."""

    async def canary(self) -> Mapping[str, Reading]:
        """What the model makes of a fixed prompt, for itself ("") and for each of its adapters, by name.

        Through the engine, not through `app`, so without what clients or the model's settings may change. Raises
        ResidencyError where the model cannot be asked so.
        """

    async def dead(self) -> str:
        """Return why the engine can no longer work; never return while it can."""

    def close(self) -> None:
        """End the engine and all below it, within 10 s, whatever state it is in."""


class EngineModule(Protocol):
    """The functions an engine's package has at its top. Importing the package itself imports nothing heavy."""

    def preload(self) -> None:
        """Import all that a host will need. Runs once, in the forkserver. Raises NotInstalled, NotForkable."""

    def start_survivors(self) -> None:
        """Start what must outlive a host's process group. Runs in a new host while it is still in its parent's."""

    def load(self, spec: HostSpec, phase: Phase) -> Engine:
        """Load the model, in a process that has no loop and one thread. Blocks. Raises LoadError."""


def engine_module(kind: EngineKind) -> EngineModule:
    return cast(EngineModule, importlib.import_module(f"modelpool.engines.{kind.value}"))


def one_line(error: BaseException) -> str:
    """An error as a single line: its type and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
