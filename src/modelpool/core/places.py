"""What an instance takes at once, shared by the gateway processes of one node, which all see what each has there.

While none waits, whoever comes first has what is free. Those who wait share in equal parts what the settled leave, who
have something there and wait for nothing: so no place stays free while somebody waits. While another waits nobody takes
more than such a part, rounded up, also who has not waited yet, and waits from then on; and who would have more than
that, rounded down, does not follow its own requests at once, so that the others, who look every few milliseconds, find
what it left.
"""

from __future__ import annotations

import msgspec


class Others(msgspec.Struct, frozen=True, kw_only=True):
    """The other processes. `inflight`: what they have there in all; `waiting`: with how many of them requests wait.

    `settled`: what those of them have with whom none waits; only known while any are `waiting`.
    """

    inflight: int
    settled: int = 0
    waiting: int = 0


def places(limit: int, own: int, others: Others) -> int:
    """So many more a process may send that has `own` there. `limit` is of all together, and 1 or more."""
    free = limit - own - others.inflight
    if others.waiting:
        part_rounded_up = -((others.settled - limit) // (others.waiting + 1))
        free = min(free, part_rounded_up - own)
    return max(0, free)


def may_follow(limit: int, own: int, others: Others) -> bool:
    """Whether it may send another one in the place of one that has just ended, and not only when it looks again."""
    return not others.waiting or (own + 1) * (others.waiting + 1) <= limit - others.settled
