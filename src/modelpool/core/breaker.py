"""When an instance that keeps failing is left alone for a while, and how it gets its next chance.

    closed ──FAILURES_MAX failures in a row──► open ──`until` has come──► half open: one trial request
       ▲                                        ▲                              │
       └────────────── a success ───────────────┼──────────────────────────────┤
                                                └── a failure, twice the pause ┘

A trial whose answer has begun closes it on probation, however long the rest takes: until something has succeeded to its
end, one failure opens it again, for twice the pause. A trial that ends without a verdict (its client left) makes room
for the next one at once, so it always closes again.
Only failures of the instance count: an answer with a 4xx status is a success.
"""

from __future__ import annotations

from typing import NamedTuple

FAILURES_MAX = 5
PAUSE_INITIAL_S = 1.0
PAUSE_MAX_S = 30.0


class Breaker(NamedTuple):
    """The state of one instance's breaker. Times are on the caller's clock, in seconds."""

    failures: int = 0
    """In a row."""
    pause_s: float = 0.0
    """The length of the pause it is in, or had last since something succeeded."""
    until: float = 0.0
    """0 while it is closed."""
    trying: bool = False
    """Whether the one trial request runs."""

    @property
    def closed(self) -> bool:
        return self.until == 0

    def admits(self, now: float) -> bool:
        """Whether a request may be sent."""
        return self.closed or (now >= self.until and not self.trying)

    def begun(self) -> Breaker:
        """A request is sent."""
        return self if self.closed else self._replace(trying=True)

    def failed(self, now: float) -> Breaker:
        """It failed, and the instance is to blame."""
        failures = self.failures + 1
        if self.closed and failures < FAILURES_MAX:
            return self._replace(failures=failures)
        if not self.closed and not self.trying:
            return self._replace(failures=failures)  # sent before it opened: nothing new
        pause_s = min(PAUSE_MAX_S, self.pause_s * 2) or PAUSE_INITIAL_S
        return Breaker(failures, pause_s, now + pause_s)

    def answered(self) -> Breaker:
        """The answer to the trial has begun."""
        return Breaker(FAILURES_MAX - 1, self.pause_s)

    def gave_up(self) -> Breaker:
        """It ended without showing anything."""
        return self._replace(trying=False) if self.trying else self


CLOSED = Breaker()
"""Where every instance begins, and what a success brings it back to."""
