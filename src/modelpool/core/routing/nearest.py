"""Names near an unknown one, at a cost that does not grow with who asks or how much is registered."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable
from itertools import islice

LOOKED_AT_MAX = 512
_COMPARED_MAX = 16
_LENGTH_MAX = 128


def nearest(name: str, names: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` of `names` that resemble `name`, the best first.

    Real comparison is quadratic in the lengths, so only the 16 that share the most letters are compared, of at most
    512 names; nothing resembles a name longer than any alias can be.
    """
    if len(name) > _LENGTH_MAX:
        return []
    letters = set(name)
    likely = heapq.nlargest(
        _COMPARED_MAX,
        islice(names, LOOKED_AT_MAX),
        key=lambda each: len(letters & set(each)) * 4 - abs(len(each) - len(name)),
    )
    return difflib.get_close_matches(name, likely, limit, cutoff=0.5)
