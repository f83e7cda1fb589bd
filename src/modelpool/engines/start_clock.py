"""Where the time of a start goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from modelpool.messages.engine import StartPhase


class StartClock:
    """Phases one after the other: each ends where the next begins."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phases: list[StartPhase] = []
        self._name = ""
        self._began = 0.0

    def begin(self, name: str) -> None:
        self.end()
        self._name, self._began = name, self._clock()

    def end(self) -> None:
        if self._name:
            self._phases.append(StartPhase(self._name, self._clock() - self._began))
            self._name = ""

    def split(self, parts: Sequence[StartPhase]) -> None:
        """Parts of the last phase that is over; what they leave of it keeps its name."""
        if parts and self._phases:
            whole = self._phases.pop()
            rest = max(0.0, whole.seconds - sum(part.seconds for part in parts))
            self._phases += [StartPhase(whole.name, rest), *parts]

    def phases(self) -> tuple[StartPhase, ...]:
        return tuple(self._phases)
