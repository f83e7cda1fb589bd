"""Whether a model that was woken is the one that fell asleep: the same numbers for the same prompt.

A wake can go wrong and still give fluent text with status 200: weights that were not loaded again, or into the wrong
place. So what the model makes of one fixed prompt is measured before the first sleep, twice, to know how far two
measurements of a sound model lie apart, and compared after each wake before any client is let in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import msgspec

PROMPT_TOKENS = 32
FLOOR = 0.01
"""Differences (nats of a log probability; 1 - cosine) up to this are never taken for damage."""
MARGIN = 4.0
"""Damage is a difference of more than so many times what two measurements of the sound model differed by."""
_STEP = 7919


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """One place in the text: its likeliest token, that one's log probability, and how far the second one is behind.

    `given`: the log probability of the token that stands there.
    """

    token: int
    logprob: float
    lead: float
    given: float


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What a model made of the prompt: each place of it and of the tokens generated after it, or an embedding."""

    prompt: tuple[Position, ...] = ()
    generated: tuple[Position, ...] = ()
    vector: tuple[float, ...] = ()


class Baseline(msgspec.Struct, frozen=True):
    """A reading of the sound model, and how far another one may lie from it."""

    reading: Reading
    tolerance: float


class Unsteady(Exception):
    """Two readings of a sound model have nothing in common: it cannot be told from a damaged one."""


def prompt_ids(vocabulary: int, longest: int = PROMPT_TOKENS) -> list[int]:
    """The fixed prompt as token ids: from the lower half, since special tokens stand at the end of a vocabulary."""
    half = max(1, vocabulary // 2)
    return [(half // 16 + index * _STEP) % half for index in range(max(1, min(longest, PROMPT_TOKENS)))]


def baseline(first: Reading, second: Reading) -> Baseline:
    """Two readings of the sound model as what later ones are compared with. Raises Unsteady."""
    spread = distance(first, second)
    if not math.isfinite(spread):
        raise Unsteady("two readings of the same prompt cannot be compared")
    return Baseline(first, max(FLOOR, MARGIN * spread))


def distance(one: Reading, other: Reading) -> float:
    """The largest difference of a log probability, or 1 - cosine. Infinite for readings that cannot be compared."""
    if (len(one.prompt), len(one.vector)) != (len(other.prompt), len(other.vector)):
        return math.inf
    pairs = list(_pairs(one, other))
    apart = [_apart(a.logprob, b.logprob) for a, b in pairs] + [_apart(a.given, b.given) for a, b in pairs]
    if one.vector:
        apart.append(1 - _cosine(one.vector, other.vector))
    return math.inf if not apart or any(map(math.isnan, apart)) else max(apart)


def damage(sound: Mapping[str, Baseline], found: Mapping[str, Reading]) -> str:
    """What is wrong with a model after a wake, in a line; "" when nothing is. Of "", the model, and its adapters."""
    for name, baseline_ in sound.items():
        whose = f"the adapter {name!r}" if name else "the model"
        if name not in found:
            return f"{whose} is gone"
        if problem := _difference(baseline_, found[name]):
            return f"{whose} is not what it was: {problem}"
    return ""


def _difference(sound: Baseline, found: Reading) -> str:
    apart = distance(sound.reading, found)
    if not apart <= sound.tolerance:
        what = "1 - cosine of an embedding" if sound.reading.vector else "a log probability"
        return f"{what} differs by {apart:.3g}, by {sound.tolerance:.3g} at most if it were sound"
    for before, after in _pairs(sound.reading, found):
        # Two that were as likely as each other may change places.
        if before.token != after.token and before.lead > 2 * sound.tolerance:
            return f"its likeliest token was {before.token} somewhere and is {after.token}"
    return ""


def _pairs(one: Reading, other: Reading) -> Iterator[tuple[Position, Position]]:
    """The places that can be compared: those generated, only as long as the text before them is the same."""
    yield from zip(one.prompt, other.prompt, strict=False)
    for before, after in zip(one.generated, other.generated, strict=False):
        yield before, after
        if before.token != after.token:
            return


def _apart(one: float, other: float) -> float:
    return 0.0 if one == other else abs(one - other)  # also for two that are both minus infinity


def _cosine(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """NaN where one of them is all zeros, or has a NaN."""
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else math.nan
