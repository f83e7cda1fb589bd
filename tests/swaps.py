"""What serving requests in the order they came would cost, to compare with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


def first_come_first_served(asked: Iterable[str], places: int) -> int:
    """How often a model had to be brought up if one request were served after the other; the latest used stay."""
    there: OrderedDict[str, None] = OrderedDict()
    swaps = 0
    for alias in asked:
        if alias not in there:
            swaps += 1
            if len(there) == places:
                there.popitem(last=False)
        there[alias] = None
        there.move_to_end(alias)
    return swaps
