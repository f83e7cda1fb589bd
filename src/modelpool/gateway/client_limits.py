"""What one client may ask of us."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes, times in seconds."""

    body_bytes: int
    head_bytes: int = 64 << 10
    ahead_bytes: int = 64 << 10
    """Read of the next requests while one is served."""
    idle_s: float = 120.0
    head_s: float = 15.0
    body_s: float = 30.0
    """A body may pause for this long; what it sends buys more time at `body_rate`."""
    body_rate: int = 1024
    linger_s: float = 2.0
    flush_s: float = 60.0
    check_s: float = 0.5
    """How often deadlines are looked at."""
