"""What every process of a pool does at its start: name itself, log, end with its parent, say when it is ready."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Mapping

import msgspec
import setproctitle

from modelpool.process_table import command_line

READY_FD = "MODELPOOL_READY_FD"
DETACHED = "MODELPOOL_DETACHED"
"""Set to a name for a process that outlives whoever started it, and is found again by that name."""
RUN_ID = "MODELPOOL_RUN_ID"
DISMISSED = 20
"""The exit status of a part that its pool needs no more: it is not started again."""
_RETIRING = "modelpool: retiring "
_PR_SET_PDEATHSIG = 1
_COLLECT = 5_000, 10, 100
"""The young objects' collection takes 1 ms, the next one's 10 ms; a full one comes after five million new objects."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process serves at `url`. `pid` is its own: what was started may have been its parent."""

    url: str
    pid: int = msgspec.field(default_factory=os.getpid)


class NotStarted(msgspec.Struct, frozen=True, tag="not_started"):
    """The process cannot start. `hint` says what the user can do about it."""

    reason: str
    hint: str = ""


Announcement = Ready | NotStarted


class StartupError(Exception):
    """A reason not to start that a user can do something about."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def enter(part: str, *, log_level: str = "info") -> None:
    """Name this process `modelpool: part`, send the log to standard error, and end when the parent does, or never."""
    if os.environ.get(DETACHED):
        detach()
    # Otherwise the title is written over the environment, and the run id can no longer be read from /proc.
    os.environ.setdefault("SPT_NOENV", "1")
    setproctitle.setproctitle(f"modelpool: {part}")
    logging.basicConfig(
        level=log_level.upper(), stream=sys.stderr, format=f"%(asctime)s %(levelname)-7s {part} %(name)s: %(message)s"
    )
    for talkative in ("httpx", "alembic.runtime.plugins"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    if os.environ.get(READY_FD) and not os.environ.get(DETACHED):
        end_with_parent()


def enter_retirement(part: str) -> None:
    """Be known as one that only ends what it has begun (`is_retiring`)."""
    setproctitle.setproctitle(f"{_RETIRING}{part}")


def is_retiring(pid: int) -> bool:
    """Whether that process of ours takes nothing new, or is no more."""
    title = "".join(command_line(pid)[:1])
    return not title or title.startswith(_RETIRING)


def detach() -> None:
    """Go on as a process without a parent. Ray's workers kill their children when they end, or lose their raylet."""
    if os.fork():
        os._exit(0)
    os.setsid()


def end_with_parent() -> None:
    """Be sent SIGTERM when the parent process dies, however it dies. Linux only; elsewhere nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def calm_collector() -> None:
    """Have cycles looked for rarely: a full look at nine thousand streams stops them all for a quarter of a second, one
    at ten thousand models for a tenth.

    What is there by now stays for good and is looked at no more. Requests, connections and steps of the controller
    leave no cycles behind, unless they fail.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)


def announce(message: Announcement, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the parent that started us, if it wants to know, that we are ready or why not."""
    if not environ.get(READY_FD):
        return
    fd = int(environ[READY_FD])
    os.write(fd, msgspec.json.encode(message) + b"\n")
    os.close(fd)
