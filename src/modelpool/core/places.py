"""What an instance takes at once, shared by the gateway processes of one node, which all see what each has there.

While none waits, whoever comes first has what is free. Once one waits, nobody takes more than an equal part, rounded
up; and who would have more than that, rounded down, does not follow its own requests at once, so that the others, who
look every few milliseconds, find what it left.
"""

from __future__ import annotations

import math

import msgspec


class Others(msgspec.Struct, frozen=True, kw_only=True):
    """The other processes. `inflight`: what they have there in all; `wanting`: requests of theirs wait for it.

    `busy`: so many of them have something there or wait for it; only known while they are `wanting`.
    """

    inflight: int
    busy: int = 0
    wanting: bool = False


def places(limit: int, own: int, others: Others) -> int:
    """So many more a process may send that has `own` there. `limit` is of all together, and 1 or more."""
    free = limit - own - others.inflight
    if others.wanting:
        free = min(free, math.ceil(limit / (others.busy + 1)) - own)
    return max(0, free)


def may_follow(limit: int, own: int, others: Others) -> bool:
    """Whether it may send another one in the place of one that has just ended, and not only when it looks again."""
    return not others.wanting or (own + 1) * (others.busy + 1) <= limit
