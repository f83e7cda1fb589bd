"""A host that was forked and told nothing yet, and why there may be none."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from modelpool.process_group import ProcessGroup


class EngineUnavailable(Exception):
    """No instance of this engine kind can be started here; the text says why."""


class ForkFailed(Exception):
    """The forkserver lives but could not fork; its log says why."""


@dataclass(frozen=True, eq=False)
class ForkedHost:
    """With our end of its control socket. `exit` becomes its exit status, or None where nobody can tell."""

    group: ProcessGroup
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    exit: asyncio.Future[int | None]

    @property
    def pid(self) -> int:
        return self.group.leader

    def close(self) -> None:
        """Let go of it. One that still waits for a model ends by that; one that runs must have been ended."""
        self.writer.close()
        self.group.close()
